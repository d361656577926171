"""Score the answers of one evaluation, by a benchmark's own parser and by a robust one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from acckv.benchmarks.answers import DESCRIPTIONS, OFFICIAL, SINGLE, question_groups, score_answer
from acckv.benchmarks.base import Mode
from acckv.benchmarks.registry import judge
from acckv.data.records import Record

ALL_OFFICIAL, ALL_ROBUST = "all questions, official parser", "all questions, robust parser"
"""Groups of all questions of a benchmark, by either parser."""
ROBUST = "single questions, robust parser"
"""The one-word questions once more, by the robust parser, where the official one gives the accuracy."""


@dataclass(frozen=True)
class Judged:
    """The scores of an answer, 0..1.

    Attributes:
        score: what accuracies are means of.
        official, robust: by either parser; None where the benchmark has no such parser, or leaves the answer out of
            its denominator.
        parsed: whether the parser that gives `score` found an answer.
    """

    score: float
    official: float | None
    robust: float | None
    parsed: bool


@dataclass(frozen=True)
class Judge:
    """Scores answers.

    Attributes:
        benchmark: of the registry; None for generated clips and question files: one-word answers and descriptions.
        vocabulary: words that a one-word answer is looked for in; for None alone.
        mode: of the parser that gives the accuracy; descriptions have a rule of their own.
    """

    benchmark: str | None
    vocabulary: Collection[str]
    mode: Mode

    def __call__(self, record: Record, text: str) -> Judged:
        if self.benchmark is not None:
            verdicts = {mode: judge(self.benchmark, record, text, mode) for mode in ("official", "robust")}
            chosen = verdicts[self.mode]
            official, robust = (verdict.score if verdict.counted else None for verdict in verdicts.values())
            return Judged(chosen.score, official, robust, chosen.parsed)
        found = score_answer(record, text, self.vocabulary)
        if found.official is None:
            return Judged(found.score, None, None, found.parsed)
        score = found.score if self.mode == "robust" else found.official
        return Judged(score, found.official, found.score, found.parsed)

    @property
    def parsers(self) -> dict[str, Mode]:
        """Groups of all answers as a parser reads them; the first has every answer that can be left unparsed."""
        if self.benchmark is not None:
            return {ALL_ROBUST: "robust", ALL_OFFICIAL: "official"}
        return {OFFICIAL: "official"} if self.mode == "robust" else {OFFICIAL: "official", ROBUST: "robust"}

    def groups(self, record: Record) -> tuple[str, ...]:
        """The groups that a question is reported in."""
        return record.groups if self.benchmark is not None else question_groups(record)

    def all_groups(self, records: Iterable[Record]) -> list[str]:
        """Every group of some questions: protocols first, then types in alphabetical order."""
        found = {name for record in records for name in self.groups(record)}
        protocols = [name for name in (SINGLE, DESCRIPTIONS) if name in found]
        return [*protocols, *sorted(found - {SINGLE, DESCRIPTIONS})]
