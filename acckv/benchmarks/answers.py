"""Score one answer by the protocol of its question, a word or a description."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import get_args

from acckv.benchmarks.base import Mode
from acckv.benchmarks.music_avqa_questions import VOCABULARY, official_match, robust_answer, robust_match
from acckv.benchmarks.protocols import judge_protocol
from acckv.data.records import Record
from acckv.metrics.words import word_accuracy

SINGLE, DESCRIPTIONS = "single questions", "descriptions"
"""Groups of all questions with a short answer, and of all free-text tasks."""
OFFICIAL = "single questions, official parser"
"""The one-word questions once more, scored by the data set's own rule."""
UNPARSED = "unparsed"
"""Group of the one-word questions whose answer held no known word; they count as wrong."""


@dataclass(frozen=True)
class AnswerScore:
    """The scores of an answer.

    Attributes:
        score: 0..1, what accuracies are means of. One word: by the robust parser. Description: share of right words.
        official: score by the data set's own rule, None where there is none (descriptions).
        parsed: whether a known word was found; always true for descriptions.
    """

    score: float
    official: float | None
    parsed: bool


def answer_vocabulary(records: Iterable[Record]) -> frozenset[str]:
    """Words that a one-word answer is looked for in: MUSIC-AVQA's and every reference answer."""
    return frozenset(VOCABULARY) | {record.answer for record in records if record.protocol == "word"}


def score_answer(record: Record, prediction: str, vocabulary: Collection[str]) -> AnswerScore:
    """Score a prediction.

    Args:
        record: the question.
        prediction: text as generated.
        vocabulary: see `answer_vocabulary`.
    """
    if record.protocol == "description":
        return AnswerScore(word_accuracy(prediction, record.answer), None, True)
    if record.protocol != "word":  # of a benchmark's own questions
        official, robust = (judge_protocol(record, prediction, mode) for mode in get_args(Mode))
        return AnswerScore(robust.score, official.score, robust.parsed)
    return AnswerScore(
        float(robust_match(prediction, record.answer, vocabulary)),
        float(official_match(prediction, record.answer)),
        robust_answer(prediction, vocabulary) is not None,
    )


def question_groups(record: Record) -> tuple[str, ...]:
    """The groups a question is reported in: its protocol's and its types'."""
    return (DESCRIPTIONS if record.protocol in ("description", "text") else SINGLE, *record.groups)
