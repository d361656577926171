"""What a calibration step costs against a plain LoRA fine-tuning step on the same batch.

    python -m benchmarks.calibration_step --output runs/benchmarks/calibration_step.json

The fine-tuning step runs context and turns with gradients through LoRA on all tokens and a cross entropy. The
calibration step of scope 'after' shares one prefill without gradients between teacher and student. With `data.cache:
prefill` the teacher is asked every question on a clip's first visit; on later ones that prefill and what the teacher
said are kept. Scope 'all' prefills once more, with gradients. Unless a line says otherwise all adapt the same layers at
the same rank; all start from encoded clips. Steps take turns, so that a drift of the machine meets all.

Memory is what autograd holds for the backward pass at its start, the parameters left out: the peak of a step but for
what its operations use and drop. (An operating system's figures say little here: an allocator keeps what was freed.)
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from acckv.data.synthetic.clips import VARIANTS, ClipSettings, default_root, video_folder, write_clips
from acckv.io.files import whole_file
from benchmarks.study_variants import KL_ALONE, SHORT, STUDIES
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.dataset import CalibrationBatch
from lightning_modules.calibration.module import CalibrationModule

FORMAT = 4
FINE_TUNING = "LoRA fine-tuning"
OPTIONS = {variant.name: variant.options for variants in STUDIES.values() for variant in variants}
#: Variants of the generated clips, by how many times as long as those of training they are.
LENGTHS = {1: "plain", 2: "long2", 4: "long4"}


@dataclass(frozen=True)
class Row:
    """One kind of step on one kind of batch.

    Attributes:
        step: what it is; variant: of `benchmarks.study_variants` that is trained by such steps, if there is one.
        clip_seconds: length of a clip; questions: on each; tokens: of context and of turns, a clip.
        seconds: median; time: median of the ratios to the fine-tuning step beside it, time_range: least and most.
        megabytes: held for the backward pass; memory: as a share of the fine-tuning step's.
    """

    step: str
    variant: str | None
    clip_seconds: int
    questions: int
    tokens: tuple[int, int]
    seconds: float
    time: float
    time_range: tuple[float, float]
    megabytes: float
    memory: float


Step = Callable[[CalibrationModule, CalibrationBatch], Tensor]


@dataclass(frozen=True)
class Kind:
    """What is measured: a variant of the study, options of the module, what a step computes, on which batch."""

    variant: str | None
    options: dict[str, Any]
    step: Step
    batch: CalibrationBatch


def calibration_loss(module: CalibrationModule, batch: CalibrationBatch) -> Tensor:
    """One distillation step with gates, at ratio 0.1."""
    return module.distill(batch, 0.1, 0.05).loss


def fine_tuning_loss(module: CalibrationModule, batch: CalibrationBatch) -> Tensor:
    """One plain LoRA step on the same tokens with the full cache."""
    prefill = module.live.prefill(batch.embedded, "none", gradients=True)
    logits = module._logits(prefill, None, batch.turns)
    return F.cross_entropy(logits, batch.turns.ids.flatten()[batch.turns.counted + 1])


def measured(step: Step, module: CalibrationModule, batch: CalibrationBatch) -> tuple[float, float]:
    """Seconds of forward and backward; megabytes that autograd held in between."""
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that is saved as it is would hold its own graph for ever

    with saved_tensors_hooks(note, lambda tensor: tensor):
        step(module, batch)
    for parameter in module.parameters():
        held.pop(parameter.untyped_storage().data_ptr(), None)
    start = time.perf_counter()
    step(module, batch).backward()
    return time.perf_counter() - start, sum(held.values()) / 1e6


def batches(questions: int, clips: int, length: int = 1) -> tuple[CalibrationBatch, CalibrationBatch]:
    """The same encoded clips on a first visit, and on one that starts from what is kept of it."""
    variant = LENGTHS[length]
    folder = default_root() if variant == "plain" else default_root() / "variants" / variant
    file = write_clips(folder, "validation", clips, **VARIANTS[variant])
    data = AVDataModule(
        source="music_avqa",
        train_questions=str(file),
        validation_questions=str(file),
        video_root=str(video_folder(file)),
        batch_size=clips,
        questions_per_clip=questions,
        cache="prefill",
    )
    data.setup()
    module = CalibrationModule()
    module.configure_model()
    visit = next(iter(data.val_dataloader()))
    with torch.no_grad():
        embedded = module.live.prefill(rows="none", **visit.inputs).embedded
        module.distill(visit, 0.1, None)
    module.teardown("fit")
    return replace(visit, inputs={}, embedded=embedded), next(iter(data.val_dataloader()))


def measure(questions: int, clips: int, repeats: int, length: int = 1) -> list[Row]:
    """All kinds of step on one batch of clips that are `length` times as long as those of training."""
    first, later = batches(questions, clips, length)
    kinds = {
        FINE_TUNING: Kind(None, {"lora_scope": "all"}, fine_tuning_loss, first),
        "calibration, first visit": Kind(None, {}, calibration_loss, first),
        "calibration, later visits": Kind(SHORT, {}, calibration_loss, later),
        "calibration, later visits, KL alone": Kind(KL_ALONE, OPTIONS[KL_ALONE], calibration_loss, later),
        "calibration, later visits, LoRA on attention alone": Kind(
            "attention", OPTIONS["attention"], calibration_loss, later
        ),
        "calibration, later visits, weights alone": Kind("rank0", OPTIONS["rank0"], calibration_loss, later),
        "calibration, scope 'all'": Kind("all", OPTIONS["all"], calibration_loss, first),
    }
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    seconds = length * ClipSettings.slots
    for repeat in track(range(repeats + 1), description=f"{seconds} s, {questions or 'all'} questions a clip"):
        for name, kind in kinds.items():
            torch.manual_seed(0)
            module = CalibrationModule(**kind.options)
            module.configure_model()
            result = measured(kind.step, module, kind.batch)
            module.teardown("fit")
            if repeat:  # the first round warms up
                seen[name].append(result)
    context, turns = first.embedded.embeds.shape[1], first.turns.ids.shape[1]  # type: ignore[union-attr]
    rows = []
    for name, results in seen.items():
        ratios = [one[0] / other[0] for one, other in zip(results, seen[FINE_TUNING], strict=True)]
        megabytes = statistics.median(size for _, size in results)
        rows.append(
            Row(
                name,
                kinds[name].variant,
                seconds,
                int(first.turns.turn.max()) + 1,
                (context, turns),
                statistics.median(took for took, _ in results),
                statistics.median(ratios),
                (min(ratios), max(ratios)),
                megabytes,
                megabytes / statistics.median(size for _, size in seen[FINE_TUNING]),
            )
        )
    return rows


def table(rows: list[Row]) -> Table:
    """A line a kind of step and batch."""
    made = Table(title=f"against a {FINE_TUNING} step on the same batch", box=box.SIMPLE_HEAD)
    for name in ("step", "seconds a clip", "questions a clip", "tokens", "time", "memory"):
        made.add_column(name, justify="left" if name == "step" else "right")
    for row in rows:
        low, high = row.time_range
        context, turns = row.tokens
        took = f"{row.time:.2f} ({low:.2f} to {high:.2f})"
        made.add_row(
            row.step, str(row.clip_seconds), str(row.questions), f"{context} + {turns}", took, f"{row.memory:.2f}"
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10, help="rounds that are measured")
    parser.add_argument("--clips", type=int, default=8, help="of a batch")
    parser.add_argument("--questions", default="0,4,1", help="on each clip, 0 for all; separated by commas")
    parser.add_argument("--lengths", default="1", help="of clips, times those of training: 1, 2, 4, by commas")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/calibration_step.json"), help="JSON file")
    given = parser.parse_args()
    lengths = [int(part) for part in given.lengths.split(",")]
    for length in lengths:
        if length not in LENGTHS:
            parser.error(f"--lengths: {length} is not one of {', '.join(map(str, LENGTHS))}")
    counts = [int(part) for part in given.questions.split(",")]
    rows = [row for length in lengths for count in counts for row in measure(count, given.clips, given.repeats, length)]
    values = {"format": FORMAT, "threads": torch.get_num_threads(), "repeats": given.repeats}
    with whole_file(given.output) as file:
        file.write_text(json.dumps({**values, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    Console(width=120).print(table(rows))


if __name__ == "__main__":
    main()
