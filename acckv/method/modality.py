"""The modality of each entry of a prompt: text, video, audio or padding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from acckv.errors import InputError


class Modality(IntEnum):
    """Label of one cache entry."""

    TEXT = 0
    VIDEO = 1
    AUDIO = 2
    PADDING = 3


#: Least variance that a score is standardised by.
VARIANCE_FLOOR = 1e-8
#: How many numbers stand for an entry's position in its segment.
SEGMENT_POSITIONS = 3
#: The order of the last axis of every per-modality tensor in this package.
COMPRESSED = (Modality.VIDEO, Modality.AUDIO)


def _made_on_host(make: Callable[[ModalityMap], Tensor]) -> cached_property[Tensor]:
    """A tensor that is made on the CPU and moved once: on an accelerator, one launch instead of many."""

    def value(self: ModalityMap) -> Tensor:
        return make(self) if self.host is self else getattr(self.host, make.__name__).to(self.labels.device)

    value.__doc__ = make.__doc__
    return cached_property(value)


@dataclass(frozen=True)
class ModalityMap:
    """The label of every entry of a batch of prompts.

    Args:
        labels: int64 ``[batch, tokens]`` of :class:`Modality` values.
    """

    labels: Tensor

    def __post_init__(self) -> None:
        if self.labels.ndim != 2 or self.labels.is_floating_point():
            raise InputError(f"needs integers of shape [batch, tokens], not {tuple(self.labels.shape)}", field="labels")

    @cached_property
    def host(self) -> ModalityMap:
        """The same on the CPU, where shapes and budgets are decided: an accelerator is waited for once."""
        return self if self.labels.device.type == "cpu" else ModalityMap(self.labels.cpu())

    @cached_property
    def _elsewhere(self) -> dict[torch.device, ModalityMap]:
        return {}

    def to(self, device: torch.device) -> ModalityMap:
        """The same on a device; what is known of it on the CPU goes with it."""
        if self.labels.device == device:
            return self
        if device.type == "cpu":
            return self.host
        moved = self._elsewhere.get(device) or ModalityMap(self.labels.to(device))
        vars(moved)["host"] = self.host
        if self is not self.host:  # which its copies know: no ring
            self._elsewhere[device] = moved
        return moved

    @cached_property
    def is_padded(self) -> bool:
        """Whether any entry of any row is padding."""
        return not bool(self.host.real.all())

    @_made_on_host
    def text(self) -> Tensor:
        """bool ``[batch, tokens]``"""
        return self.labels == Modality.TEXT

    @_made_on_host
    def media(self) -> Tensor:
        """bool ``[batch, tokens]``: audio or video."""
        return (self.labels == Modality.VIDEO) | (self.labels == Modality.AUDIO)

    @_made_on_host
    def by_modality(self) -> Tensor:
        """bool ``[batch, 2, tokens]`` in the order of :data:`COMPRESSED`."""
        return torch.stack([self.labels == modality for modality in COMPRESSED], dim=1)

    @_made_on_host
    def masks(self) -> Tensor:
        """float32 ``[batch, 2, tokens]``: 1 for the entries of each modality."""
        return self.by_modality.float()

    @_made_on_host
    def averaging(self) -> Tensor:
        """float32 ``[batch, tokens, 2]``: what a score is multiplied by to get its mean in each modality."""
        return (self.masks / self.masks.sum(-1, keepdim=True).clamp_min(1)).transpose(1, 2)

    @cached_property
    def variance_floor(self) -> Tensor:
        """``[1, 1, 1]``: least variance of a standardised score."""
        return torch.full((1, 1, 1), VARIANCE_FLOOR, device=self.labels.device)

    @_made_on_host
    def outside(self) -> Tensor:
        """float32 ``[batch, 1, tokens]``: infinity for entries of no modality, else 0."""
        return torch.where(self.media, 0.0, torch.inf)[:, None]

    @_made_on_host
    def text_gates(self) -> Tensor:
        """float32 ``[batch, 1, tokens]`` log gates that keep the text: 0 there, else -inf."""
        return torch.zeros(1, 1, 1, device=self.labels.device).masked_fill(~self.text[:, None], -torch.inf)

    @cached_property
    def _of_modality(self) -> dict[tuple[int, ...], Tensor]:
        return {}

    def of_modality(self, which: tuple[int, ...]) -> Tensor:
        """bool ``[batch, tokens]``: the entries of one modality in each row, by its place in :data:`COMPRESSED`."""
        if which not in self._of_modality:
            rows = [self.host.by_modality[row, place] for row, place in enumerate(which)]
            self._of_modality[which] = torch.stack(rows).to(self.labels.device)
        return self._of_modality[which]

    @_made_on_host
    def segment_offset(self) -> Tensor:
        """int64 ``[batch, tokens]``: entries before each in its segment, a run of one modality such as a frame."""
        index = torch.arange(self.labels.shape[1], device=self.labels.device)
        first = F.pad(self.labels[:, 1:] != self.labels[:, :-1], (1, 0), value=True)
        return index - torch.where(first, index, 0).cummax(1).values

    @_made_on_host
    def segment_position(self) -> Tensor:
        """float ``[batch, tokens, 3]``: position of each entry in its segment.

        From 0 to 1, with its sine and cosine over one turn. Neither padding nor how long a clip is changes it. In a
        stream, the position among what is left of the segment.
        """
        index = torch.arange(self.labels.shape[1], device=self.labels.device).expand_as(self.labels)
        offset = self.segment_offset
        last = F.pad(offset[:, 1:] == 0, (0, 1), value=True)
        end = torch.where(last, index, index.shape[1]).flip(1).cummin(1).values.flip(1)
        position = (offset + 0.5) / (end - index + offset + 1)
        return torch.stack([position, (math.tau * position).sin(), (math.tau * position).cos()], dim=-1)

    @_made_on_host
    def segment_positions(self) -> Tensor:
        """float ``[batch, 8, tokens]``: for each modality :attr:`segment_position` and 1, of its own entries."""
        positions = F.pad(self.segment_position, (0, 1), value=1.0).transpose(1, 2)
        return (self.masks[:, :, None] * positions[:, None]).flatten(1, 2)

    def alike_around(self, width: int) -> Tensor:
        """float32 ``[batch, 1, tokens, 2 * width + 1]``: 1 where a neighbour is another entry of the same modality."""
        if width not in self._alike:
            kinds = self.host.labels
            same = F.pad(kinds, (width, width)).unfold(-1, 2 * width + 1, 1) == kinds[..., None]
            same[..., width] = False
            same &= self.host.media[..., None]
            self._alike[width] = same[:, None].float().to(self.labels.device)
        return self._alike[width]

    @cached_property
    def _alike(self) -> dict[int, Tensor]:
        return {}

    @_made_on_host
    def real(self) -> Tensor:
        """bool ``[batch, tokens]``: everything but padding."""
        return self.labels != Modality.PADDING

    def counts(self) -> Tensor:
        """int64 ``[batch, 2]``, on the CPU: video and audio entries of each row."""
        return self.host.by_modality.sum(-1)

    def media_end(self) -> Tensor:
        """int64 ``[batch]``, on the CPU: index after each row's last audio or video entry, 0 where there is none."""
        index = torch.arange(1, self.labels.shape[1] + 1)
        return (self.host.media * index).amax(dim=1)

    def slice(self, start: int, stop: int | None = None) -> ModalityMap:
        return ModalityMap(self.labels[:, start:stop])
