"""Options, records, groups and verdicts of multiple-choice questions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from acckv.benchmarks.base import Mode, Verdict
from acckv.benchmarks.letters import LETTERS, robust_letter
from acckv.data.records import Record
from acckv.io.fields import Fields


def choice_record(
    fields: Fields,
    id: str,
    video: Path,
    groups: Iterable[str],
    names: tuple[str, str, str] = ("question", "options", "answer"),
    right: Callable[[Fields], str] | None = None,
    **others: Any,
) -> Record:
    """The record of a question.

    Args:
        names: of the fields with the question, its options, and the letter of the right one.
        right: gives that letter, where it is in no field.
        others: further attributes of the record.
    """
    question, listed, answer = names
    options = bare_options(fields, listed)
    return Record(
        id=id,
        video=video,
        audio=others.pop("audio", None),
        question=fields.string(question),
        options=options,
        answer=right(fields) if right else fields.choice(answer, LETTERS[: len(options)]),
        groups=tuple(groups),
        protocol="choice",
        **others,
    )


def groups_of(fields: Fields, names: Mapping[str, str]) -> list[str]:
    """Groups such as "duration/short", from the name of each kind of group to the field with its value."""
    return [f"{kind}/{fields.string(field)}" for kind, field in names.items()]


def bare_options(fields: Fields, field: str) -> tuple[str, ...]:
    """Options without their letters, from texts such as "A. left"; texts that have none are taken as they are.

    Raises:
        InputError: no list of at least two texts and at most as many as there are LETTERS.
    """
    options = fields.strings(field)
    if not 2 <= len(options) <= len(LETTERS):
        raise fields.error(field, f"expected 2 to {len(LETTERS)} options, got {len(options)}")
    marks = [re.match(rf"\s*\(?{letter}[.:)] ?", option) for letter, option in zip(LETTERS, options, strict=False)]
    if all(marks):
        options = [option[mark.end() :] for mark, option in zip(marks, options, strict=True) if mark]
    return tuple(options)


def lettered(options: Sequence[str] | None, form: str = "{}. {}") -> list[str]:
    """Options with letters, e.g. `["A. left", "B. right"]`."""
    return [form.format(letter, option) for letter, option in zip(LETTERS, options or (), strict=False)]


def in_groups(groups: Iterable[str], subset: str | None) -> bool:
    """Whether a subset is one of some groups; "short" stands for "duration/short", and None for all."""
    return subset is None or any(subset in (group, group.partition("/")[2]) for group in groups)


def in_subset(records: Iterable[Record], subset: str | None) -> list[Record]:
    """Records with a group, see `in_groups`."""
    return [record for record in records if in_groups(record.groups, subset)]


def judge_letters(official: Callable[[str, Record], str | None]) -> Callable[[Record, str, Mode], Verdict]:
    """A benchmark's `judge`, from its official parser `(answer, record)` to a letter or None."""

    def judge(record: Record, answer: str, mode: Mode) -> Verdict:
        found = official(answer, record) if mode == "official" else robust_letter(answer, record.options or ())
        return Verdict(float(found == record.answer), found is not None)

    return judge
