"""The options of reading media files, for every command and function that reads clips."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from acckv.errors import InputError

MAX_PIXELS = 768 * 32 * 32
"""Pixels of a frame: the most that a supported processor makes use of (768 tokens of 32 x 32 pixels)."""
MAX_SECONDS = 600.0
"""Seconds of one clip: 16 kHz sound of 38 MB, and at 2 frames a second at most 2.8 GB of frames."""


@dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """Options of reading a media file: how much of it, at which rate and size.

    Args:
        fps: pictures a second that are sampled.
        max_seconds: longest clip; a longer one is refused, or cut where `cut_long` is set. It bounds memory.
        max_frames: most pictures of a file; a longer clip is sampled evenly, at fewer a second. None is any number.
        max_pixels: of a picture; larger ones are scaled down to about so many. None keeps them.
        cut_long: take the first `max_seconds` of a longer clip, with a warning, instead of refusing it.

    Raises:
        InputError: an option is out of range.
    """

    fps: float = 2.0
    max_seconds: float = MAX_SECONDS
    max_frames: int | None = None
    max_pixels: int | None = MAX_PIXELS
    cut_long: bool = False

    def __post_init__(self) -> None:
        for name in ("fps", "max_seconds", "max_pixels"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{value} is not a number above 0", field=name)
        if self.max_frames is not None and self.max_frames < 2:
            raise InputError(f"{self.max_frames} is less than 2, the pictures of a temporal patch", field="max_frames")

    def limits(self) -> dict[str, Any]:
        """These options by name, without what a subclass adds: keyword arguments of `read_media`."""
        return {item.name: getattr(self, item.name) for item in fields(MediaOptions)}
