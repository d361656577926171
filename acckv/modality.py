"""Which entry of a prompt is text, video, audio or padding."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor

from acckv.errors import InputError


class Modality(IntEnum):
    """Label of one cache entry."""

    TEXT = 0
    VIDEO = 1
    AUDIO = 2
    PADDING = 3


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
