"""What is measured of one policy at one ratio, gathered from what was answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from acckv.benchmarks.answers import UNPARSED
from acckv.benchmarks.judging import Judge, Judged
from acckv.data.records import Record
from acckv.evaluation.journal import CellAnswers
from acckv.evaluation.results import GroupScore, Row
from acckv.metrics import GroupedAccuracy, Interval, PairedComparison, clustered_standard_error


class CellScores:
    """Scores and sizes of one cell of the table.

    Args:
        groups: names of all question groups.
        judge: that scored the answers.
        seed: of the intervals.
    """

    def __init__(self, groups: Sequence[str], judge: Judge, seed: int = 0) -> None:
        # Every process has read all answers; none waits for another.
        self.accuracy = GroupedAccuracy(groups, seed=seed, sync_on_compute=False)
        self.against_full = PairedComparison(seed=seed, sync_on_compute=False)
        self.judge = judge
        self._parsed: dict[str, list[float]] = {name: [] for name in judge.parsers}
        self._unparsed = self._cut = 0
        self._videos: list[Path] = []
        self._kept: Tensor | None = None
        self._full = torch.zeros(2, dtype=torch.float64)
        self._bytes = 0
        self._rows = 0

    def add(
        self, records: Sequence[tuple[int, Record]], answers: CellAnswers, full_scores: Tensor | None = None
    ) -> list[Judged]:
        """Score the questions of one prefill.

        Args:
            records: the clip and the question of each answer.
            answers: this cell's.
            full_scores: [questions] float, scores of the full cache; None where this is the full cache.
        """
        judged = [self.judge(record, text) for (_, record), text in zip(records, answers.texts, strict=True)]
        scores = torch.tensor([one.score for one in judged])
        clips = torch.tensor([clip for clip, _ in records])
        named = [self.judge.groups(record) for _, record in records]
        members = torch.tensor([[group in names for group in self.accuracy.groups] for names in named])
        self.accuracy.update(scores, clips, members.reshape(len(named), len(self.accuracy.groups)))
        self.against_full.update(scores, scores if full_scores is None else full_scores, clips)
        for name, mode in self.judge.parsers.items():
            values = [one.official if mode == "official" else one.robust for one in judged]
            self._parsed[name] += [value for value in values if value is not None]
        self._videos += [record.video for _, record in records]
        self._unparsed += sum(not one.parsed for one in judged)
        self._cut += sum(answers.cut)
        self._add_sizes(answers)
        return judged

    def _add_sizes(self, answers: CellAnswers) -> None:
        kept = torch.tensor(answers.kept, dtype=torch.float64) * answers.rows
        self._kept = kept if self._kept is None else self._kept + kept
        self._full += torch.tensor(answers.full, dtype=torch.float64) * answers.rows
        self._bytes += answers.kv_bytes
        self._rows += answers.rows

    def kept_entries(self) -> Tensor:
        """Video and audio entries that each layer kept, [layers, 2], mean over clips.

        Raises:
            ValueError: nothing was added yet.
        """
        if self._kept is None:
            raise ValueError("nothing was added")
        return self._kept / self._rows

    def full_entries(self) -> Tensor:
        """Video and audio entries before compression, [2], mean over clips."""
        return self._full / max(1, self._rows)

    def relative_interval(self) -> Interval | None:
        """95 % interval of the share of the full cache's accuracy, paired by clip; None where that is 0."""
        return self.against_full.relative_interval()

    def against(self, other: CellScores) -> tuple[float, Interval]:
        """Difference in accuracy to another cell on the same questions, with its paired 95 % interval."""
        scores, clips, _ = self.accuracy.items()
        paired = PairedComparison(seed=self.accuracy.seed, sync_on_compute=False)
        paired.update(scores, other.accuracy.items()[0], clips)
        return paired.compute()["difference"].item(), paired.difference_interval()

    def standard_error(self) -> float | None:
        """Of the accuracy, clustered by video (several clips may be cut from one); None where there is only one."""
        numbers = {video: number for number, video in enumerate(dict.fromkeys(self._videos))}
        videos = torch.tensor([numbers[video] for video in self._videos])
        return clustered_standard_error(self.accuracy.items()[0], videos) if len(numbers) > 1 else None

    def row(self, policy: str, ratio: float, metrics: Mapping[str, float | None]) -> Row:
        """The row of `results.json`; `metrics` are the scores of all answers together."""
        result = self.accuracy.compute()
        relative = self.against_full.compute()["relative"].item()
        groups = {}
        for name in self.accuracy.groups:
            count = int(result[f"{name}/n"])
            groups[name] = GroupScore(count, result[f"{name}/accuracy"].item() if count else None)
        for name, values in self._parsed.items():
            if values:
                groups[name] = GroupScore(len(values), sum(values) / len(values))
        if any(self._parsed.values()):
            groups[UNPARSED] = GroupScore(self._unparsed, 0.0 if self._unparsed else None)
        interval = self.accuracy.interval()
        return Row(
            policy=policy,
            ratio=ratio,
            n=int(result["n"]),
            accuracy=result["accuracy"].item(),
            relative=None if relative != relative else relative,
            ci95=(interval.low, interval.high),
            kept_entries=round(float(self.kept_entries().sum(-1).mean()), 4),
            full_entries=round(float(self.full_entries().sum()), 4),
            kv_bytes=round(self._bytes / self._rows),
            groups=groups,
            standard_error=self.standard_error(),
            metrics=dict(metrics),
            cut=self._cut,
        )


def prediction(
    policy: str,
    ratio: float,
    clip: int,
    record: Record,
    groups: Sequence[str],
    text: str,
    cut: bool,
    judged: Judged,
) -> dict[str, Any]:
    """The line of `predictions.jsonl`."""
    line = {
        "policy": policy,
        "ratio": ratio,
        "id": record.id,
        "clip": clip,
        "video": record.video.name,
        "protocol": record.protocol,
        "groups": list(groups),
        "question": record.question,
        "answer": record.answer,
        "prediction": text,
        "cut": cut,
        "score": judged.score,
        "official": judged.official,
        "robust": judged.robust,
        "parsed": judged.parsed,
    }
    return line
