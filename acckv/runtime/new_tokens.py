"""The new tokens of one forward: labels, padding, and the end of the context that is compressed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from acckv.config import When
from acckv.errors import InputError
from acckv.method.modality import Modality, ModalityMap
from acckv.models.base import ModelAdapter
from acckv.models.batching import DecoderInputs


@dataclass(frozen=True)
class NewTokens:
    """The new tokens of one forward.

    Args:
        labels: modality map of the new tokens ``[batch, tokens]``.
        past: bool ``[batch, seen]``: which of the tokens seen before are no padding.
        context_lengths: int64 ``[batch]``, on the CPU: new tokens before this index are compressed, later
            ones read what was kept.
        token_types: kinds of all tokens ``[batch, seen + tokens]`` as a processor gives them, or None.
    """

    labels: ModalityMap
    past: Tensor
    context_lengths: Tensor
    token_types: Tensor | None = None

    def to(self, device: torch.device) -> NewTokens:
        """The same on a device."""
        if self.labels.labels.device == device:
            return self
        types = None if self.token_types is None else self.token_types.to(device)
        return NewTokens(self.labels.to(device), self.past.to(device), self.context_lengths, types)

    @property
    def length(self) -> int:
        """New tokens."""
        return self.labels.labels.shape[1]

    @property
    def seen(self) -> int:
        """Tokens seen before."""
        return self.past.shape[1]

    @property
    def has_media(self) -> bool:
        return bool(self.labels.host.media.any())

    def compressed_whole(self) -> NewTokens:
        """The same tokens, all of them compressed."""
        return replace(self, context_lengths=torch.full_like(self.context_lengths, self.length))

    def uncompressed(self) -> NewTokens:
        """The same tokens, none of them compressed."""
        return replace(self, context_lengths=torch.zeros_like(self.context_lengths))

    def after(self, labels: ModalityMap) -> NewTokens:
        """The same tokens behind others of these labels."""
        return replace(self, past=labels.real)

    def with_text_as_media(self) -> NewTokens:
        """The same tokens, text counted to the media that it comes with (video, where there is any)."""
        labels = self.labels.labels
        video = (labels == Modality.VIDEO).any(dim=1, keepdim=True)
        label = torch.where(video, int(Modality.VIDEO), int(Modality.AUDIO)).to(labels.dtype)
        return replace(self, labels=ModalityMap(torch.where(labels == Modality.TEXT, label, labels)))


def read_new_tokens(
    adapter: ModelAdapter,
    inputs: dict[str, Any],
    when: When,
    modality_ids: Tensor | None = None,
    seen: int = 0,
    candidates: int = 0,
) -> NewTokens:
    """The new tokens that model inputs bring.

    Args:
        inputs: of the model: input_ids or inputs_embeds, attention_mask, features.
        modality_ids: labels given by the caller ``[batch, tokens]``, or ``[batch, seen + tokens]``, or of fewer rows
            that were repeated since; None reads them off the placeholder tokens.
        seen: tokens that the cache has seen.
        candidates: tokens at the end that are guesses of assisted decoding, not part of the prompt.

    Raises:
        InputError: the labels do not fit, or media come with a mask that is not of their tokens.
    """
    ids = inputs.get("input_ids")
    tokens = ids if isinstance(ids, Tensor) else inputs["inputs_embeds"]
    batch, length = tokens.shape[:2]
    given = inputs.get("attention_mask")
    mask = given.cpu() if isinstance(given, Tensor) and given.ndim == 2 else None
    if modality_ids is not None:
        labels = _given_labels(modality_ids.cpu(), mask, batch, length, seen)
    elif adapter.brings_media(inputs) and isinstance(ids, Tensor):
        ids = ids.cpu()
        labels = adapter.label(ids, None if mask is None else mask[:, -length:])
    elif isinstance(ids, Tensor):
        # A generated token may happen to be a placeholder: media are there only where their features are.
        labels = _text(batch, mask, length)
    else:
        labels = adapter.label(tokens, mask)
    if isinstance(given, Tensor) and mask is None and bool(labels.host.media.any()):
        raise InputError(f"of media needs shape [rows, tokens], not {list(given.shape)}", field="attention_mask")
    past = torch.ones(batch, seen, dtype=torch.bool, device=tokens.device)
    if mask is not None and mask.shape[1] == seen + length:
        past = mask[:, :seen].bool().to(tokens.device)
    prompt = length - candidates
    context_lengths = torch.full((batch,), prompt)
    if when == "context":
        context_lengths = adapter.context_length(labels, ids if isinstance(ids, Tensor) else None).clamp(max=prompt)
    types = inputs.get("mm_token_type_ids")
    if types is not None and types.shape[1] != seen + length:
        types = torch.cat([types.new_zeros(batch, seen), types[:, -length:]], dim=1)
    return NewTokens(labels.to(tokens.device), past, context_lengths, types)


def embedded_tokens(embedded: DecoderInputs) -> NewTokens:
    """The new tokens of a prompt that was embedded before, all of them compressed."""
    labels = embedded.labels.labels
    context_lengths = torch.full((labels.shape[0],), labels.shape[1])
    past = torch.zeros(labels.shape[0], 0, dtype=torch.bool, device=labels.device)
    return NewTokens(embedded.labels, past, context_lengths, embedded.others.get("mm_token_type_ids"))


def _text(batch: int, mask: Tensor | None, length: int) -> ModalityMap:
    labels = torch.zeros(batch, length, dtype=torch.long)
    return ModalityMap(labels if mask is None else labels.masked_fill(mask[:, -length:] == 0, Modality.PADDING))


def _given_labels(modality_ids: Tensor, mask: Tensor | None, batch: int, length: int, seen: int) -> ModalityMap:
    rows, width = modality_ids.shape if modality_ids.ndim == 2 else (0, 0)
    if rows == 0 or batch % rows or width not in (length, seen + length) or modality_ids.is_floating_point():
        raise InputError(
            f"needs integers of shape [{batch}, {length}], one a token, not {tuple(modality_ids.shape)}",
            field="modality_ids",
        )
    labels = modality_ids[:, width - length :].long().repeat_interleave(batch // rows, dim=0)
    if bool((labels < 0).any() or (labels > max(Modality)).any()):
        raise InputError("holds other values than 0 text, 1 video, 2 audio, 3 padding", field="modality_ids")
    return ModalityMap(labels if mask is None else labels.masked_fill(mask[:, -length:] == 0, Modality.PADDING))


def new_mask(inputs: dict[str, Any], seen: int) -> Tensor | None:
    """The 2-D mask of the tokens that model inputs bring, without that of the `seen` ones before them."""
    mask, tokens = inputs.get("attention_mask"), inputs.get("input_ids")
    length = (inputs["inputs_embeds"] if tokens is None else tokens).shape[1]
    return mask if mask is None or seen == 0 else mask[:, -length:]
