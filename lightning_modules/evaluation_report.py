"""What an evaluation leaves for its report: the run, strips of kept entries, and `report.html` itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from acckv.data.media import TEMPORAL_PATCH
from acckv.data.records import Record
from acckv.report.answers import Answer, Answers, read_answers
from acckv.report.html import shown_policy, write_html
from acckv.report.results import PREDICTIONS_FILE, Results
from acckv.report.run_record import RUN_FILE, Budget, RunRecord, versions, write_run
from acckv.report.strip import STRIPS_FILE, KeptEntries, Strip, envelope, save_strips, thumbnails, watch_clip
from lightning_modules.evaluation import Cell, Clip, EvaluationModule


def write_report(
    output: Path,
    results: Results,
    module: EvaluationModule,
    read_clip: Callable[[int], Clip],
    strips: int,
    command: str | None,
) -> None:
    """Write `report.json`, `strips.safetensors` and `report.html`; the results and predictions are written already.

    Args:
        output: folder of the evaluation.
        read_clip: reads a clip by its number.
        strips: clips to show the kept entries of.
        command: the command line.
    """
    budgets = [
        Budget(cell.policy, cell.ratio, scores.kept_entries().tolist())
        for cell, scores in zip(module.cells, module.scores, strict=True)
        if 0 < cell.ratio < 1
    ]
    write_run(output / RUN_FILE, RunRecord(command, versions(), module.scores[0].full_entries().tolist(), budgets))
    cells = strip_cells(results, module.cells)
    (output / STRIPS_FILE).unlink(missing_ok=True)  # of an older evaluation
    if cells and strips:
        answers = read_answers(output / PREDICTIONS_FILE)
        chosen = choose_questions(answers, cells, strips)
        save_strips(output / STRIPS_FILE, [_strip(module, answers, cells, read_clip, asked) for asked in chosen])
    write_html(output)


def strip_cells(results: Results, cells: list[Cell]) -> list[Cell]:
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
    module: EvaluationModule, answers: Answers, cells: list[Cell], read_clip: Callable[[int], Clip], asked: Answer
) -> Strip:
    clip = read_clip(asked.clip)
    record: Record = next(record for record in clip.records if record.id == asked.id)
    question = record.question if module.when == "prompt" else None
    pairs = [(cell.compressor, cell.ratio) for cell in cells]
    kept, grid = watch_clip(module.model, module.processor, clip.media, question, pairs, module.when)  # type: ignore[arg-type]
    entries = []
    for cell, held in zip(cells, kept, strict=True):
        given = answers.cells[cell.policy, cell.ratio][asked.id]
        entries.append(
            KeptEntries(cell.policy, cell.ratio, given.prediction, given.score, held.video, held.audio, held.heads)
        )
    frames = clip.media.frames
    return Strip(
        clip=asked.video,
        question=asked.question,
        answer=asked.answer,
        full_answer=asked.prediction,
        seconds=len(frames) / clip.media.fps,
        patches=len(frames) // TEMPORAL_PATCH,
        grid=grid,
        thumbnails=thumbnails(clip.media),
        wave=envelope(clip.media.audio),
        kept=entries,
    )
