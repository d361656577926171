"""What a calibration step costs against a plain LoRA fine-tuning step on the same batch.

    python -m benchmarks.calibration_step --output runs/benchmarks/calibration_step.json

The fine-tuning step runs context and questions with gradients through LoRA on all tokens and a cross entropy. The
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from acckv.models.batching import DecoderInputs
from benchmarks.study_variants import KL_ALONE, SHORT, STUDIES
from lightning_modules.calibration.clip_cache import ClipCache, Kind
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.dataset import CalibrationBatch
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.calibration.teacher import answer_logits

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
        clip_seconds: length of a clip; questions: on each; tokens: of context and of questions, a clip.
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
Kept = Mapping[Kind, Sequence[Any]]
"""Of the clips of a batch, as a clip cache holds it."""


@dataclass(frozen=True)
class StepKind:
    """A kind of step: a variant of the study, options of the module, its loss, and what is kept of the clips."""

    variant: str | None
    options: dict[str, Any]
    step: Step
    kept: Kept


def calibration_loss(module: CalibrationModule, batch: CalibrationBatch) -> Tensor:
    """One distillation step with gates, at ratio 0.1."""
    return module.distill(batch, 0.1, 0.05).loss


def fine_tuning_loss(module: CalibrationModule, batch: CalibrationBatch) -> Tensor:
    """One plain LoRA step on the same tokens with the full cache."""
    embedded, questions = DecoderInputs.stack(module.clip_cache.get("embeddings", batch.clips)), batch.questions
    logits = answer_logits(module.live, module.live.prefill(embedded, "none", gradients=True), None, questions)
    return F.cross_entropy(logits, questions.ids.flatten()[questions.counted + 1])


def measured(kind: StepKind, module: CalibrationModule, batch: CalibrationBatch) -> tuple[float, float]:
    """Seconds of forward and backward; megabytes that autograd held in between."""
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that is saved as it is would hold its own graph for ever

    module.clip_cache = kept_of(batch, kind.kept)
    with saved_tensors_hooks(note, lambda tensor: tensor):
        kind.step(module, batch)
    for parameter in module.parameters():
        held.pop(parameter.untyped_storage().data_ptr(), None)
    module.clip_cache = kept_of(batch, kind.kept)
    start = time.perf_counter()
    kind.step(module, batch).backward()
    return time.perf_counter() - start, sum(held.values()) / 1e6


def kept_of(batch: CalibrationBatch, kept: Kept) -> ClipCache:
    """A clip cache in which this is kept: a first visit changes it."""
    cache = ClipCache("prefill")
    for kind, values in kept.items():
        cache.put(kind, batch.clips, values)
    return cache


def visits(questions: int, clips: int, length: int = 1) -> tuple[CalibrationBatch, Kept, Kept]:
    """A batch, its clips as they enter the decoder, and all that is kept of them after a first visit."""
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
    module.clip_cache = data.clip_cache
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        module.distill(batch, 0.1, None)
    module.teardown("fit")
    prefills, targets = (data.clip_cache.get(kind, batch.clips) for kind in ("prefills", "targets"))
    embedded = [prefill.embedded for prefill in prefills]
    return batch, {"embeddings": embedded}, {"embeddings": embedded, "prefills": prefills, "targets": targets}


def measure(questions: int, clips: int, repeats: int, length: int = 1) -> list[Row]:
    """All kinds of step on one batch of clips that are `length` times as long as those of training."""
    batch, first, later = visits(questions, clips, length)
    kinds = {
        FINE_TUNING: StepKind(None, {"lora_scope": "all"}, fine_tuning_loss, first),
        "calibration, first visit": StepKind(None, {}, calibration_loss, first),
        "calibration, later visits": StepKind(SHORT, {}, calibration_loss, later),
        "calibration, later visits, KL alone": StepKind(KL_ALONE, OPTIONS[KL_ALONE], calibration_loss, later),
        "calibration, later visits, LoRA on attention alone": StepKind(
            "attention", OPTIONS["attention"], calibration_loss, later
        ),
        "calibration, later visits, weights alone": StepKind("rank0", OPTIONS["rank0"], calibration_loss, later),
        "calibration, scope 'all'": StepKind("all", OPTIONS["all"], calibration_loss, first),
    }
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    seconds = length * ClipSettings.slots
    for repeat in track(range(repeats + 1), description=f"{seconds} s, {questions or 'all'} questions a clip"):
        for name, kind in kinds.items():
            torch.manual_seed(0)
            module = CalibrationModule(**kind.options)
            module.configure_model()
            result = measured(kind, module, batch)
            module.teardown("fit")
            if repeat:  # the first round warms up
                seen[name].append(result)
    context, tokens = max(each.embeds.shape[1] for each in first["embeddings"]), batch.questions.ids.shape[1]
    rows = []
    for name, results in seen.items():
        ratios = [one[0] / other[0] for one, other in zip(results, seen[FINE_TUNING], strict=True)]
        megabytes = statistics.median(size for _, size in results)
        rows.append(
            Row(
                name,
                kinds[name].variant,
                seconds,
                int(batch.questions.question.max()) + 1,
                (context, tokens),
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
        context, tokens = row.tokens
        took = f"{row.time:.2f} ({low:.2f} to {high:.2f})"
        made.add_row(
            row.step, str(row.clip_seconds), str(row.questions), f"{context} + {tokens}", took, f"{row.memory:.2f}"
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
