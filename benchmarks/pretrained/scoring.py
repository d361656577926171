"""The score of an answer, by the same rule whoever gave it."""

from __future__ import annotations

import re
from typing import Literal


def score(scored: Literal["exact", "checklist"], given: str, right: str) -> float:
    """The score 0..1 of an answer.

    Args:
        scored: `exact`, 1 if the text begins with the right answer as whole words; `checklist`, the share of the right
            answer's items, which commas separate, that the text has among its own.
        given: the text that a model went on with; right: the answer.
    """
    given, right = given.strip(), right.strip()
    if scored == "exact":
        return float(re.match(re.escape(right) + r"(?!\w)", given) is not None)
    wanted = _items(right)
    return len(wanted & _items(given)) / len(wanted)


def _items(text: str) -> set[str]:
    return {" ".join(item.split()).rstrip(".") for item in text.split(",")}
