"""Calibration through a real Trainer on the packaged AV-LLM: what it trains, saves, resumes and exports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from acckv import InputError, KVCompressor
from lightning_modules.calibration.config import Divergence
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.losses import divergence, feature_loss
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.calibration.schedule import Schedule
from tests.calibration.runs import clip_data, fit, moved_weights, quiet_trainer, trained
from tests.learned import lora_of
from tests.paths import ROOT


@pytest.mark.parametrize(
    "options", [{}, {"low_ratio_share": 0.5}, {"low_ratio_share": 0.25}], ids=["", "between", "within"]
)
def test_resume_is_exact(cache: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    whole = fit(cache, tmp_path / "whole", **options)
    fit(cache, tmp_path / "cut", stop=2, **options)
    checkpoint = tmp_path / "cut" / "step-step=2.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    kinds = ("compressor.weights.", "compressor.low_ratio_weights.")
    assert state and all(name.startswith(kinds) or ".lora_" in name for name in state)
    resumed = fit(cache, tmp_path / "cut", resume=checkpoint, **options)
    expected, found = trained(whole), trained(resumed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "export").rglob("*.safetensors")]
    assert len(files) == (4 if options else 2)
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file


class Fail(Callback):
    """Raises after a step."""

    def on_train_batch_end(self, *args: Any) -> None:
        raise RuntimeError("the disk is full")


def test_a_run_that_fails_leaves_nothing_behind(cache: Path, tmp_path: Path) -> None:
    """The session is closed; a checkpoint of the moment holds LoRA all the same."""
    shadowed = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    module = CalibrationModule()
    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=[OnExceptionCheckpoint(tmp_path), Fail()])
    with pytest.raises(RuntimeError, match="the disk is full"):
        trainer.fit(module, clip_data(cache, questions_per_clip=1))
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == shadowed
    assert module.live.attached is None and not any(".lora_" in name for name, _ in module.named_modules())
    with pytest.raises(InputError, match="session: is closed"):
        module.live.prefill(input_ids=torch.tensor([[1]]))
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["state_dict"]
    assert any(".lora_" in name for name in saved)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_scope": "all"},
        {"lora_rank": 0, "preset": "paper", "head_budgets": "learned"},
        {"when": "prompt", "preset": "paper", "head_budgets": "joint"},
        {"compression": {"integration": True}, "divergence": "reverse", "feature_loss": "hidden"},
        {"lora_targets": ("q_proj", "v_proj"), "feature_loss": "attention", "full_cache_probability": 0.0},
    ],
    ids=["scope-all", "weights-only", "prompt", "hidden", "attention"],
)
def test_variants_train_and_export(cache: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """ExportCompressor compares live and reloaded answers, and raises where they differ."""
    module = fit(cache, tmp_path, steps=2, **options)
    moved = moved_weights(module)
    assert "layer_budget" in moved and "saliency" in moved
    assert ("head_budget" in moved) == (options.get("head_budgets") == "learned")
    assert (tmp_path / "export" / "adapter").exists() == (options.get("lora_rank") != 0)


def test_only_the_groups_that_learn_move(cache: Path, tmp_path: Path) -> None:
    module = fit(cache, tmp_path, steps=2, trainable=("budgets", "redundancy"), lora_rank=0)
    assert moved_weights(module) == {"layer_budget", "modality_budget", "redundancy"}
    with pytest.raises(InputError, match=r"model\.trainable: 'head' is not one of budgets, "):
        CalibrationModule(trainable=("head",))
    with pytest.raises(InputError, match=r"model\.trainable: is empty"):
        CalibrationModule(trainable=(), lora_rank=0)


def test_losses() -> None:
    """Both divergences against their sums, and the difference of layers as a share."""
    teacher, student, weight = torch.randn(5, 7), torch.randn(5, 7), torch.rand(5)
    p, q = teacher.softmax(-1), student.softmax(-1)
    pairs: dict[Divergence, tuple[torch.Tensor, torch.Tensor]] = {"forward": (p, q), "reverse": (q, p)}
    for kind, (one, other) in pairs.items():
        expected = ((one * (one / other).log()).sum(-1) * weight).sum() / weight.sum()
        assert divergence(teacher, student, weight, kind) == pytest.approx(float(expected), abs=1e-5)
    layers = torch.randn(2, 5, 4)
    twice = torch.stack([2 * layers[0], layers[1]])
    assert feature_loss(layers, twice, torch.tensor(3.0)) == pytest.approx(0.5)
    other = torch.randn(1, 5, 4)
    share = (other - layers[:1]).square().sum() / layers[:1].square().sum()
    assert feature_loss(layers[:1], other, torch.tensor(3.0)) == pytest.approx(float(share))


def test_ratios_are_drawn_by_number() -> None:
    module = CalibrationModule(ratio_min=0.02, ratio_max=0.5, full_cache_probability=0.25)
    schedule = Schedule(module.options, 400)
    drawn = [schedule.ratio(number) for number in range(400)]
    assert drawn[:3] == [schedule.ratio(number) for number in range(3)]
    assert 60 < drawn.count(1.0) < 140
    rest = [ratio for ratio in drawn if ratio < 1]
    assert 0.02 <= min(rest) < 0.022 and 0.3 < max(rest) <= 0.5
    assert sorted(rest)[len(rest) // 2] < 0.1  # low ones more often than the geometric mean, 0.1


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match=r"model\.ratio_min"):
        CalibrationModule(ratio_min=0.5, ratio_max=0.1)
    with pytest.raises(InputError, match=r"model\.feature_loss_min_ratio: -1 is not at least 0"):
        CalibrationModule(feature_loss_min_ratio=-1)
    with pytest.raises(InputError, match=r"data\.train_questions: is needed"):
        AVDataModule(source="music_avqa")
    with pytest.raises(InputError, match=r"lora_targets: 'qkv' names no linear layer of the decoder"):
        CalibrationModule(lora_targets=("qkv",)).configure_model()


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL in the middle, resume with --ckpt_path: the weights of an uninterrupted run."""

    def command(name: str, *more: str) -> list[str]:
        out = tmp_path / name
        return [
            *(sys.executable, "train.py", "--config", "configs/calib.yaml", "--trainer.max_steps=12"),
            *("--data.train_clips=8", "--data.validation_clips=2", "--data.batch_size=2"),
            *(f"--data.cache_dir={tmp_path / 'clips'}", f"--trainer.default_root_dir={out}"),
            *("--checkpoint.every_n_train_steps=2", "--trainer.val_check_interval=100", *more),
        ]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run: dict[str, Any] = {"cwd": ROOT, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command("whole"), check=True, **run)
    process = subprocess.Popen(command("cut"), **run)
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 240
    while not last.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists() and not (tmp_path / "cut" / "export").exists()
    reached = torch.load(last, weights_only=True)["global_step"]
    assert 0 < reached < 12
    subprocess.run(command("cut", f"--ckpt_path={last}"), check=True, **run)
    exports = [KVCompressor.from_pretrained(tmp_path / name / "export") for name in ("whole", "cut")]
    for name, value in exports[0].state_dict().items():
        assert torch.equal(value, exports[1].state_dict()[name]), name
    for name, value in lora_of(exports[0]).items():
        assert torch.equal(value, lora_of(exports[1])[name]), name
