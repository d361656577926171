"""What an evaluation leaves for its report: the run, strips of kept entries, and `report.html` itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from acckv.data.media import TEMPORAL_PATCH, Media
from acckv.data.precomputed import read_clip
from acckv.data.records import Record
from acckv.evaluation.results import PREDICTIONS_FILE, Results
from acckv.report.answers import Answer, Answers, read_answers
from acckv.report.html import shown_policy, write_html
from acckv.report.run_record import RUN_FILE, Budget, RunRecord, versions, write_run
from acckv.report.timeline import STRIPS_FILE, KeptEntries, Strip, envelope, save_strips, thumbnails, watch_clip
from lightning_modules.evaluation.datamodule import ClipReader
from lightning_modules.evaluation.module import Cell, EvaluationModule
from lightning_modules.evaluation.tables import Outcome


def write_report(
    output: Path,
    outcome: Outcome,
    command: str | None,
    module: EvaluationModule | None = None,
    clips: Sequence[Sequence[Record]] = (),
    strips: int = 0,
    read: ClipReader = read_clip,
) -> None:
    """Write `report.json`, `strips.safetensors` and `report.html`; the results and predictions are written already.

    Args:
        output: folder of the evaluation.
        outcome: of the evaluation.
        command: the command line.
        module: that answered; None where it did so elsewhere, and then there are no strips.
        clips: the questions about each clip.
        strips: clips to show the kept entries of; a clip without pictures has no strip.
        read: reads a clip, as it was read for the answers.
    """
    budgets = [
        Budget(policy, ratio, scores.kept_entries().tolist())
        for (policy, ratio), scores in outcome.scores.items()
        if 0 < ratio < 1
    ]
    full = next(iter(outcome.scores.values())).full_entries().tolist()
    write_run(output / RUN_FILE, RunRecord(command, versions(), full, budgets))
    (output / STRIPS_FILE).unlink(missing_ok=True)  # of an older evaluation
    cells = [] if module is None else strip_cells(outcome.results, module.cells)
    if module is not None and cells and strips:
        answers = read_answers(output / PREDICTIONS_FILE)
        drawn = []
        for asked in choose_questions(answers, cells, strips):
            record = next(record for record in clips[asked.clip] if record.id == asked.id)
            clip = read(record)
            if isinstance(clip, Media) and clip.frames is not None:
                drawn.append(_strip(module, answers, cells, clip, clip.frames, record, asked))
        if drawn:
            save_strips(output / STRIPS_FILE, drawn)
    write_html(output)


def strip_cells(results: Results, cells: Sequence[Cell]) -> list[Cell]:
    """The cells that strips show, largest ratio first: the shown policy at every ratio between 0 and 1, and at each
    of them the best training-free policy that looks at the entries (a random draw says nothing of a clip)."""
    shown = shown_policy(results)
    ours = [cell for cell in cells if cell.policy == shown and 0 < cell.ratio < 1]
    found = []
    for cell in sorted(ours, key=lambda cell: -cell.ratio):
        rows = [row for row in results.rows if row.ratio == cell.ratio and row.policy not in (shown, "random")]
        best = max(rows, key=lambda row: row.accuracy, default=None)
        found.append(cell)
        found += [other for other in cells if best and (other.policy, other.ratio) == (best.policy, best.ratio)]
    return found


def choose_questions(answers: Answers, cells: list[Cell], count: int) -> list[Answer]:
    """Questions about `count` different clips: in turn one that the first cells' policy answers wrongly although the
    full cache is right (at the largest ratio first), and one that it always answers rightly."""
    own = [(cell.policy, cell.ratio) for cell in cells if cell.policy == cells[0].policy]
    lost = [flip.full for cell in own for flip in answers.flips(cell).lost]
    wrong = {answer.id for answer in lost}
    kept = [answer for answer in answers.full.values() if answer.right and answer.id not in wrong]
    rest = list(answers.full.values())
    chosen: dict[int, Answer] = {}
    for turn in range(count):
        for pool in (lost, kept, rest) if turn % 2 == 0 else (kept, lost, rest):
            found = next((answer for answer in pool if answer.clip not in chosen), None)
            if found is not None:
                chosen[found.clip] = found
                break
    return list(chosen.values())


def _strip(
    module: EvaluationModule,
    answers: Answers,
    cells: Sequence[Cell],
    clip: Media,
    frames: Tensor,
    record: Record,
    asked: Answer,
) -> Strip:
    question = module.asking.prompt(record) if module.when == "prompt" else None
    pairs = [(cell.compressor, cell.ratio) for cell in cells]
    kept, grid = watch_clip(module.model, module.processor, clip, question, pairs, module.when, record.system_prompt)  # type: ignore[arg-type]
    entries = []
    for cell, held in zip(cells, kept, strict=True):
        given = answers.cells[cell.policy, cell.ratio][asked.id]
        entries.append(
            KeptEntries(cell.policy, cell.ratio, given.prediction, given.score, held.video, held.audio, held.heads)
        )
    return Strip(
        clip=asked.video,
        question=asked.question,
        answer=asked.answer,
        full_answer=asked.prediction,
        seconds=len(frames) / clip.fps,
        patches=len(frames) // TEMPORAL_PATCH,
        grid=grid,
        thumbnails=thumbnails(frames),
        wave=envelope(clip.audio),
        kept=entries,
    )
