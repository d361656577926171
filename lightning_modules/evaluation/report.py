"""The files of an evaluation: predictions, plots, results, and the report with its kept-entries timelines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from acckv.evaluation.results import (
    FAILURES_FILE,
    PREDICTIONS_FILE,
    RESULTS_FILE,
    Answer,
    Results,
    Setting,
    is_calibrated,
    write_failures,
    write_predictions,
    write_results,
)
from acckv.evaluation.scores import Outcome
from acckv.evaluation.timeline import (
    TIMELINES_FILE,
    KeptEntries,
    Timeline,
    envelope,
    measure_kept,
    picture_grid,
    save_timelines,
    thumbnails,
)
from acckv.models.clips import TEMPORAL_PATCH, Media
from acckv.report.answers import Answers
from acckv.report.html import shown_policy, write_html
from acckv.report.plots import plot_budgets, plot_pareto
from acckv.report.run_record import RECORD_FILE, Budget, RunRecord, write_run
from acckv.runtime.session import Session
from lightning_modules.evaluation.datamodule import Clip, ClipReader
from lightning_modules.evaluation.module import EvaluationModule
from lightning_modules.evaluation.versions import versions

PARETO_FILE, BUDGETS_FILE = "pareto.png", "budgets.png"


def write_files(
    output: Path, outcome: Outcome, command: str | None, timelines: Callable[[], list[Timeline]] = list
) -> None:
    """Predictions, failures, plots, results and the report, whose timelines come last: they run the model again."""
    write_predictions(output / PREDICTIONS_FILE, outcome.answers)
    write_failures(output / FAILURES_FILE, outcome.failures)
    plot_pareto(output / PARETO_FILE, outcome.results, outcome.relative_intervals)
    kept = {setting: one.sizes.kept_entries for setting, one in outcome.scores.items() if setting.compresses}
    if kept:
        names = [policy for policy, _ in kept]
        shown = next(filter(is_calibrated, names), names[-1])
        budgets = {ratio: entries for (policy, ratio), entries in kept.items() if policy == shown}
        plot_budgets(output / BUDGETS_FILE, budgets, outcome.full.sizes.full_entries, shown)
    write_results(output / RESULTS_FILE, outcome.results)
    clips = timelines()
    held = [Budget(*setting, entries.tolist()) for setting, entries in kept.items()]
    video, audio = outcome.full.sizes.full_entries.tolist()
    write_run(output / RECORD_FILE, RunRecord(command, versions(), (video, audio), held))
    (output / TIMELINES_FILE).unlink(missing_ok=True)  # of an older evaluation
    if clips:
        save_timelines(output / TIMELINES_FILE, clips)
    write_html(output)


def measure_timelines(module: EvaluationModule, outcome: Outcome, count: int, read: ClipReader) -> list[Timeline]:
    """The kept entries of `count` clips, read as for the answers; a clip without pictures has no timeline."""
    answers, settings = Answers(outcome.answers), shown_settings(outcome.results)
    found = []
    for asked in choose_questions(answers, settings, count) if settings else []:
        record = outcome.config.record(asked)
        media = read(record)
        if isinstance(media, Media) and media.frames is not None:
            given = [answers.by_setting[setting][asked.id] for setting in settings]
            found.append(_timeline(module, Clip(asked.clip, media, [record]), media, media.frames, asked, given))
    return found


def shown_settings(results: Results) -> list[Setting]:
    """The settings of timelines, largest ratio first: the shown policy at every ratio between 0 and 1, and at each
    of them the best training-free policy that looks at the entries (a random draw says nothing of a clip)."""
    shown = shown_policy(results)
    found = []
    own_rows = [row for row in results.rows if row.policy == shown and row.setting.compresses]
    for own in sorted(own_rows, key=lambda row: -row.ratio):
        best = results.best_other(own, "random")
        found += [own.setting] if best is None else [own.setting, best.setting]
    return found


def choose_questions(answers: Answers, settings: Sequence[Setting], count: int) -> list[Answer]:
    """Questions about `count` different clips, as the full cache answers them: in turn one that the first setting's
    policy answers wrongly although the full cache is right (at the largest ratio first), and one that it always
    answers rightly."""
    own = [setting for setting in settings if setting.policy == settings[0].policy]
    lost = [flip.full for setting in own for flip in answers.flips(setting).lost]
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


def _timeline(
    module: EvaluationModule, clip: Clip, media: Media, frames: Tensor, full: Answer, answers: Sequence[Answer]
) -> Timeline:
    """The timeline of one clip, of the full cache's answer and those of the settings that are shown."""
    inputs = module.inputs([clip], clip.records if module.when == "prompt" else None)

    def opened(setting: Setting) -> partial[Session]:
        return partial(module.compressors[setting], module.model, module.processor)

    kept = measure_kept(inputs, opened(full.setting), [(opened(one.setting), one.ratio) for one in answers])
    return Timeline(
        clip=full.video,
        question=full.question,
        answer=full.answer,
        full_answer=full.prediction,
        seconds=len(frames) / media.fps,
        patches=len(frames) // TEMPORAL_PATCH,
        grid=picture_grid(module.processor, inputs.get("video_grid_thw"), kept[0][0].shape[1]),
        thumbnails=thumbnails(frames),
        wave=envelope(media.audio),
        kept=[
            KeptEntries(one.policy, one.ratio, one.prediction, one.score, *held)
            for one, held in zip(answers, kept, strict=True)
        ],
    )
