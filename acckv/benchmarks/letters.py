"""Find the letter of a choice in an answer: one parser a benchmark as its authors wrote it, and one that is right.

The official parsers are kept as they are, faults included, because published numbers were made with them. Each
docstring names its origin and its faults. All of them take any text and never raise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"

WORLDSENSE_PREFIXES = (
    *("The best answer is", "The correct answer is", "The answer is", "The answer"),
    *("The best option isThe correct option is", "Best answer:Best option:"),
    *("Answer:", "Option:"),
)
"""Removed before the letter is looked for. Two pairs are run together in the original, where a comma is missing."""

VIDEO_MME_PREFIXES = (*WORLDSENSE_PREFIXES, "The correct answer", "The correct option")


def first_capital(answer: str, prefixes: Sequence[str]) -> str | None:
    """The first capital A to D after removing some phrases (Video-MME, WorldSense).

    Any word with such a capital counts: "Best answer: D" and "Because of D" are B, "Correct: D" is C.
    """
    text = answer.strip()
    for prefix in prefixes:
        text = text.replace(prefix, "")
    found = re.search("[ABCD]", text)
    return found[0] if found else None


def leading_letter(answer: str) -> str | None:
    """The letter an answer begins with, of either case (Daily-Omni, script for Qwen2.5-Omni).

    Where the text holds "assistant", only what follows its first place counts. "Dogs bark" is D, "The answer is B" and
    "(B)" are nothing.
    """
    role = re.search(r"assistant\s*([\s\S]*)$", answer)
    found = re.match(r"\s*([A-D])", role[1].strip() if role else answer, re.IGNORECASE)
    return found[1].upper() if found else None


def first_word_matches(answer: str, letter: str) -> bool:
    """Whether the first word of an answer is part of "(X)" or holds it (MVBench).

    Only the first line counts, full stops are dropped, and case is ignored. An empty answer is part of every "(X)" and
    so always right; "Answer: (B)" and "B: left" are always wrong.
    """
    word, option = answer.strip().split("\n")[0].lower().split(" ")[0], f"({letter.lower()})"
    return word.replace(".", "") in option or option in word


def omnibench_letter(answer: str, options: Sequence[str]) -> str | None:
    """MMMU's parser as changed by OmniBench: "(A)", then "A " inside or after any word, then "A.", then option texts.

    "NASA did" is A, "B: left" is nothing. Of several forms with brackets or letters the last that stands alone wins, or
    the first option where none does. Texts of options count in answers of more than five words; the last wins.
    """
    text, letters = f" {answer} ", LETTERS[: len(options)]
    for form, place in (("({})", "({})"), ("{} ", " {} "), ("{}.", " {} ")):
        found = [letter for letter in letters if form.format(letter) in text]
        if found:
            return max(found, key=lambda letter: text.rfind(place.format(letter)))
    return _last_text(text, options)


def av_odyssey_letter(answer: str, options: Sequence[str]) -> str | None:
    """AV-Odyssey's parser; its caller takes None for A.

    Meant is MMMU's, but brackets are missing where a letter is looked for: every capital A to D of the answer is found.
    Of several the last in brackets wins, or the first of the alphabet: "Answer: D" and "A dog, so C" are A.
    """
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    text = f" {answer} "
    found = [letter for letter in LETTERS[: len(options)] if letter in text]
    if found:
        return max(found, key=lambda letter: text.rfind(f"({letter})"))
    return _last_text(text, options)


def exact_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter of an answer that is nothing but a letter (`B`, `b.`, `(B)`), an option's text, or both (`B. cat`)."""
    text = _bare(answer)
    for letter, option in zip(LETTERS, options, strict=False):
        if text in (letter.lower(), _bare(option), _bare(f"{letter}. {option}"), _bare(f"({letter}) {option}")):
            return letter
    return None


def robust_letter(answer: str, options: Sequence[str]) -> str | None:
    """The letter that a careful reader takes an answer for; None where it names no choice.

    Reasoning up to `</think>` is left out and an `<answer>` is all that counts. Then, first that is found: the whole
    answer is a letter or an option's text; a statement such as "the answer is (B)" or "**Answer:** B", the last one; a
    letter at the very beginning; the last letter that stands alone; the only option whose text occurs. "A" as an
    article is no letter.
    """
    text = answer.rpartition("</think>")[2]
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL | re.IGNORECASE)
    text = (tagged[-1] if tagged else text).strip()
    letters = LETTERS[: len(options)]
    if not letters:
        return None
    bare = text.strip(" \t\n().:*[]\"'`").upper()
    if len(bare) == 1 and bare in letters:
        return bare
    texts = [_plain(option) for option in options]
    if texts.count(_plain(text)) == 1:
        return letters[texts.index(_plain(text))]
    letter = rf"(?:(?<!\w)[{letters}](?!\w|['\u2019]\w)(?<!A(?=\s[a-z]))|(?<!\w)A(?=\s(?:is|because|since|as)\b))"
    mark = r"[\s*_:=\"'(\[{]*"
    for statement in (
        rf"(?i:\b(?:answer|choice)\b{mark}(?:is|be)?){mark}({letter})",
        rf"(?i:\boption){mark}({letter})",
    ):
        stated = re.findall(statement, text)
        if stated:
            return str(stated[-1])
    leading = re.match(rf"{mark}({letter})", text)
    if leading:
        return leading[1]
    alone = re.findall(letter, text)
    if alone:
        return str(alone[-1])
    return _only_text(_plain(text), texts)


def _last_text(text: str, options: Sequence[str]) -> str | None:
    """The option whose text occurs last, if the answer has more than five words."""
    text = text.lower()
    if len(text.split()) <= 5:
        return None
    places = [text.rfind(option.lower()) for option in options]
    return LETTERS[places.index(max(places))] if max(places, default=-1) >= 0 else None


def _only_text(text: str, options: Sequence[str]) -> str | None:
    """The only option whose words occur in a text; one that is part of another found one does not count."""
    found = [option for option in options if option and f" {option} " in f" {text} "]
    longest = [option for option in found if not any(option != other and option in other for other in found)]
    return LETTERS[options.index(longest[0])] if len(longest) == 1 else None


def _plain(text: str) -> str:
    """Words alone: lower case, anything else a single blank."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _bare(text: str) -> str:
    """Lower case, single blanks, and no marks around it."""
    return re.sub(r"\s+", " ", text).strip().strip(".:,()[]* ").lower()
