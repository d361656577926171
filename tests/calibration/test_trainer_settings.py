"""Settings of the Trainer that a user may bring: right, refused in one line, or with a warning."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from acckv import InputError, KVCompressor
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.calibration.trainer_settings import check_trainer, freeze_precision
from tests.calibration.runs import clip_data, quiet_trainer
from tests.cli.test_configs import run_script
from tests.learned import lora_of, weights_of


def command(cache: Path, folder: Path, *options: str) -> list[str]:
    return [
        *("train.py", "--model.lora_targets=[q_proj]", "--data.train_clips=4", "--data.validation_clips=2"),
        *("--data.batch_size=2", "--data.questions_per_clip=1", f"--data.cache_dir={cache}", "--evaluation.clips=0"),
        *("--export.new_tokens=2", "--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.max_steps=2"),
        *(
            "--trainer.limit_val_batches=1",
            "--trainer.num_sanity_val_steps=0",
            "--trainer.check_val_every_n_epoch=null",
        ),
        *("--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={folder}", *options),
    ]


@pytest.mark.parametrize("precision", ["bf16-true", pytest.param("16-true", marks=pytest.mark.slow)])
def test_half_precision_is_that_of_the_frozen_model(
    precision: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is learned moves by steps that half precision would round away, and is exported as float32."""
    options = command(cache, tmp_path, f"--trainer.precision={precision}", "--model.lr_score=1e-5")
    with pytest.warns(UserWarning, match=f"{precision}: the frozen model is in b?float16 .* learned stays float32"):
        assert run_script(monkeypatch, *options) == 0
    export = KVCompressor.from_pretrained(tmp_path / "export")
    tensors = [*weights_of(export).state_dict().values(), *lora_of(export).values()]
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors)
    saliency = weights_of(export).saliency
    assert saliency.any() and not torch.equal(saliency, saliency.to(torch.bfloat16).float())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--trainer.precision=64-true",), "trainer.precision: is 64-true; take 32-true, "),
        (("--trainer.max_steps=0",), "no step was trained; raise trainer.max_steps"),
        pytest.param(
            ("--trainer.logger=WandbLogger",),
            "error: trainer: Requirement 'wandb",
            marks=pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is there"),
        ),
    ],
)
def test_settings_that_would_train_otherwise_than_asked_are_refused(
    options: tuple[str, ...],
    message: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_script(monkeypatch, *command(cache, tmp_path, *options)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "export").exists()


def test_one_half_precision_is_given() -> None:
    def config() -> Any:
        part = SimpleNamespace
        return part(trainer=part(precision="bf16-true"), model=part(dtype="float16"), data=part(dtype="float16"))

    with pytest.raises(InputError, match=r"is bf16-true, and model\.dtype is float16; give one"):
        freeze_precision(config(), {"dtype"})
    taken = config()
    with pytest.warns(UserWarning, match="the frozen model is in bfloat16"):
        freeze_precision(taken, set())
    assert (taken.trainer.precision, taken.model.dtype, taken.data.dtype) == ("32-true", "bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"overfit_batches": 1}, "overfit_batches"),
        ({"overfit_batches": 0.5}, "overfit_batches"),
        ({"limit_train_batches": 1}, "limit_train_batches"),
        ({"limit_train_batches": 0.5}, "limit_train_batches"),
        ({"limit_train_batches": 1.0}, None),
        ({"fast_dev_run": 2}, None),
    ],
)
def test_an_epoch_is_a_whole_one(settings: dict[str, Any], refused: str | None, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, **settings)
    if refused is None:
        check_trainer(trainer)
    else:
        with pytest.raises(InputError, match=rf"trainer\.{refused}: would end the training before its schedule does"):
            check_trainer(trainer)


def test_a_module_in_a_trainer_of_half_precision_is_refused(cache: Path, tmp_path: Path) -> None:
    trainer = quiet_trainer(tmp_path, precision="bf16-true", max_steps=2, enable_checkpointing=False)
    with pytest.raises(InputError, match=r"trainer\.precision: is bf16-true, .* take 32-true, and bfloat16 as"):
        trainer.fit(CalibrationModule(), clip_data(cache))


@pytest.mark.slow
def test_other_habits(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No logger, accumulated batches and a callback that may stop early; and a dry run, which leaves nothing."""
    assert run_script(monkeypatch, *command(cache, tmp_path / "dry", "--trainer.fast_dev_run=true")) == 0
    assert [path.name for path in (tmp_path / "dry").rglob("*") if path.is_file()] == []
    stopping = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/kl")
    habits = (
        "--trainer.logger=false",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.val_check_interval=2",
        *stopping,
    )
    assert run_script(monkeypatch, *command(cache, tmp_path / "run", *habits)) == 0
    assert (tmp_path / "run" / "export").is_dir()
