"""Rotary position embedding, taken off and put on again: pairs are (i, i + D/2), as in all transformers models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """The rotary embedding of a prompt, and its mean over the positions to come.

    Args:
        cos, sin: ``[B, N, D]``; ahead_cos, ahead_sin: ``[B, D]``.
    """

    cos: Tensor
    sin: Tensor
    ahead_cos: Tensor
    ahead_sin: Tensor

    def to(self, device: torch.device) -> Rotation:
        """The same on a device."""
        return Rotation(*(part.to(device) for part in (self.cos, self.sin, self.ahead_cos, self.ahead_sin)))


def rotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[..., D]``; the mean of several rotations is applied in the same way."""
    return vectors * cos + _turned(vectors) * sin


def unrotate(vectors: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo :func:`rotate`, a scaling of the embedding (as long-context variants have) included."""
    return (vectors * cos - _turned(vectors) * sin) / (cos.square() + sin.square())


def _turned(vectors: Tensor) -> Tensor:
    first, second = vectors.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
