"""Word accuracy of a description, position by position."""

from __future__ import annotations


def word_accuracy(prediction: str, reference: str) -> float:
    """Share (0..1) of the reference's words that the prediction has at the same position.

    Words are split at white space and compared without regard to case. A word too many or too few shifts all that
    follows, which then counts as wrong: the descriptions measured here are read slot by slot.

    Raises:
        ValueError: the reference has no words.
    """
    expected = reference.lower().split()
    if not expected:
        raise ValueError("the reference description has no words")
    given = prediction.lower().split()
    return sum(a == b for a, b in zip(given, expected, strict=False)) / len(expected)
