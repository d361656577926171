"""Decoded pictures as a viewer shows them: upright, with square pixels, no larger than asked for."""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image
from torch import Tensor

from acckv.errors import InputError

EXIF_ORIENTATION = 274
NARROWEST, WIDEST = 0.1, 10.0
"""Width of a pixel by its height; a header that states anything else is damaged, and its pixels count as square."""


@dataclass(frozen=True)
class Orientation:
    """The turn of a stored picture to be shown: first mirrored at its main diagonal, then left-right and up-down."""

    transpose: bool = False
    mirror: bool = False
    flip: bool = False

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """A picture ``[height, width, 3]`` as it is shown."""
        pixels = pixels.transpose(1, 0, 2) if self.transpose else pixels
        pixels = pixels[:, ::-1] if self.mirror else pixels
        return pixels[::-1] if self.flip else pixels


EXIF = {
    2: Orientation(mirror=True),
    3: Orientation(mirror=True, flip=True),
    4: Orientation(flip=True),
    5: Orientation(transpose=True),
    6: Orientation(transpose=True, mirror=True),
    7: Orientation(transpose=True, mirror=True, flip=True),
    8: Orientation(transpose=True, flip=True),
}
"""EXIF's orientation tag; anything else is upright."""


def exif_orientation(container: av.container.InputContainer, path: Path) -> Orientation | None:
    """That of a picture file (a camera's JPEG), by its EXIF tag; None for any other file."""
    if container.format.name != "image2" and not container.format.name.endswith("_pipe"):
        return None
    try:
        with Image.open(path) as picture:
            return EXIF.get(picture.getexif().get(EXIF_ORIENTATION, 1), Orientation())
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return Orientation()  # a damaged tag; the pixels are FFmpeg's concern


def pixel_aspect(stream: av.VideoStream) -> float:
    """Width of a stream's pixels by their height, 1 for square ones."""
    ratio = stream.sample_aspect_ratio
    return float(ratio) if ratio and NARROWEST <= ratio <= WIDEST else 1.0


class PictureConverter:
    """Makes tensors of decoded pictures. All of one converter have the size of the first.

    Args:
        source: the file, for errors and warnings.
        max_pixels: larger pictures are scaled down to about so many; None keeps them.
        aspect: width of a pixel by its height.
        orientation: of all pictures; None is what each states in its display matrix.
    """

    def __init__(
        self, source: Path, max_pixels: int | None, aspect: float = 1.0, orientation: Orientation | None = None
    ) -> None:
        self.source, self.max_pixels, self.aspect, self.orientation = source, max_pixels, aspect, orientation
        self._size: tuple[int, int] | None = None
        self._scaler = VideoReformatter()

    def __call__(self, frame: av.VideoFrame) -> Tensor:
        """A picture: uint8 ``[3, height, width]``.

        Raises:
            InputError: it cannot be converted.
        """
        orientation = self.orientation or self._stated(frame)
        width, height = max(1, round(frame.width * self.aspect)), frame.height
        if self.max_pixels is not None and width * height > self.max_pixels:
            scale = (self.max_pixels / (width * height)) ** 0.5
            width, height = max(2, round(width * scale)), max(2, round(height * scale))
        if self._size is not None:
            height, width = self._size[::-1] if orientation.transpose else self._size
        try:
            scaled = self._scaler.reformat(frame, width=width, height=height, format="rgb24").to_ndarray()
        except (av.FFmpegError, ValueError) as error:
            raise InputError(f"a picture cannot be converted ({error})", source=self.source) from error
        pixels = orientation.apply(scaled)
        self._size = pixels.shape[0], pixels.shape[1]
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    def _stated(self, frame: av.VideoFrame) -> Orientation:
        """From the display matrix ``[a b . c d . . . .]``, which sends (x, y) to (ax + cy, bx + dy)."""
        try:
            data: Any = frame.side_data.get("DISPLAYMATRIX")
        except ValueError:  # side data of a kind that this PyAV does not know hides all others
            data = None
        if data is None:
            return Orientation()
        a, b, _, c, d = struct.unpack("=5i", bytes(data)[:20])
        if min(max(abs(a), abs(d)), max(abs(b), abs(c))) > 2**16 / 50:  # more than about a degree
            text = f"{self.source}: pictures are turned by {frame.rotation:g} degrees; the nearest right angle is taken"
            warnings.warn(text, stacklevel=2)
        if abs(b) + abs(c) > abs(a) + abs(d):
            return Orientation(True, c < 0, b < 0)
        return Orientation(False, a < 0, d < 0)
