"""The scores of a benchmark by one of its parsers, gathered over batches and processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from acckv.data.benchmarks import Mode, judge
from acckv.data.records import Record
from acckv.metrics.grouped import GroupedAccuracy
from acckv.metrics.intervals import clustered_standard_error

_UNPARSED = "unparsed"


class BenchmarkScores(GroupedAccuracy):
    """Accuracy overall and by question group, its clustered standard error, and the share of unparsed answers.

    Args:
        benchmark: its name.
        records: every question that may come, on any process: they fix the groups and number the videos.
        mode: the parser, "official" or "robust".
    """

    def __init__(self, benchmark: str, records: Sequence[Record], mode: Mode = "official", **kwargs: Any) -> None:
        # A group of its own tells unparsed answers apart.
        super().__init__([*dict.fromkeys(name for record in records for name in record.groups), _UNPARSED], **kwargs)
        self.benchmark, self.mode = benchmark, mode
        self._numbers = {clip: number for number, clip in enumerate(dict.fromkeys(r.video for r in records))}

    def add(self, records: Sequence[Record], answers: Sequence[str]) -> None:
        """Judge and add answers.

        Raises:
            ValueError: not one answer a question.
        """
        verdicts = [judge(self.benchmark, r, text, self.mode) for r, text in zip(records, answers, strict=True)]
        inside = [
            [name in record.groups for name in self.groups[:-1]] + [not verdict.parsed]
            for record, verdict in zip(records, verdicts, strict=True)
        ]
        self.update(
            torch.tensor([verdict.score for verdict in verdicts]),
            torch.tensor([self._numbers[record.video] for record in records], dtype=torch.long),
            torch.tensor(inside, dtype=torch.bool).reshape(len(records), len(self.groups)),
        )

    def compute(self) -> dict[str, Tensor]:
        """`accuracy`, `standard_error`, `n`, `unparsed` (a share), and the first three as `<group>/accuracy` and so on.

        Questions about one video are not independent: standard errors are clustered by video, nan for a single one.
        """
        scores, clips, members = self.items()
        result: dict[str, Tensor] = {}
        everything = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
        for prefix, inside in [("", everything), *zip(self.groups[:-1], members[:, :-1].T, strict=True)]:
            start = f"{prefix}/" if prefix else ""
            error = clustered_standard_error(scores[inside], clips[inside]) if inside.any() else float("nan")
            result[f"{start}accuracy"] = scores[inside].mean()
            result[f"{start}standard_error"] = torch.tensor(error)
            result[f"{start}n"] = inside.sum()
        return result | {"unparsed": members[:, -1].float().mean()}
