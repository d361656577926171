"""All ratios start from what the lowest learned, and options that do not go with that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer

from acckv import InputError, KVCompressor
from lightning_modules.calibration.config import CalibrationConfig
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.calibration.schedule import Schedule
from tests.calibration.runs import fit, trained
from tests.learned import Learned, lora_of, weights_of


class NoteTrained(Callback):
    """Copies of what is trained before each step, and the ratios that were drawn."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.ratios: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        self.before.append({name: value.clone() for name, value in trained(module).items()})
        self.ratios.append(float(trainer.callback_metrics["train/ratio"]))


def test_all_ratios_start_from_what_the_lowest_learned(cache: Path, tmp_path: Path) -> None:
    """The lowest alone at first; then that is kept, LoRA included, and the others go on from it."""
    noted = NoteTrained()
    options: dict[str, Any] = {"low_ratio_share": 0.5, "full_cache_probability": 0.0, "warmup": 1}
    module = fit(cache, tmp_path, also=[noted], ratio_min=0.1, ratio_max=0.3, **options)
    assert noted.ratios[:2] == [pytest.approx(0.1)] * 2 and all(0.15 <= ratio <= 0.3 for ratio in noted.ratios[2:])
    loaded = KVCompressor.from_pretrained(tmp_path / "export")
    assert loaded.low_ratio is not None and loaded.low_ratio.below == pytest.approx(0.15)

    def held(learned: Learned) -> dict[str, torch.Tensor]:
        values = {f"compressor.weights.{name}": value for name, value in weights_of(learned).state_dict().items()}
        return values | lora_of(learned)

    def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(one[name], two[name]) for name in one)

    low = loaded.low_ratio
    assert held(loaded).keys() == noted.before[0].keys()
    assert same(held(low), noted.before[2]) and not same(noted.before[1], noted.before[2])
    last = {
        name: value for name, value in trained(module).items() if not name.startswith("compressor.low_ratio_weights.")
    }
    assert same(last, held(loaded)) and not same(held(loaded), held(low))
    assert not same({name: lora_of(low)[name] for name in lora_of(loaded)}, lora_of(loaded))
    with loaded(module.model, module.processor, lora_mode="separate") as session:
        attached = session.attached
        assert attached is not None
        with session.adapted(0.1):
            assert same(attached.tensors(low_ratio=True), lora_of(low)) and attached.is_low
        assert same(attached.tensors(), lora_of(loaded)) and not attached.is_low


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_scope": "all"}, "model.low_ratio_share: has an adapter of its own"),
        ({"ratio_min": 0.2, "ratio_max": 0.3}, "model.ratio_max: leaves no ratio above 1.5 times ratio_min"),
        ({"temperature_after_low_ratio": 0.001}, "model.temperature_after_low_ratio: is below temperature_end"),
    ],
)
def test_options_that_do_not_go_with_a_low_ratio_stage(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CalibrationModule(low_ratio_share=0.5, **options)
    CalibrationModule(**options)


@pytest.mark.parametrize(
    ("step", "low", "after", "progress", "rate"),
    [(0, True, False, 0, 1), (3, True, False, 0.5, 0.525), (6, False, True, 0, 1), (10, False, True, 1, 0.05)],
)
def test_stages(step: int, low: bool, after: bool, progress: float, rate: float) -> None:
    options = CalibrationConfig(low_ratio_share=0.6, warmup=0)
    schedule = Schedule(options, 10)
    assert (schedule.in_low_ratio_stage(step), schedule.after_low_ratio_stage(step)) == (low, after)
    assert schedule.ends_low_ratio_stage(step) == (step == 6)
    assert schedule.progress(step) == progress and schedule.rate(step) == pytest.approx(rate)
    start = 0.5 if low else 0.1
    cooled = min(progress / 0.6, 1.0)
    assert schedule.temperature(step) == pytest.approx(start ** (1 - cooled) * 0.005**cooled)
    assert schedule.ratio(step) in (0.02, 1.0) if low else schedule.ratio(step) >= 0.03
    alone = Schedule(CalibrationConfig(), 10)
    assert not alone.in_low_ratio_stage(step) and not alone.after_low_ratio_stage(step)
    assert alone.progress(step) == step / 10
    endless = Schedule(CalibrationConfig(), float("inf"))
    assert endless.progress(step) == 0 and endless.rate(step) == (step + 1) / 20
    with pytest.raises(InputError, match=r"model.low_ratio_share: is a share of a training that has no end"):
        Schedule(options, float("inf"))
