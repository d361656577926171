"""Score the answers of one evaluation, by a benchmark's own parser and by a robust one."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import get_args

from acckv.benchmarks.base import Mode, Verdict
from acckv.benchmarks.music_avqa_questions import VOCABULARY
from acckv.benchmarks.protocols import judge_protocol, judge_word
from acckv.benchmarks.registry import judge
from acckv.data.records import Record
from acckv.metrics.words import word_accuracy

SINGLE, DESCRIPTIONS = "single questions", "descriptions"
"""Groups of all questions with a short answer, and of all free-text tasks."""
OFFICIAL, ROBUST = "single questions, official parser", "single questions, robust parser"
"""The one-word questions once more, by the data set's own rule and by the robust one."""
ALL_OFFICIAL, ALL_ROBUST = "all questions, official parser", "all questions, robust parser"
"""Groups of all questions of a benchmark, by either parser."""
UNPARSED = "unparsed"
"""Group of the questions whose answer could not be read; they count as wrong."""


@dataclass(frozen=True)
class Judged:
    """The scores of an answer, 0..1.

    Attributes:
        score: what accuracies are means of.
        official, robust: by either parser; None where there is no such parser (descriptions), or it leaves the answer
            out of its denominator.
        parsed: whether the parser that gives `score` found an answer; always true for descriptions.
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
        if self.benchmark is None and record.protocol == "description":
            return Judged(word_accuracy(text, record.answer), None, None, True)
        verdicts: dict[Mode, Verdict] = {mode: self._verdict(record, text, mode) for mode in get_args(Mode)}
        official, robust = (verdict.score if verdict.counted else None for verdict in verdicts.values())
        chosen = verdicts[self.mode]
        return Judged(chosen.score, official, robust, chosen.parsed)

    def _verdict(self, record: Record, text: str, mode: Mode) -> Verdict:
        if self.benchmark is not None:
            return judge(self.benchmark, record, text, mode)
        if record.protocol == "word":
            return judge_word(record, text, mode, self.vocabulary)
        return judge_protocol(record, text, mode)  # of a benchmark's own questions

    @property
    def parsers(self) -> dict[str, Mode]:
        """Groups of all answers as a parser reads them; the first has every answer that can be left unparsed."""
        if self.benchmark is not None:
            return {ALL_ROBUST: "robust", ALL_OFFICIAL: "official"}
        return {OFFICIAL: "official"} if self.mode == "robust" else {OFFICIAL: "official", ROBUST: "robust"}

    def groups(self, record: Record) -> tuple[str, ...]:
        """The groups that a question is reported in: its types', and its protocol's where there is no benchmark."""
        if self.benchmark is not None:
            return record.groups
        return (DESCRIPTIONS if record.protocol in ("description", "text") else SINGLE, *record.groups)

    def all_groups(self, records: Iterable[Record]) -> list[str]:
        """Every group of some questions: protocols first, then types in alphabetical order."""
        found = {name for record in records for name in self.groups(record)}
        protocols = [name for name in (SINGLE, DESCRIPTIONS) if name in found]
        return [*protocols, *sorted(found - {SINGLE, DESCRIPTIONS})]


def answer_vocabulary(records: Iterable[Record]) -> frozenset[str]:
    """Words that a one-word answer is looked for in: MUSIC-AVQA's and every reference answer."""
    return frozenset(VOCABULARY) | {record.answer for record in records if record.protocol == "word"}
