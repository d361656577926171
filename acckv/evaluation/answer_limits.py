"""Limits of answers in tokens: as long as the longest right one, by the tokens of the model that gives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from acckv.data.records import Record

WORDS = ("word", "choice", "yes_no")
"""Protocols of short answers; the others are read as text."""
LEAST = {**dict.fromkeys(WORDS, 4), "description": 40, "text": 40}
"""Longest answers, in tokens, about generated clips and question files, where no right one is longer."""


def longest_references(records: Iterable[Record], tokenizer: Any) -> dict[str, int]:
    """By protocol: tokens of the longest right answer, at the start of a text or after a blank, and one to end it."""
    longest: dict[str, int] = {}
    for record in records:
        texts = (record.answer, *record.references)
        spelled: Sequence[Sequence[int]] = tokenizer(
            [blank + text for text in texts for blank in ("", " ")], add_special_tokens=False
        )["input_ids"]
        tokens = max(len(ids) for ids in spelled) + 1
        longest[record.protocol] = max(tokens, longest.get(record.protocol, 0))
    return longest


def answer_limits(
    longest: Mapping[str, int], least: Mapping[str, int], word_tokens: int | None, description_tokens: int | None
) -> dict[str, int]:
    """Longest answer in tokens, by protocol: what is given for its kind, else enough for every right answer.

    Args:
        longest: as `longest_references` gives it.
        least: limit of each protocol where right answers are shorter: a model may use more words.
        word_tokens, description_tokens: the limit of short answers and of others; None is not given.
    """
    given = {protocol: word_tokens if protocol in WORDS else description_tokens for protocol in longest}
    return {
        protocol: max(tokens, least[protocol]) if given[protocol] is None else int(given[protocol] or 0)
        for protocol, tokens in longest.items()
    }
