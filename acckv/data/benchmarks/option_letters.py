"""Which option an answer means, and how options are shown."""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"


def show_options(options: Sequence[str]) -> str:
    """One line an option, `A. ...`."""
    return "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))


def exact_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter of an answer that is nothing but a letter (`B`, `b.`, `(B)`), an option's text, or both (`B. cat`)."""
    text = _plain(answer)
    for letter, option in zip(LETTERS, options, strict=False):
        if text in (letter.lower(), _plain(option), _plain(f"{letter}. {option}"), _plain(f"({letter}) {option}")):
            return letter
    return None


def robust_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter that a sentence means, None where it cannot be told.

    Tried in turn, on what follows the last `</think>`: the whole answer (`exact_letter`); a letter after "answer" or
    "option"; a letter at the start; the only option whose text occurs; the only lone letter. An article is no letter:
    "A dog barks" is not option A.
    """
    text = answer.rpartition("</think>")[2].strip()
    whole = exact_letter(text, options)
    if whole is not None:
        return whole
    letters = LETTERS[: len(options)]
    either = f"[{letters}{letters.lower()}]"
    marked = rf"[(\[*]+({either})[)\]*]+|({either})[.:,)](?=\s|$)|([{letters}])(?![\w'])(?!\s+[a-z])"
    named = re.findall(rf"(?i:\banswer|\boption|\bchoice)(?i:\s+is)?\s*:?\s*(?:{marked})", text)
    if named:
        return _first(named[-1])
    leading = re.match(marked, text)
    if leading:
        return _first(leading.groups())
    found = [letter for letter, option in zip(letters, options, strict=False) if _occurs(option, text, options)]
    if len(found) == 1:
        return found[0]
    lone = {_first(groups) for groups in re.findall(rf"(?<![\w'])(?:{marked})", text)}
    return lone.pop() if not found and len(lone) == 1 else None


def _occurs(option: str, text: str, options: Sequence[str]) -> bool:
    """Whether an option occurs as whole words outside the longer options that hold it."""
    rest = text.lower()
    for longer in options:
        if len(longer) > len(option) and option.lower() in longer.lower():
            rest = rest.replace(longer.lower(), " ")
    return re.search(rf"(?<!\w){re.escape(option.lower())}(?!\w)", rest) is not None


def _first(groups: Sequence[str | None]) -> str:
    return next(group for group in groups if group).upper()


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().strip(".:,()[]* ").lower()
