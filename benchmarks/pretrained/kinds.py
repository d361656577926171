"""Six kinds of clips for a plain decoder: a text whose two halves stand for video and audio, and questions about it.

A question is a stem that the model continues, "The code of the lamp is" -> "4821". It is unknown while the text is
read. What a kind asks for can be read from the text alone, and there from one place, but for `joined` (a place in
either half), `counted` (places in both) and `summary` (all facts of a half). A clip is a function of its kind, split,
number and size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.pretrained.words import (
    BEASTS,
    CITIES,
    COLORS,
    MEN,
    NAMES,
    NUMBERS,
    STEM_WORDS,
    THINGS,
    TRADES,
    quotable,
    sentences,
    start_of,
)

Split = Literal["train", "validation", "test"]
START = "Read the following text and remember it.\n\n"
FIRST_SEED = {"train": 100_000, "finetuning": 200_000, "validation": 300_000, "test": 400_000, "check": 900_000}
"""Seed of the first clip of each use; the decoder itself is fine-tuned and checked on clips of its own."""
_SPLIT_OF = {"finetuning": "train", "check": "validation"}


@dataclass(frozen=True)
class Size:
    """Facts of a half, sentences of prose between them, and sentences of a half where there are no facts."""

    facts: int
    prose: int
    quoted: int


SIZES = {500: Size(5, 8, 13), 4000: Size(12, 92, 92)}
"""By about how many tokens a clip has."""


@dataclass(frozen=True)
class Question:
    """A stem, the text that continues it, and the half that it is about."""

    stem: str
    answer: str
    half: str


@dataclass(frozen=True)
class Clip:
    """A text in its three parts, and what is asked about it."""

    start: str
    video: str
    audio: str
    questions: tuple[Question, ...]

    @property
    def text(self) -> str:
        return self.start + self.video + self.audio


@dataclass(frozen=True)
class Kind:
    """A kind of clips.

    Attributes:
        make: a clip of a size, drawn from a generator, for a split.
        asks: what is asked, in words.
        scored: by the exact answer, or by the share of a checklist's items that are named.
        few_valued: whether guessing is often right, so that a table without its control says nothing.
    """

    make: Callable[[random.Random, Size, Split], Clip]
    asks: str
    scored: Literal["exact", "checklist"] = "exact"
    few_valued: bool = False


def make_clip(kind: str, use: str, number: int, size: Size = SIZES[500]) -> Clip:
    """Clip `number` (from 0) of a use: a split, or the fine-tuning or the check of the decoder."""
    split: Split = _SPLIT_OF.get(use, use)  # type: ignore[assignment]
    return KINDS[kind].make(random.Random(FIRST_SEED[use] + number), size, split)


def _facts(draw: random.Random, size: Size, split: Split) -> Clip:
    codes = _pairs(draw, THINGS, range(1000, 10000), size.facts)
    homes = _pairs(draw, NAMES, CITIES, size.facts)
    said = _said("The code of the {} is {}.", codes), _said("{} lives in {}.", homes)
    asked = _asked("The code of the {} is", codes, "video") + _asked("{} lives in", homes, "audio")
    return _scattered(draw, said, asked, size.prose)


def _other(draw: random.Random, size: Size, split: Split) -> Clip:
    coats = _pairs(draw, BEASTS, COLORS, size.facts)
    trades = _pairs(draw, MEN, TRADES, size.facts)
    said = _said("The color of the {} is {}.", coats), _said("{} works as a {}.", trades)
    asked = _asked("The color of the {} is", coats, "video") + _asked("{} works as a", trades, "audio")
    return _scattered(draw, said, asked, size.prose)


def _quotes(draw: random.Random, size: Size, split: Split) -> Clip:
    quoted = draw.sample(quotable(split), 2 * size.facts)
    taken = set(quoted)
    others = draw.sample([one for one in sentences() if one not in taken], 2 * (size.quoted - size.facts))
    halves, asked = [], []
    for number, half in enumerate(("video", "audio")):
        mine = quoted[number::2]
        lines = mine + others[number::2]
        draw.shuffle(lines)
        halves.append(" ".join(lines))
        asked += [Question("\n\n" + start_of(one), " " + one.split()[STEM_WORDS].strip(",;"), half) for one in mine]
    return Clip(START, halves[0], " " + halves[1], tuple(asked))


def _joined(draw: random.Random, size: Size, split: Split) -> Clip:
    codes = _pairs(draw, THINGS, range(1000, 10000), size.facts)
    holders = dict(zip(draw.sample(NAMES, size.facts), codes, strict=True))
    said = _said("The code of the {} is {}.", codes), _said("{} holds the {}.", holders)
    through = {name: codes[thing] for name, thing in holders.items()}
    return _scattered(draw, said, _asked("The code of the thing that {} holds is", through, "both"), size.prose)


def _counted(draw: random.Random, size: Size, split: Split) -> Clip:
    """Of each beast one to four sightings by people of their own, dealt out to the halves."""
    times = {beast: draw.choice(range(1, 1 + len(NUMBERS))) for beast in draw.sample(BEASTS, max(2, size.facts - 1))}
    people = iter(draw.sample(NAMES + MEN, sum(times.values())))
    seen = [f"{next(people)} saw the {beast}." for beast, count in times.items() for _ in range(count)]
    draw.shuffle(seen)
    asked = _asked("The number of people who saw the {} is", {b: NUMBERS[n - 1] for b, n in times.items()}, "both")
    return _scattered(draw, (seen[::2], seen[1::2]), asked, size.prose)


def _summary(draw: random.Random, size: Size, split: Split) -> Clip:
    codes = _pairs(draw, THINGS, range(1000, 10000), size.facts)
    homes = _pairs(draw, NAMES, CITIES, size.facts)
    said = _said("The code of the {} is {}.", codes), _said("{} lives in {}.", homes)
    clip = _scattered(draw, said, [], size.prose)
    lists = _in_order(codes, "the {} is", clip.video), _in_order(homes, "{} lives", clip.audio)
    stems = "\n\nThe codes of all things are:", "\n\nThe homes of all people are:"
    asked = [Question(*parts) for parts in zip(stems, lists, ("video", "audio"), strict=True)]
    return Clip(clip.start, clip.video, clip.audio, tuple(asked))


def _pairs(draw: random.Random, keys: Sequence[str], values: Sequence[object], count: int) -> dict[str, object]:
    return dict(zip(draw.sample(keys, count), draw.sample(values, count), strict=True))


def _said(sentence: str, facts: Mapping[str, object]) -> list[str]:
    return [sentence.format(*fact) for fact in facts.items()]


def _asked(stem: str, facts: Mapping[str, object], half: str) -> list[Question]:
    return [Question("\n\n" + stem.format(key), f" {value}", half) for key, value in facts.items()]


def _in_order(facts: dict[str, object], place: str, text: str) -> str:
    """A list of facts in the order in which the text has them."""
    keys = sorted(facts, key=lambda key: text.index(place.format(key)))
    return " " + ", ".join(f"{key} {facts[key]}" for key in keys)


def _scattered(draw: random.Random, said: Iterable[list[str]], asked: Sequence[Question], prose: int) -> Clip:
    halves = []
    for lines in said:
        lines = lines + draw.sample(sentences(), prose)
        draw.shuffle(lines)
        halves.append(" ".join(lines))
    return Clip(START, halves[0], " " + halves[1], tuple(asked))


KINDS = {
    "facts": Kind(_facts, "facts, one a sentence"),
    "other": Kind(_other, "facts of other kinds, in other words"),
    "quotes": Kind(_quotes, "a word of the prose, from the seven before it"),
    "joined": Kind(_joined, "a fact of one half, named by a fact of the other"),
    "counted": Kind(_counted, "how many of something there are in both halves", few_valued=True),
    "summary": Kind(_summary, "all facts of a half", scored="checklist"),
}
