"""Positions of what follows a compressed cache: the cache knows them, a model only those of its last forward."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acckv.cache.cache import CompressedCache
from acckv.models.base import ModelAdapter


def following_positions(
    adapter: ModelAdapter, cache: CompressedCache, inputs: dict[str, Any], tokens: Tensor
) -> Tensor:
    """Position ids, as the decoder takes them, of new tokens that read a cache.

    Args:
        inputs: of the model, features of new media among them; the last columns of a 2-D attention_mask are of the
            new tokens, and 0 where they are padding.
        tokens: the new ones ``[batch, tokens]``, or their embeddings ``[batch, tokens, hidden]``; a batch that generate
            has still to repeat for its beams has fewer rows than the cache.

    Raises:
        InputError: the cache is of another batch, or of media that the family's adapter has no positions for.
    """
    batch, length = tokens.shape[:2]
    start = cache.next_position.to(tokens.device)
    copies = start.shape[0] // max(batch, 1)
    cache.check_rows(max(copies, 1) * batch)
    start = start[::copies]
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        real = mask[:, -length:].to(tokens.device) > 0
    else:
        real = torch.ones(batch, length, dtype=torch.bool, device=tokens.device)
    if adapter.brings_media(inputs) and not tokens.is_floating_point():
        return adapter.prompt_positions({**inputs, "input_ids": tokens}, real, start)
    return adapter.text_positions(start + (real.long().cumsum(-1) - 1).clamp_min(0))


def generated_positions(
    adapter: ModelAdapter, cache: CompressedCache, inputs: dict[str, Any], tokens: Tensor
) -> Tensor:
    """The same for a call of generate, which may bring what the cache has seen again: zeros stand for its positions.

    Args:
        inputs: of generate; tokens: of its call, all of them or the new ones alone.
    """
    ids = inputs.get("input_ids")
    tokens = ids if isinstance(ids, Tensor) and ids.shape[1] else tokens
    mask, given, seen = inputs.get("attention_mask"), tokens.shape[1], cache.get_seq_length()
    whole = mask.shape[1] if isinstance(mask, Tensor) else given
    new = given if whole > given else max(given - seen, 0)
    positions = following_positions(adapter, cache, inputs, tokens[:, given - new :])
    return F.pad(positions, (whole - new, 0))
