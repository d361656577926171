"""The one record type that every question-answering loader yields."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from acckv.errors import InputError

ClipKey = tuple[Path, Path | None, float | None, float | None, tuple[Path, ...], str | None]
"""Video, sound, start, end, attachments and system prompt: what tells clips apart."""
Protocol = Literal["word", "description", "choice", "yes_no", "text"]


@dataclass(frozen=True)
class Record:
    """One question about one clip.

    Attributes:
        id: unique within its data set.
        video: media file of the clip; a picture or a sound where the data set has no video.
        audio: file of the sound, or None when the sound is in `video`.
        question: text as the data set gives it, without options or instructions.
        options: choices without their letters, or None for a free answer.
        answer: the right answer; the letter of a choice.
        groups: question types to report on, from coarse to fine, e.g. `("Audio-Visual", "Audio-Visual/Temporal")`.
        protocol: how the answer is scored: one "word", a "description" word by word, a "choice" by its letter,
            "yes_no", or free "text" against `references`.
        references: every right text, for "text"; the first is `answer`.
        start, end: seconds of `video` that the question is about; None for the whole.
        attachments: further pictures and sounds, in the order in which the question names them.
        system_prompt: what the model is told before the media; None leaves that to its chat template.
        complete: whether the answer ends where its text does; False for a model's answer that a limit ended.
    """

    id: str
    video: Path
    audio: Path | None
    question: str
    options: tuple[str, ...] | None
    answer: str
    groups: tuple[str, ...]
    protocol: Protocol
    references: tuple[str, ...] = ()
    start: float | None = None
    end: float | None = None
    attachments: tuple[Path, ...] = ()
    system_prompt: str | None = None
    complete: bool = True

    @property
    def clip(self) -> ClipKey:
        """The key of the clip: questions with the same one are asked of one prefill."""
        return self.video, self.audio, self.start, self.end, self.attachments, self.system_prompt


def with_system_prompt(records: Iterable[Record], system_prompt: str | None) -> list[Record]:
    """Records with a system prompt, those that have one of their own as they are.

    Raises:
        InputError: it is blank.
    """
    if system_prompt is None:
        return list(records)
    if not system_prompt.strip():
        raise InputError("is blank; leave it out", field="system_prompt")
    return [
        record if record.system_prompt is not None else replace(record, system_prompt=system_prompt)
        for record in records
    ]
