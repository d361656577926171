"""Rotary position embedding as a layer applies it, taken off and put on again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class RotaryLayout:
    """The elements of a head that are turned together, and the way they read the tables of cosines and sines.

    Args:
        head_size: D; start, size: the part of a head that is turned; size 0 for a layer without position embedding.
        neighbours: pairs are (i, i + 1), else (i, i + size / 2).
        interleaved: a table holds each angle twice side by side, else all angles once or twice over.
    """

    head_size: int
    start: int = 0
    size: int = 0
    neighbours: bool = False
    interleaved: bool = False

    def spread(self, table: Tensor, rest: float) -> Tensor:
        """A table ``[..., width]`` as a value for each element of a head ``[..., D]``; `rest` where none is turned."""
        half = self.size // 2
        angles = table[..., : self.size : 2] if self.interleaved else table[..., :half]
        both = angles.repeat_interleave(2, dim=-1) if self.neighbours else torch.cat([angles, angles], dim=-1)
        return F.pad(both, (self.start, self.head_size - self.start - self.size), value=rest)

    def turned(self, vectors: Tensor) -> Tensor:
        """``[..., D]``: each element's partner, the first of a pair negated."""
        stop = self.start + self.size
        part = vectors[..., self.start : stop]
        if self.neighbours:
            part = torch.stack([-part[..., 1::2], part[..., ::2]], dim=-1).flatten(-2)
        else:
            first, second = part.chunk(2, dim=-1)
            part = torch.cat([-second, first], dim=-1)
        return torch.cat([vectors[..., : self.start], part, vectors[..., stop:]], dim=-1)


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of a prompt in one layer, and its mean over the positions to come.

    Args:
        cos, sin: ``[B, N, D]``; ahead_cos, ahead_sin: ``[B, D]``.
        layout: of the layer.
    """

    cos: Tensor
    sin: Tensor
    ahead_cos: Tensor
    ahead_sin: Tensor
    layout: RotaryLayout

    def to(self, device: torch.device) -> Rotation:
        """The same on a device."""
        tensors = ("cos", "sin", "ahead_cos", "ahead_sin")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor, layout: RotaryLayout) -> Tensor:
    """Rotate ``[..., D]``; the mean of several rotations is applied in the same way."""
    return vectors * cos + layout.turned(vectors) * sin


def unrotate(vectors: Tensor, cos: Tensor, sin: Tensor, layout: RotaryLayout) -> Tensor:
    """Undo :func:`rotate`, a scaling of the embedding (as long-context variants have) included."""
    return (vectors * cos - layout.turned(vectors) * sin) / (cos.square() + sin.square())
