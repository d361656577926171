"""The questions that a calibration asked, in its words, and whether others lie outside of them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from acckv.data.records import Record
from acckv.errors import InputError
from acckv.io.typed import Count

#: Wordings that are kept in all, dealt out evenly to the kinds of questions, and of a kind at least.
MOST, LEAST = 1024, 8
#: Characters of the runs that wordings are compared by.
RUN_LENGTHS = (2, 3, 4)
#: Share of a kind's wordings that lie within its reach; share of the questions asked that may lie outside unremarked.
#: A kind of n wordings has a new one outside about once in n + 1, so 1 % is not to be had of small kinds.
WITHIN, TOLERATED = 0.99, 0.1
_ROUNDING = 1e-4
_AT_ONCE = 32  # wordings that are compared together


@dataclass(frozen=True)
class Coverage:
    """How much of what was asked an export was calibrated for.

    Attributes:
        asked: number of questions; outside: those among them that lie outside what the calibration asked.
        examples: two of these.
    """

    asked: Count
    outside: Count
    examples: list[str]

    @property
    def warning(self) -> str | None:
        """A sentence where more than a tenth lie outside."""
        if self.outside <= TOLERATED * self.asked:
            return None
        such = " and ".join(map(repr, self.examples))
        return (
            f"warning: {self.outside} of {self.asked} questions lie outside what the export was calibrated for, "
            f"such as {such}: what they ask about may have been evicted; calibrate on such questions, or "
            "for whatever can be asked (calibrate_for: general)"
        )


@dataclass(frozen=True)
class AskedQuestions:
    """Wordings of a calibration's questions, and which questions lie outside of them.

    A question lies outside where it is further from the nearest of the wordings than the wordings of that one's kind
    are from each other: 99 % of these are nearer than that to another of their kind. Where a kind has one wording
    alone, any other lies outside. Wordings are compared by the cosine over their runs of 2 to 4 characters, letters'
    case aside. A run weighs the more the more wordings have it (the root of their share): the form of a question
    counts more than the names in it.

    Args:
        wordings: kind of question -> what was asked.

    Raises:
        InputError: there is no wording.
    """

    wordings: dict[str, list[str]]

    def __post_init__(self) -> None:
        if not any(self.wordings.values()):
            raise InputError("hold no question", field="wordings")

    @classmethod
    def of(cls, records: Iterable[Record], kind: Callable[[Record], str], seed: int = 0) -> AskedQuestions:
        """The wordings of a calibration's questions, at most about `MOST` of them.

        Args:
            kind: of a question; seed: of the draw where there are more.
        """
        found: dict[str, dict[str, None]] = {}
        for record in records:
            found.setdefault(kind(record), {})[record.question] = None
        most, generator = max(MOST // max(len(found), 1), LEAST), np.random.default_rng(seed)
        drawn = {}
        for name in sorted(found):
            wordings = list(found[name])
            drawn[name] = [wordings[place] for place in sorted(generator.permutation(len(wordings))[:most])]
        return cls(drawn)

    def coverage(self, questions: Sequence[str]) -> Coverage:
        """How many of some questions lie outside, each as often as it is asked."""
        times = Counter(questions)
        outside = [text for text, out in zip(times, self.outside(list(times)), strict=True) if out]
        return Coverage(len(questions), sum(times[text] for text in outside), outside[:2])

    def outside(self, questions: Sequence[str]) -> list[bool]:
        """Whether each question lies outside."""
        nearest = self._index.distances(questions).min(dim=1)
        return (nearest.values > self._reach[nearest.indices] + _ROUNDING).tolist()

    @cached_property
    def _index(self) -> _RunIndex:
        return _RunIndex(list(chain.from_iterable(self.wordings.values())))

    @cached_property
    def _reach(self) -> Tensor:
        """``[wordings]``: distance up to which a question whose nearest wording it is lies inside."""
        reach, start = [], 0
        for wordings in self.wordings.values():
            stop = start + len(wordings)
            among = self._index.distances(wordings)[:, start:stop].fill_diagonal_(math.inf)
            start = stop
            rank = min(len(wordings), math.ceil(WITHIN * (len(wordings) + 1)))
            within = among.amin(dim=1).sort().values[rank - 1] if len(wordings) > 1 else torch.zeros(())
            reach.append(within.expand(len(wordings)))
        return torch.cat(reach)


class _RunIndex:
    """Wordings as vectors over the runs of characters that are in them.

    Args:
        wordings: that others are compared with.
    """

    def __init__(self, wordings: Sequence[str]) -> None:
        runs = [_runs_of(text) for text in wordings]
        counts = Counter(chain.from_iterable(runs))
        self.columns = {run: column for column, run in enumerate(counts)}
        self.weights = {run: math.sqrt((count + 1) / len(wordings)) for run, count in counts.items()}
        self.unknown = math.sqrt(1 / len(wordings))
        places = [(row, self.columns[run]) for row, own in enumerate(runs) for run in own]
        size = len(wordings), len(self.columns)
        ones = torch.ones(len(places))
        self.held = torch.sparse_coo_tensor(torch.tensor(places).T, ones, size, check_invariants=True).coalesce()
        self.lengths = self._lengths(runs)

    def distances(self, texts: Sequence[str]) -> Tensor:
        """``[texts, wordings]``: 1 - cosine."""
        parts = [torch.zeros(0, len(self.lengths))]
        for start in range(0, len(texts), _AT_ONCE):
            runs = [_runs_of(text) for text in texts[start : start + _AT_ONCE]]
            weights = torch.zeros(len(self.columns), len(runs))
            for place, own in enumerate(runs):
                known = own & self.columns.keys()
                weights[[self.columns[run] for run in known], place] = torch.tensor(
                    [self.weights[run] for run in known]
                )
            common = torch.sparse.mm(self.held, weights).T
            parts.append(1 - common / (self._lengths(runs)[:, None] * self.lengths))
        return torch.cat(parts)

    def _lengths(self, runs: Iterable[set[str]]) -> Tensor:
        squares = (sum(self.weights.get(run, self.unknown) for run in own) for own in runs)
        return torch.tensor([math.sqrt(square) for square in squares])


def _runs_of(text: str) -> set[str]:
    marked = f"<{' '.join(text.lower().split())}>"
    return {marked[at : at + length] for length in RUN_LENGTHS for at in range(len(marked) - length + 1)}
