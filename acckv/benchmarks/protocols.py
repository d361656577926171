"""Verdicts that several benchmarks share, by the protocol of the question."""

from __future__ import annotations

from collections.abc import Collection

from acckv.benchmarks.base import Mode, Verdict
from acckv.benchmarks.letters import exact_letter
from acckv.benchmarks.music_avqa_questions import VOCABULARY, official_match, robust_answer, robust_match
from acckv.benchmarks.options import judge_letters
from acckv.data.records import Record
from acckv.metrics.captions import caption_tokens, rouge_l
from acckv.metrics.words import word_accuracy
from acckv.metrics.yes_no import leading_yes_no, robust_yes_no


def judge_protocol(record: Record, answer: str, mode: Mode) -> Verdict:
    """The verdict by `record.protocol`."""
    judges = {
        "word": judge_word,
        "description": judge_description,
        "choice": judge_choice,
        "yes_no": judge_yes_no,
        "text": judge_text,
    }
    return judges[record.protocol](record, answer, mode)


def judge_word(record: Record, answer: str, mode: Mode, vocabulary: Collection[str] = VOCABULARY) -> Verdict:
    """Official: equal up to case and trailing blanks and full stops. Robust: the first word of the vocabulary.

    The right answer belongs to the vocabulary, whose default is that of MUSIC-AVQA.
    """
    if mode == "official":
        right = official_match(answer, record.answer)
    else:
        right = robust_match(answer, record.answer, vocabulary)
    return Verdict(float(right), right or robust_answer(answer, vocabulary) is not None)


def judge_description(record: Record, answer: str, mode: Mode) -> Verdict:
    """The share of words that are right, each at its index."""
    return Verdict(word_accuracy(answer, record.answer), bool(answer.split()))


judge_choice = judge_letters(lambda answer, record: exact_letter(answer, record.options or ()))
"""Official: a letter or an option's text and nothing else. Robust: the option that a sentence means."""


def judge_yes_no(record: Record, answer: str, mode: Mode) -> Verdict:
    """Official: the first word. Robust: the first yes or no anywhere."""
    said = (leading_yes_no if mode == "official" else robust_yes_no)(answer)
    return Verdict(float(said == record.answer), said is not None)


def judge_text(record: Record, answer: str, mode: Mode) -> Verdict:
    """ROUGE-L against the references; BLEU and CIDEr are of all answers together, see `acckv.metrics.captions`."""
    return Verdict(rouge_l(answer, record.references or (record.answer,)), bool(caption_tokens(answer)))
