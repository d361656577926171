"""Larger than one process and one batch: every way to spread a step gives the step of the large batch."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from safetensors.torch import load_file
from transformers.modeling_layers import GradientCheckpointingLayer

from acckv import KVCompressor
from lightning_modules.calibration.dataset import StepSampler
from lightning_modules.calibration.export import ExportCompressor
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.cli.train import main
from tests.calibration.runs import clip_data, quiet_trainer
from tests.paths import ROOT


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("clips")
    clip_data(root, train_clips=4).prepare_data()
    return root


def fit(
    cache: Path, folder: Path, batch_size: int, steps: int = 2, options: dict[str, Any] | None = None, **trainer: Any
) -> CalibrationModule:
    torch.manual_seed(0)
    module = CalibrationModule(**(options or {}))
    data = clip_data(cache, train_clips=4, batch_size=batch_size, questions_per_clip=3)
    settings = {"max_steps": steps, "max_epochs": 1, "limit_val_batches": 0, "gradient_clip_val": 1.0}
    settings |= {"enable_checkpointing": False, "use_distributed_sampler": False}
    quiet_trainer(folder, **{**settings, **trainer}).fit(module, data)
    return module


class Curve(Callback):
    """The loss of each step, and the gradients of the first, as the optimiser saw them."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step > len(self.losses):
            self.losses.append(float(trainer.callback_metrics["loss"]))
            if not self.gradients:
                named = pl_module.named_parameters()
                self.gradients = {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys() and one
    for name, value in one.items():
        assert torch.allclose(value, other[name], rtol=0, atol=tolerance), name


def test_accumulated_batches_equal_one_large_batch(cache: Path, tmp_path: Path) -> None:
    """Clips, drawn questions, ratios, weights of tokens, clipping and schedule; matched outputs are scaled by batch."""
    runs = {batch_size: Curve() for batch_size in (4, 2)}
    for batch_size, curve_ in runs.items():
        options = {"feature_loss": None, "calibrate_for": "mixed", "repeated_words": True}
        module = fit(
            cache, tmp_path, batch_size, options=options, callbacks=[curve_], accumulate_grad_batches=4 // batch_size
        )
        assert module.trainer.global_step == module.trainer.estimated_stepping_batches == 2
    assert_close(runs[4].gradients, runs[2].gradients, 1e-5)
    assert max(gradient.abs().max() for gradient in runs[4].gradients.values()) > 1e-2
    assert len(runs[4].losses) == 2 and runs[4].losses == pytest.approx(runs[2].losses, abs=1e-5)


def test_sampler_of_accumulated_batches_and_epochs() -> None:
    large = list(StepSampler(5, 4, 3, lambda: 0, seed=1))
    parts = list(StepSampler(5, 2, 6, lambda: 0, seed=1, accumulate=2))
    assert [number for number, _ in parts] == [0, 0, 1, 1, 2, 2]
    assert [(step, parts[2 * step][1] + parts[2 * step + 1][1]) for step in range(3)] == large
    second = list(StepSampler(5, 2, 6, lambda: 6, seed=1))
    assert len(second) == 6 and [number for number, _ in second] == list(range(6, 12))
    assert list(StepSampler(5, 2, 6, lambda: 10, seed=1)) == second[4:]


def test_steps_of_several_epochs_agree_with_the_schedule(cache: Path, tmp_path: Path) -> None:
    module = fit(cache, tmp_path, 2, steps=-1, max_epochs=2, options={"lora_rank": 0})
    assert module.trainer.global_step == module.trainer.estimated_stepping_batches == 4
    assert module.schedule.progress(module.global_step) == 1.0
    assert module.schedule.temperature(module.global_step) == pytest.approx(module.options.temperature_end)


def test_gradient_checkpointing_gives_the_same_step(cache: Path, tmp_path: Path) -> None:
    plain, checkpointed = Curve(), Curve()
    options = {"calibrate_for": "mixed", "feature_loss_min_ratio": 0}
    fit(cache, tmp_path, 2, options=options, callbacks=[plain])
    options["gradient_checkpointing"] = True
    saving = fit(cache, tmp_path, 2, options=options, callbacks=[checkpointed])
    layers = [module for module in saving.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    active = [module for module in layers if module.training and getattr(module, "gradient_checkpointing", False)]
    assert len(active) == len(saving.live.adapter.decoder.layers)
    assert not any(child.training for module in active for child in module.children()), "dropout stays off"
    assert_close(plain.gradients, checkpointed.gradients, 1e-5)
    assert len(plain.losses) == 2 and plain.losses == pytest.approx(checkpointed.losses, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "trainer"),
    [({"dtype": "bfloat16"}, {}), ({}, {"precision": "bf16-mixed"})],
    ids=["model", "mixed"],
)
def test_bfloat16_trains_and_exports(
    cache: Path, tmp_path: Path, options: dict[str, Any], trainer: dict[str, Any]
) -> None:
    """The export answers as the live module does: ExportCompressor raises where it does not."""
    export = ExportCompressor(str(tmp_path / "export"), new_tokens=4)
    module = fit(cache, tmp_path, 2, options=options, callbacks=[export], **trainer)
    assert torch.isfinite(module.trainer.callback_metrics["kl"])
    weights = KVCompressor.from_pretrained(tmp_path / "export").weights
    assert weights is not None
    assert all(torch.isfinite(value).all() for value in weights.parameters())
    assert weights.layer_budget.dtype == torch.float32 and weights.layer_budget.abs().max() > 0


def test_the_learning_rate_finder_refuses(cache: Path, tmp_path: Path) -> None:
    """It sweeps one rate for all groups of weights, ours have four: better no answer than that one."""
    with pytest.raises(AttributeError, match="learning rate finder"):
        fit(cache, tmp_path, 2, callbacks=[LearningRateFinder()])


def command(cache: Path, folder: Path, *more: str) -> list[str]:
    return [
        *("train.py", "--config", str(ROOT / "configs" / "calib.yaml"), "--data.train_clips=4"),
        *("--data.validation_clips=2", f"--data.cache_dir={cache}", f"--trainer.default_root_dir={folder}"),
        *("--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false", "--evaluation.clips=0"),
        *("--trainer.enable_model_summary=false", "--export.new_tokens=2", *more),
    ]


def curve(folder: Path, column: str) -> list[float]:
    with (folder / "logs" / "version_0" / "metrics.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row.get(column)]


SHORT = ("--trainer.max_steps=2", "--trainer.limit_val_batches=0", "--model.feature_loss_min_ratio=0")
#: A step of questions, then one of contexts fed in again.
MIXED = "--model.calibrate_for=mixed"
FSDP = (
    *(
        "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
        "--trainer.strategy.data_parallel_size=2",
    ),
    *("--trainer.strategy.tensor_parallel_size=1", "--trainer.strategy.process_group_backend=gloo"),
    "--trainer.strategy.save_distributed_checkpoint=false",
    "--data.cache=embeddings",
)


@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(("--trainer.strategy=ddp_fork",), id="ddp"),
        pytest.param(FSDP, id="fsdp", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one_with_the_doubled_batch(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: tuple[str, ...]
) -> None:
    """On gloo: the same losses, the same export, which answers as the live module does (or training raises)."""
    log = (tmp_path / "log").open("w+")
    two = subprocess.Popen(
        [
            sys.executable,
            *command(cache, tmp_path / "two", *SHORT, MIXED, *strategy),
            "--trainer.devices=2",
            "--data.batch_size=2",
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    monkeypatch.setattr(sys, "argv", command(cache, tmp_path / "one", *SHORT, MIXED, "--data.batch_size=4"))
    main()
    assert two.wait(timeout=500) == 0, (tmp_path / "log").read_text()
    assert curve(tmp_path / "one", "train/repeats_context") == [0.0, 1.0]
    for column in ("kl", "loss", "train/ratio"):
        one, both = (curve(tmp_path / name, column) for name in ("one", "two"))
        assert len(one) == 2 and both == pytest.approx(one, abs=1e-4)
    exports = [load_file(tmp_path / name / "export" / "model.safetensors") for name in ("one", "two")]
    # Where a gradient is nothing but rounding, Adam makes whole steps of it: saliency_bias, which moves all scores
    # alike, and a weight here and there.
    alone, beside = (
        torch.cat([value.flatten() for name, value in sorted(e.items()) if name != "saliency_bias"]) for e in exports
    )
    assert ((alone - beside).abs() < 1e-3).float().mean() > 0.995


@pytest.mark.slow
def test_two_processes_keep_the_low_ratios_alike(cache: Path, tmp_path: Path) -> None:
    """A step of each stage: the same losses, and what was kept after the first is the same."""
    stages = ["--model.low_ratio_share=0.5", "--model.full_cache_probability=0"]
    kinds = {
        "one": ["--data.batch_size=4"],
        "two": ["--data.batch_size=2", "--trainer.devices=2", "--trainer.strategy=ddp"],
    }
    for name, options in kinds.items():
        given = [sys.executable, *command(cache, tmp_path / name, *SHORT, *stages, *options)]
        done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    for column in ("kl", "loss", "train/ratio"):
        one, both = (curve(tmp_path / name, column) for name in kinds)
        assert len(one) == 2 and both == pytest.approx(one, abs=1e-4)
    assert one[0] == pytest.approx(0.02) and one[1] >= 0.03
    kept = [load_file(tmp_path / name / "export" / "low_ratio" / "model.safetensors") for name in kinds]
    assert kept[0]["layer_budget"].abs().max() > 5e-4
    assert_close({"": kept[0]["layer_budget"]}, {"": kept[1]["layer_budget"]}, 1e-4)


@pytest.mark.slow
def test_a_split_model_keeps_no_prefills(cache: Path, tmp_path: Path) -> None:
    split = [option for option in FSDP if "data" not in option]
    options = command(cache, tmp_path, *SHORT, *split, "--trainer.devices=1", "--trainer.strategy.data_parallel_size=1")
    done = subprocess.run([sys.executable, *options], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "data.cache: is 'prefill'" in done.stderr, done.stderr


def test_early_stopping_on_validation_kl(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The snippet of the README, with an improvement that no training can make."""
    stop = [
        *("--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/kl"),
        *("--trainer.callbacks.patience=1", "--trainer.callbacks.min_delta=100"),
        *(
            "--trainer.max_steps=20",
            "--trainer.val_check_interval=1",
            "--data.batch_size=2",
            "--data.questions_per_clip=1",
        ),
    ]
    monkeypatch.setattr(sys, "argv", command(cache, tmp_path, *stop))
    main()
    assert len(curve(tmp_path, "kl")) == 2
    assert (tmp_path / "export" / "config.json").is_file()
    assert "before the gates were hard" in (tmp_path / "report.md").read_text()
