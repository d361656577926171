"""The one record that every question-answering loader yields."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Record:
    """One question about one clip.

    Attributes:
        id: unique within its data set.
        video: media file of the clip.
        audio: file of the sound, or None when the sound is in `video`.
        question: text as it is asked.
        options: choices, or None for a free answer.
        answer: the right answer.
        groups: question types to report on, from coarse to fine, e.g. `("Audio-Visual", "Audio-Visual/Temporal")`.
        protocol: how the answer is scored: one "word", or a "description" word by word.
    """

    id: str
    video: Path
    audio: Path | None
    question: str
    options: tuple[str, ...] | None
    answer: str
    groups: tuple[str, ...]
    protocol: Literal["word", "description"]
