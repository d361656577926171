"""Going on from a checkpoint: given options hold, what contradicts it is refused, and steps are trained."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback

from acckv import InputError, KVCompressor
from lightning_modules.calibration.checkpoint import (
    CONFIG_FILE,
    TRAINING,
    check_fixed,
    find_checkpoint,
    read_checkpoint,
)
from lightning_modules.calibration.module import CalibrationModule
from tests.calibration.runs import fit, trained
from tests.cli.test_configs import run_script
from tests.learned import lora_of, weights_of

SMALL = """\
seed_everything: 0
model: {lora_rank: 2, lora_targets: [q_proj], ratio_min: 0.1}
data: {train_clips: 6, validation_clips: 2, batch_size: 2, questions_per_clip: 1, seed: 5}
evaluation: {clips: 0}
export: {new_tokens: 2}
checkpoint: {every_n_train_steps: 2, save_top_k: -1}
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  max_steps: 4
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  limit_val_batches: 0
  enable_progress_bar: false
  enable_model_summary: false
"""


class Rates(Callback):
    """The steps that were trained, with the learning rate of each group of weights."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, float]] = {}

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.seen[trainer.global_step] = {group["option"]: group["lr"] for group in optimizer.param_groups}


@pytest.fixture(scope="module")
def run(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of train.py; its checkpoints are at steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "small.yaml").write_text(SMALL)
    with pytest.MonkeyPatch.context() as patched:
        options = [f"--data.cache_dir={cache}", f"--trainer.default_root_dir={folder}"]
        assert run_script(patched, "train.py", "fit", "--config", folder / "small.yaml", *options) == 0
    return folder


class PressCtrlC(Callback):
    """In the middle of the second step."""

    def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_ends_between_two_steps_with_a_checkpoint_that_can_be_exported(
    run: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    options = (
        f"--trainer.default_root_dir={tmp_path}",
        "--trainer.callbacks+=tests.calibration.test_resume.PressCtrlC",
    )
    assert run_script(monkeypatch, "train.py", "--config", run / CONFIG_FILE, *options) == 130
    last = tmp_path / "checkpoints" / "last.ckpt"
    said = capsys.readouterr().err
    assert f"Stopped at step 2. Checkpoint: {last}. To go on: python train.py --ckpt_path {last}; to export" in said
    assert signal.getsignal(signal.SIGINT) is handler and not (tmp_path / "export").exists()
    whole, stopped = (read_checkpoint(file) for file in (run / "checkpoints" / "step-2.ckpt", last))
    assert whole["state_dict"].keys() == stopped["state_dict"].keys()
    assert all(torch.equal(whole["state_dict"][name], value) for name, value in stopped["state_dict"].items())
    for mine, its in zip(*(state["optimizer_states"][0]["state"].values() for state in (whole, stopped)), strict=True):
        assert torch.equal(mine["exp_avg"], its["exp_avg"])
    config = ("--config", run / CONFIG_FILE)  # without the callback
    assert run_script(monkeypatch, "train.py", "export", *config, *options[:1], "--ckpt_path=last") == 0
    export = KVCompressor.from_pretrained(tmp_path / "export")
    assert export.asked is not None and export.calibration is not None
    assert export.asked.wordings.keys() == export.calibration.kinds.keys()
    learned = {name: value for name, value in weights_of(export).state_dict().items() if value.numel()}
    assert not learned.pop("head_budget").any()  # not trained with equal heads
    for name, value in learned.items():
        assert torch.equal(value, stopped["state_dict"][f"compressor.weights.{name}"]), name
    assert lora_of(export) and "2 of 4 optimiser steps" in (tmp_path / "report.md").read_text()
    assert run_script(monkeypatch, "train.py", "export") == 2
    assert "ckpt_path: is needed: a file, or 'last' or 'best' of the run" in capsys.readouterr().err


def test_the_best_by_a_monitored_metric_is_exported(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        *(f"--trainer.default_root_dir={tmp_path}", "--trainer.val_check_interval=1", "--trainer.limit_val_batches=1"),
        *("--checkpoint.monitor=val/kl", "--checkpoint.save_top_k=1", "--checkpoint.every_n_train_steps=null"),
        *("--model.lr_lora=3", "--model.warmup=1", "--trainer.max_steps=3"),
    ]
    assert run_script(monkeypatch, "train.py", "--config", run / CONFIG_FILE, *options) == 0
    (best,) = (tmp_path / "checkpoints").glob("step-*.ckpt")
    step, states = (
        int(best.stem[5:]),
        [read_checkpoint(file) for file in (best, tmp_path / "checkpoints" / "last.ckpt")],
    )
    assert step < states[1]["global_step"] == 3
    export = weights_of(KVCompressor.from_pretrained(tmp_path / "export")).saliency
    found = [torch.equal(export, state["state_dict"]["compressor.weights.saliency"]) for state in states]
    assert found == [True, False]
    assert f"is of step {step}, which is exported." in capsys.readouterr().out
    assert f"Exported is step {step}, the best of the checkpoints" in (tmp_path / "report.md").read_text()
    assert find_checkpoint("best", tmp_path / "checkpoints") == best


def test_given_options_hold_and_others_are_the_checkpoints(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run / "checkpoints" / "step-2.ckpt"
    other = ("--model.lr_lora=1e-9", f"--trainer.default_root_dir={tmp_path}", f"--ckpt_path={checkpoint}")
    assert run_script(monkeypatch, "train.py", *other) == 0  # its config is the run's
    said = capsys.readouterr().out
    assert "Other options than the checkpoint's: model.lr_lora 1e-09 (was 0.002)." in said
    assert "Goes on at step 2 of 4: " in said
    saved = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert saved["hyper_parameters"]["lr_lora"] == 1e-9 and saved["hyper_parameters"]["ratio_min"] == 0.1
    assert saved["datamodule_hyper_parameters"]["seed"] == 5
    groups = {group["option"]: group for group in saved["optimizer_states"][0]["param_groups"]}
    assert groups["lr_lora"]["initial_lr"] == 1e-9 and groups["lr_score"]["initial_lr"] == 0.02
    moved = [read_checkpoint(file)["state_dict"] for file in (checkpoint, tmp_path / "checkpoints" / "last.ckpt")]
    lora = [name for name in moved[0] if ".lora_" in name]
    assert all(torch.allclose(moved[0][name], moved[1][name], atol=1e-7, rtol=0) for name in lora)
    assert not torch.equal(*(state["compressor.weights.saliency"] for state in moved))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--model.lora_rank=8",),
            "model.lora_rank: is 8, and the checkpoint was trained with 2; leave the option out",
        ),
        (("--ckpt_path=nowhere.ckpt",), "nowhere.ckpt: ckpt_path: no such checkpoint"),
        (("--ckpt_path=README.md",), "README.md: ckpt_path: is damaged, or no checkpoint of train.py"),
        (("--ckpt_path=best",), "ckpt_path: is 'best', and the run monitored nothing"),
        ((), "trainer.max_steps: is 4, and the checkpoint has done 4: set more to train on, or export it"),
    ],
)
def test_what_contradicts_a_checkpoint_is_refused_in_one_line(
    run: Path,
    options: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    last = (f"--trainer.default_root_dir={run}", "--ckpt_path=last")
    assert run_script(monkeypatch, "train.py", "fit", "--config", run / CONFIG_FILE, *last, *options) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and message in said


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("preset", "paper", "model.preset: is 'paper', and the checkpoint was trained with 'context'"),
        (
            "trainable",
            ("budgets",),
            "model.trainable: is ['budgets'], and the checkpoint was trained with ['budgets', 'gains'",
        ),
        (
            "lora_targets",
            ["v_proj"],
            "model.lora_targets: is ['v_proj'], and the checkpoint was trained with ['q_proj'",
        ),
        ("lora_alpha", 3.0, "model.lora_alpha: is 3.0, and the checkpoint was trained with None"),
        ("ratio_min", 0.05, "model.ratio_min: is 0.05, and the checkpoint was trained with 0.02"),
    ],
)
def test_options_that_were_trained_under_are_fixed(name: str, value: Any, message: str) -> None:
    saved = dict(CalibrationModule().hparams)
    for ended, fixed in ((None, name != "ratio_min"), (2, True)):
        checkpoint = {"hyper_parameters": saved, TRAINING: {"low_ratio_ended": ended}}
        check_fixed({**saved, "lora_alpha": 32.0, "lr_lora": 1.0, "compression": {}}, checkpoint)  # all the same
        if fixed:
            with pytest.raises(InputError, match=re.escape(message)):
                check_fixed({**saved, name: value}, checkpoint)
        else:
            check_fixed({**saved, name: value}, checkpoint)


