"""Clips as models take them: pictures and sound for a processor, or embeddings for a plain decoder."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

from torch import Tensor

from acckv.method.modality import Modality

Kind = Literal["audio-video", "video", "audio"]
KINDS: tuple[Kind, ...] = get_args(Kind)
TEMPORAL_PATCH = 2
"""Pictures that the model joins into one temporal patch."""


@dataclass(frozen=True)
class Media:
    """One clip, as a processor wants it: pictures, sound or both.

    Attributes:
        frames: uint8 [count, 3, height, width]; `count` is even and at least 2. None for sound alone.
        audio: float32 [samples] mono. Beside frames exactly as long as they are (count / fps seconds), or longer where
            `join_media` made it so. None without a sound track.
        duration: seconds of media in the file (before rounding to whole temporal patches).
        path: the file.
        fps: frames a second.
        sampling_rate: samples a second.
    """

    frames: Tensor | None
    audio: Tensor | None
    duration: float
    path: Path
    fps: float = 2.0
    sampling_rate: int = 16_000

    @property
    def kind(self) -> Kind:
        """Pictures, sound or both. A batch holds clips of one kind."""
        if self.frames is None:
            return "audio"
        return "video" if self.audio is None else "audio-video"

    @property
    def samples(self) -> int:
        """Samples of sound that are as long as the pictures."""
        return 0 if self.frames is None else round(len(self.frames) / self.fps * self.sampling_rate)

    def parts(self, seconds: float) -> Iterator[Media]:
        """The clip in pieces of about so many seconds, each of whole temporal patches, as a stream would bring it.

        Sound that goes on after the last picture belongs to the last piece.
        """
        patches = max(round(seconds * self.fps / TEMPORAL_PATCH), 1) * TEMPORAL_PATCH
        samples = self.sampling_rate / self.fps
        sound = 0 if self.audio is None else math.ceil(len(self.audio) / samples)
        count = sound if self.frames is None else len(self.frames)
        for start in range(0, count, patches):
            stop = min(start + patches, count)
            frames = None if self.frames is None else self.frames[start:stop]
            last = None if stop == count else round(stop * samples)
            audio = None if self.audio is None else self.audio[round(start * samples) : last]
            yield replace(self, frames=frames, audio=audio, duration=(stop - start) / self.fps)


@dataclass(frozen=True)
class PrecomputedClip:
    """A clip as it enters a decoder.

    Attributes:
        embeds: floating ``[tokens, width]``.
        modality_ids: int64 ``[tokens]`` of text, video and audio.
        path: the file.
    """

    embeds: Tensor
    modality_ids: Tensor
    path: Path

    @cached_property
    def kind(self) -> Kind:
        """Video, audio or both, as `Media.kind`."""
        video, audio = (bool((self.modality_ids == kind).any()) for kind in (Modality.VIDEO, Modality.AUDIO))
        return "audio-video" if video and audio else "audio" if audio else "video"
