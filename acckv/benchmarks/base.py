"""A benchmark: a reader of its files, a prompt for its questions, and a score for an answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from acckv.data.records import Record

Mode = Literal["official", "robust"]
"""`official` is what papers report, faults included; `robust` mends what is known to be wrong in it."""


@dataclass(frozen=True)
class Verdict:
    """The score of an answer.

    Attributes:
        score: 0..1, what accuracies are means of; 0 for an answer that could not be parsed, save where the official
            parser guesses.
        parsed: whether the parser found an answer in the text.
        counted: whether the answer is in the denominator; False where the official score leaves it out.
    """

    score: float
    parsed: bool
    counted: bool = True


@dataclass(frozen=True)
class Benchmark:
    """A data set of questions.

    Attributes:
        name: of the registry; title: as its authors write it; source: paper and where to get it.
        load: `(root, split, subset)` to records in file order; raises InputError with file, record and field.
        judge: `(record, answer, mode)` to the verdict.
        prompt: the text that a model is asked, options and instruction included.
        splits, subsets: the names that `load` takes; the first is the default, no subset is all of them.
        max_new_tokens: longest answer.
    """

    name: str
    title: str
    source: str
    load: Callable[[Path, str | None, str | None], list[Record]]
    judge: Callable[[Record, str, Mode], Verdict]
    prompt: Callable[[Record], str] = lambda record: record.question
    splits: tuple[str, ...] = ()
    subsets: tuple[str, ...] = ()
    max_new_tokens: int = 16
