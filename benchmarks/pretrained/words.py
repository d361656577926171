"""The words of the clips: prose of Python's own reference manual, and names, places and things for the facts."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from pydoc_data import topics


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


THINGS = _words(
    """lamp door ship clock garden engine bridge window tower basket mirror ladder candle hammer piano bottle wagon
    kettle statue fountain tunnel library museum harbor factory kitchen cellar attic balcony chimney"""
)
NAMES = _words(
    """Alice Ben Clara David Emma Frank Grace Henry Irene Jack Karen Leo Maria Nina Oscar Paula Quentin Rosa Simon Tina
    Ursula Victor Wendy Xavier Yvonne Zoe"""
)
CITIES = _words(
    """Paris London Berlin Madrid Rome Vienna Athens Dublin Lisbon Oslo Cairo Tokyo Delhi Sydney Boston Chicago Denver
    Dallas Toronto Moscow Prague Warsaw Geneva Milan Naples Seoul Beijing Mumbai Nairobi Havana Lima Quito Austin
    Seattle Miami Phoenix Houston Detroit Atlanta Portland"""
)
COLORS = _words("red blue green yellow white black purple orange brown pink gray golden silver")
TRADES = _words(
    """doctor lawyer farmer teacher painter singer dancer writer baker butcher tailor driver pilot sailor soldier
    carpenter engineer chemist dentist nurse judge priest waiter plumber"""
)
BEASTS = _words(
    """horse rabbit tiger eagle dolphin parrot monkey turtle spider camel donkey goose falcon lizard badger otter
    beaver squirrel panther penguin"""
)
MEN = _words(
    """Adam Brian Carl Daniel Edward Fred George Harold Ian James Kevin Louis Mark Nathan Oliver Peter Ralph Samuel
    Thomas William"""
)
NUMBERS = ("one", "two", "three", "four")

STEM_WORDS = 7
"""Words of a quoted sentence that a question gives; the next one is its answer."""
_SHARES = {"train": range(0, 5), "validation": range(5, 6), "test": range(6, 10)}


@cache
def sentences() -> tuple[str, ...]:
    """The manual's sentences of 8 to 30 plain words, each once; another release of Python has another manual."""
    text = re.sub(r"[*`|]|:\w+:", "", "\n\n".join(topics.topics[name] for name in sorted(topics.topics)))
    found = []
    for paragraph in text.split("\n\n"):
        if not paragraph.startswith((" ", "\n", ">")):
            for sentence in re.split(r"(?<=[.?!]) +", " ".join(paragraph.split())):
                if re.fullmatch(r"[A-Z][A-Za-z ,;'()\"-]+\.", sentence) and 8 <= len(sentence.split()) <= 30:
                    found.append(sentence)
    return tuple(dict.fromkeys(found))


@cache
def quotable(split: str) -> tuple[str, ...]:
    """Sentences of at least 12 words that a split may ask about: no other split does, and no sentence begins alike."""
    longer = [sentence for sentence in sentences() if len(sentence.split()) >= 12]
    starts = [start_of(sentence) for sentence in sentences()]
    alone = [sentence for sentence in longer if starts.count(start_of(sentence)) == 1]
    return tuple(sentence for sentence in alone if _bucket(sentence) in _SHARES[split])


def start_of(sentence: str) -> str:
    """The words that a question about a quoted sentence gives."""
    return " ".join(sentence.split()[:STEM_WORDS])


def _bucket(sentence: str) -> int:
    return hashlib.sha256(sentence.encode()).digest()[0] % 10
