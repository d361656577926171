"""Positions of what follows a compressed cache: counted from the cache, as the model's record is of another forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from acckv.adapters.base import ModelAdapter
from acckv.cache import CompressedCache
from acckv.turn import Turn


def positions_after(
    adapter: ModelAdapter, cache: CompressedCache, inputs: dict[str, Any], tokens: Tensor, turn: Turn | None
) -> Tensor:
    """Position ids of new tokens, as the decoder takes them.

    Args:
        inputs: of the model, for the new tokens alone but for the mask, which may speak of all.
        tokens: the new ones, ids or embeddings ``[rows, tokens, ...]``; turn: that they bring, None for plain text.
    """
    rows, length = tokens.shape[:2]
    seen, known = cache.get_seq_length(), cache.labels.labels.shape[1]
    start = cache.next_position.repeat_interleave(rows // cache.next_position.shape[0], dim=0)
    mask = inputs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == seen + length:
        later = mask[:, known:].long()  # text that came after the compression may be padded too
    else:
        later = torch.ones(rows, seen - known + length, dtype=torch.long, device=start.device)
    if turn is not None and turn.has_media:
        before = later[:, : seen - known].sum(-1, keepdim=True)
        return adapter.prompt_positions(inputs, turn.labels.real, start + before)
    return adapter.text_positions(start + (later.cumsum(-1)[:, -length:] - 1).clamp_min(0))
