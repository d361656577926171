"""Which entry of a prompt is text, video, audio or padding."""

from __future__ import annotations

import math
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


#: How many numbers stand for an entry's place in its segment.
SEGMENT_PLACES = 3
#: The order of the last axis of every per-modality tensor in this package.
COMPRESSED = (Modality.VIDEO, Modality.AUDIO)


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

    def to(self, device: torch.device) -> ModalityMap:
        """The same on a device."""
        return self if self.labels.device == device else ModalityMap(self.labels.to(device))

    @property
    def text(self) -> Tensor:
        """bool ``[batch, tokens]``"""
        return self.labels == Modality.TEXT

    @property
    def media(self) -> Tensor:
        """bool ``[batch, tokens]``: audio or video."""
        return (self.labels == Modality.VIDEO) | (self.labels == Modality.AUDIO)

    @cached_property
    def by_modality(self) -> Tensor:
        """bool ``[batch, 2, tokens]`` in the order of :data:`COMPRESSED`."""
        return torch.stack([self.labels == modality for modality in COMPRESSED], dim=1)

    @cached_property
    def segment_places(self) -> Tensor:
        """float ``[batch, tokens, 3]``: place of each entry in its segment, a run of one modality such as a frame.

        From 0 to 1, with its sine and cosine over one turn. Neither padding nor how long a clip is changes it. In a
        stream, the place among what is left of the segment.
        """
        index = torch.arange(self.labels.shape[1], device=self.labels.device).expand_as(self.labels)
        first = F.pad(self.labels[:, 1:] != self.labels[:, :-1], (1, 0), value=True)
        last = F.pad(first[:, 1:], (0, 1), value=True)
        start = torch.where(first, index, 0).cummax(1).values
        end = torch.where(last, index, index.shape[1]).flip(1).cummin(1).values.flip(1)
        place = (index - start + 0.5) / (end - start + 1)
        return torch.stack([place, (math.tau * place).sin(), (math.tau * place).cos()], dim=-1)

    @property
    def real(self) -> Tensor:
        """bool ``[batch, tokens]``: everything but padding."""
        return self.labels != Modality.PADDING

    def counts(self) -> Tensor:
        """int64 ``[batch, 2]``: video and audio entries of each row."""
        return self.by_modality.sum(-1)

    def media_end(self) -> Tensor:
        """int64 ``[batch]``: index after the last audio or video entry of each row, 0 where there is none."""
        index = torch.arange(1, self.labels.shape[1] + 1, device=self.labels.device)
        return (self.media * index).amax(dim=1)

    def slice(self, start: int, stop: int | None = None) -> ModalityMap:
        return ModalityMap(self.labels[:, start:stop])


def label_tokens(
    input_ids: Tensor,
    video_token_id: int,
    audio_token_id: int,
    attention_mask: Tensor | None = None,
    image_token_id: int | None = None,
) -> ModalityMap:
    """Label a batch of prompts by their placeholder tokens.

    Args:
        input_ids: ``[batch, tokens]``; image placeholders count as video.
        attention_mask: ``[batch, tokens]``, 0 where padded; longer masks are cut to the last `tokens` columns.
    """
    labels = torch.zeros_like(input_ids)
    labels[input_ids == video_token_id] = Modality.VIDEO
    if image_token_id is not None:
        labels[input_ids == image_token_id] = Modality.VIDEO
    labels[input_ids == audio_token_id] = Modality.AUDIO
    if attention_mask is not None:
        labels[attention_mask[:, -input_ids.shape[1] :] == 0] = Modality.PADDING
    return ModalityMap(labels)
