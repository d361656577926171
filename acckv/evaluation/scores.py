"""The rows of the table from the answers of an evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from operator import add

import torch

from acckv.benchmarks.corpus import corpus_scores
from acckv.benchmarks.judging import UNPARSED
from acckv.errors import InputError
from acckv.evaluation.journal import Batch
from acckv.evaluation.results import Answer, Failure, GroupScore, Results, Row, Setting
from acckv.evaluation.run_config import RunConfig
from acckv.evaluation.sizes import Sizes
from acckv.metrics.grouped import GroupedAccuracy
from acckv.metrics.intervals import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    clustered_standard_error,
)


class SettingScores:
    """Scores and sizes of one setting.

    Args:
        answers: of the setting; full: the full cache's to the same questions, in the same order.
        sizes: of the setting's caches; groups: names of all question groups.
    """

    def __init__(
        self, config: RunConfig, answers: Sequence[Answer], full: Sequence[Answer], sizes: Sizes, groups: Sequence[str]
    ) -> None:
        self.config, self.answers, self.sizes, self.seed = config, answers, sizes, config.options["seed"]
        self.scores, self.full = (torch.tensor([each.score for each in own]).float() for own in (answers, full))
        self.clips = torch.tensor([answer.clip for answer in answers])
        members = torch.tensor([[group in answer.groups for group in groups] for answer in answers])
        # Every process has read all answers; none waits for another.
        self.accuracy = GroupedAccuracy(groups, sync_on_compute=False)
        self.accuracy.update(self.scores, members.reshape(len(answers), len(groups)))

    @property
    def relative(self) -> float | None:
        """Share of the full cache's accuracy; None where that is 0."""
        base = self.full.mean()
        return (self.scores.mean() / base).item() if base > 0 else None

    def against(self, other: SettingScores) -> tuple[float, Interval]:
        """Difference in accuracy to another setting on the same questions, with its paired 95 % interval."""
        difference = (self.scores.mean() - other.scores.mean()).item()
        return difference, bootstrap_difference(self.scores, other.scores, self.clips, seed=self.seed)

    def standard_error(self) -> float | None:
        """Of the accuracy, clustered by video (several clips may be cut from one); None where there is only one."""
        videos = [self.config.record(answer).video for answer in self.answers]
        numbers = {video: number for number, video in enumerate(dict.fromkeys(videos))}
        clusters = torch.tensor([numbers[video] for video in videos])
        return clustered_standard_error(self.scores, clusters) if len(numbers) > 1 else None

    def metrics(self) -> dict[str, float | None]:
        """The scores of all answers together, such as BLEU-4."""
        records = [self.config.record(answer) for answer in self.answers]
        return corpus_scores(records, [answer.prediction for answer in self.answers], self.config.score)

    def groups(self) -> dict[str, GroupScore]:
        """The score of each question group, and of all answers by either parser."""
        result = self.accuracy.compute()
        groups = {}
        for name in self.accuracy.groups:
            count = int(result[f"{name}/n"])
            groups[name] = GroupScore(count, result[f"{name}/accuracy"].item() if count else None)
        parsed = False
        for name, mode in self.config.judge.parsers.items():
            values = [value for answer in self.answers if (value := getattr(answer, mode)) is not None]
            if values:
                parsed, groups[name] = True, GroupScore(len(values), sum(values) / len(values))
        if parsed:
            unparsed = sum(not answer.parsed for answer in self.answers)
            groups[UNPARSED] = GroupScore(unparsed, 0.0 if unparsed else None)
        return groups

    def row(self, setting: Setting) -> Row:
        """The row of `results.json`."""
        return Row(
            policy=setting.policy,
            ratio=setting.ratio,
            n=len(self.answers),
            accuracy=self.accuracy.compute()["accuracy"].item(),
            relative=self.relative,
            ci95=bootstrap_mean(self.scores, self.clips, seed=self.seed),
            kept_entries=round(self.sizes.entries, 4),
            full_entries=round(float(self.sizes.full_entries.sum()), 4),
            kv_bytes=round(self.sizes.kv_bytes / self.sizes.prompts),
            groups=self.groups(),
            standard_error=self.standard_error(),
            metrics=self.metrics(),
            cut=sum(answer.cut for answer in self.answers),
        )


@dataclass(frozen=True)
class Outcome:
    """The outcome of an evaluation.

    Attributes:
        results: the rows; scores: of each row.
        answers: of all settings, in the order of the batches.
        failures: the clips that could not be read.
    """

    config: RunConfig
    results: Results
    scores: Mapping[Setting, SettingScores]
    answers: list[Answer]
    failures: list[Failure]

    @property
    def full(self) -> SettingScores:
        """The full cache's scores."""
        return next(iter(self.scores.values()))

    @cached_property
    def relative_intervals(self) -> dict[Setting, Interval]:
        """95 % interval of each setting's share of the full cache's accuracy, paired by clip, where that is not 0."""
        measured = {setting: one for setting, one in self.scores.items() if one.full.any()}
        return {
            setting: bootstrap_ratio(one.scores, one.full, one.clips, seed=one.seed)
            for setting, one in measured.items()
        }


def score_batches(config: RunConfig, batches: Iterable[Batch]) -> Outcome:
    """The outcome of what was answered, in the order of the batches.

    Raises:
        InputError: not one clip could be read.
    """
    batches = list(batches)
    failed = dict(sorted(failure for batch in batches for failure in batch.failed))
    failures = [Failure(str(config.clips[clip][0].video), error) for clip, error in failed.items()]
    by_setting: dict[Setting, list[Answer]] = {setting: [] for setting in config.settings}
    answers = [answer for batch in batches for answer in batch.answers]
    for answer in answers:
        by_setting[answer.setting].append(answer)
    if not answers:
        why = f"; the first: {failures[0].error}" if failures else ""
        raise InputError(f"not one of {len(failures)} clips could be read{why}")
    groups = config.judge.all_groups(record for clip in config.clips for record in clip)
    full = next(iter(by_setting.values()))
    sizes = (reduce(add, own) for own in zip(*(batch.sizes for batch in batches if batch.sizes), strict=True))
    scores = {
        setting: SettingScores(config, own, full, size, groups)
        for (setting, own), size in zip(by_setting.items(), sizes, strict=True)
    }
    results = Results(
        config.model,
        config.options["benchmark"],
        config.options["when"],
        config.options["seed"],
        [one.row(setting) for setting, one in scores.items()],
        score=config.score,
        clips=len({answer.clip for answer in full}),
        failed_clips=len(failed),
        failed_questions=sum(len(config.clips[clip]) for clip in failed),
        coverage=config.coverage,
    )
    return Outcome(config, results, scores, answers, failures)
