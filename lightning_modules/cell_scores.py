"""What is measured of one policy at one ratio, gathered over batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from acckv.cache import CompressedCache
from acckv.metrics import GroupedAccuracy, Interval, PairedComparison
from acckv.metrics.answers import OFFICIAL, UNPARSED, AnswerScore
from acckv.report.results import GroupScore, Row


class CellScores:
    """Scores and sizes of one cell of the table.

    Args:
        groups: names of all question groups.
        seed: of the intervals.
    """

    def __init__(self, groups: Sequence[str], seed: int = 0) -> None:
        # One process evaluates; the others of a training that has just ended are not waiting for it.
        self.accuracy = GroupedAccuracy(groups, seed=seed, sync_on_compute=False)
        self.against_full = PairedComparison(seed=seed, sync_on_compute=False)
        self._official: list[float] = []
        self._unparsed = 0
        self._kept: Tensor | None = None
        self._full = torch.zeros(2, dtype=torch.float64)
        self._bytes = 0
        self._rows = 0

    def add_answers(self, answers: Sequence[AnswerScore], full_scores: Tensor, clips: Tensor, members: Tensor) -> None:
        """Add items.

        Args:
            answers: [items] this cell's.
            full_scores: [items] float, scores of the full cache on the same questions.
            clips: [items] integer label of the clip that a question is about.
            members: [items, groups] bool, whether a question is in a group.
        """
        scores = torch.tensor([answer.score for answer in answers])
        self.accuracy.update(scores, clips, members)
        self.against_full.update(scores, full_scores, clips)
        self._official += [answer.official for answer in answers if answer.official is not None]
        self._unparsed += sum(not answer.parsed for answer in answers)

    def add_cache(self, cache: CompressedCache) -> None:
        """Add the sizes of the compressed cache of one batch."""
        rows = cache.labels.labels.shape[0]
        kept = cache.kept_entries().double().cpu() * rows
        self._kept = kept if self._kept is None else self._kept + kept
        self._full += cache.full_entries().double().cpu() * rows
        self._bytes += cache.kv_bytes()
        self._rows += rows

    def kept_entries(self) -> Tensor:
        """Video and audio entries that each layer kept, [layers, 2], mean over clips.

        Raises:
            ValueError: no cache was added yet.
        """
        if self._kept is None:
            raise ValueError("no cache was added")
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

    def row(self, policy: str, ratio: float) -> Row:
        """The row of `results.json`."""
        result = self.accuracy.compute()
        relative = self.against_full.compute()["relative"].item()
        groups = {}
        for name in self.accuracy.groups:
            count = int(result[f"{name}/n"])
            groups[name] = GroupScore(count, result[f"{name}/accuracy"].item() if count else None)
        if self._official:
            groups[OFFICIAL] = GroupScore(len(self._official), sum(self._official) / len(self._official))
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
        )