def test_the_module_refuses_another_checkpoint_too(run: Path, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.lora_rank: is 16, and the checkpoint was trained with 2"):
        fit(cache, tmp_path, resume=run / "checkpoints" / "step-2.ckpt")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0"}, tmp_path / "other.ckpt")
    with pytest.raises(InputError, match=r"ckpt_path: is no checkpoint of train\.py"):
        fit(cache, tmp_path, resume=tmp_path / "other.ckpt")
    loaded = CalibrationModule.load_from_checkpoint(find_checkpoint("last", run / "checkpoints"), weights_only=True)
    export = KVCompressor.from_pretrained(run / "export")
    assert all(
        torch.equal(value, loaded.weights.state_dict()[name]) for name, value in weights_of(export).state_dict().items()
    )
    exported = lora_of(loaded.exported())
    assert all(torch.equal(value, exported[name]) for name, value in lora_of(export).items())
    loaded.teardown("fit")


def test_a_finished_run_goes_on_with_more_steps(cache: Path, tmp_path: Path) -> None:
    """Each step once, under the schedule of the longer training; what the low-ratio stage learned stays."""
    options: dict[str, Any] = {"low_ratio_share": 0.5, "lora_targets": ("q_proj",)}
    first = fit(cache, tmp_path, **options)
    rates = Rates()
    module = fit(cache, tmp_path, steps=6, resume=tmp_path / "step-step=4.ckpt", also=[rates], **options)
    assert list(rates.seen) == [4, 5] and module.global_step == module.schedule.steps == 6
    assert module.schedule.low_ratio_steps == first.schedule.low_ratio_steps
    for step, seen in rates.seen.items():
        assert seen["lr_lora"] == pytest.approx(2e-3 * module.schedule.rate(step))
    before, after = trained(first), trained(module)
    assert not torch.equal(before["compressor.weights.saliency"], after["compressor.weights.saliency"])
    kept = [name for name in before if name.startswith("compressor.low_ratio_weights.")]
    assert kept and all(torch.equal(before[name], after[name]) for name in kept)
    with pytest.raises(InputError, match=r"trainer\.max_steps: is 6, and the checkpoint has done"):
        fit(cache, tmp_path, steps=6, resume=tmp_path / "step-step=6.ckpt", **options)
