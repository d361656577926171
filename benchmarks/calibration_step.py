"""What a calibration step costs against a plain LoRA fine-tuning step on the same batch.

    python -m benchmarks.calibration_step --output runs/benchmarks/calibration_step.json

Both start from the same encoded clips. The fine-tuning step runs context and turns with gradients through LoRA on all
tokens and a cross entropy; the calibration step (LoRA scope 'after') shares one prefill without gradients between
teacher and student. Steps alternate, so that a drift of the machine meets both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track

from acckv.report.files import whole_file
from lightning_modules.calibration import CalibrationModule
from lightning_modules.datamodule import AVDataModule, CalibrationBatch


def calibration_step(module: CalibrationModule, batch: CalibrationBatch) -> None:
    """One distillation step of scope 'after', soft selection, at ratio 0.1."""
    module.distill(batch, 0.1, 0.2).loss.backward()


def fine_tuning_step(module: CalibrationModule, batch: CalibrationBatch) -> None:
    """One plain LoRA step on the same tokens with the full cache."""
    prefill = module.live.prefill(batch.embedded, "none", gradients=True)
    logits = module._logits(prefill, None, batch.turns)
    counted = batch.turns.weight[:, :-1] > 0
    F.cross_entropy(logits[:, :-1][counted], batch.turns.ids[:, 1:][counted]).backward()


def seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def prepared(scope: str, data: AVDataModule) -> tuple[CalibrationModule, CalibrationBatch]:
    """A module and a batch whose clips have been encoded."""
    module = CalibrationModule(lora_scope=scope)  # type: ignore[arg-type]
    module.configure_model()
    with torch.no_grad():
        module.distill(next(iter(data.val_dataloader())), 0.1, None)
    return module, next(iter(data.val_dataloader()))


def measure(repeats: int) -> dict[str, Any]:
    """Median seconds of both steps and the median of the ratios of neighbouring ones."""
    data = AVDataModule(train_clips=8, validation_clips=8, batch_size=8)
    data.setup()
    plain, batch = prepared("all", data)
    plain.teardown("fit")
    calibrated, _ = prepared("after", data)
    plain_session = plain.compressor(plain.model, plain.processor)
    times: dict[str, list[float]] = {"calibration": [], "fine_tuning": []}
    for repeat in track(range(repeats + 1), description="steps"):
        calibration = seconds(lambda: calibration_step(calibrated, batch))
        with plain_session as plain.session:
            fine_tuning = seconds(lambda: fine_tuning_step(plain, batch))
        if repeat:  # the first pair warms up
            times["calibration"].append(calibration)
            times["fine_tuning"].append(fine_tuning)
    calibrated.teardown("fit")
    ratios = [one / other for one, other in zip(times["calibration"], times["fine_tuning"], strict=True)]
    return {
        "format": 1,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "calibration_seconds": statistics.median(times["calibration"]),
        "fine_tuning_seconds": statistics.median(times["fine_tuning"]),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=10, help="pairs of steps that are measured")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/calibration_step.json"), help="JSON file")
    options = parser.parse_args()
    result = measure(options.repeats)
    with whole_file(options.output) as file:
        file.write_text(json.dumps(result, indent=2) + "\n")
    low, high = result["ratio_range"]
    Console().print(
        f"a calibration step takes {result['ratio']:.2f} of a LoRA fine-tuning step "
        f"(median of {options.repeats}, {low:.2f} to {high:.2f}; {result['threads']} threads)"
    )


if __name__ == "__main__":
    main()
