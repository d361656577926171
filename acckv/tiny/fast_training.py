"""Faster, equal forms of parts of the model, for pretraining only; everything is put back on exit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_5_omni import modeling_qwen2_5_omni as qwen


def _segments(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor) -> Tensor:
    """Attention within segments of equal length, as one batch: [tokens, heads, dim] -> [tokens, heads * dim]."""
    lengths = boundaries.diff()
    count, length = len(lengths), int(lengths[0])
    if not bool((lengths == length).all()):
        raise RuntimeError("batched encoders need segments of equal length")
    parts = [t.view(count, length, *t.shape[1:]).transpose(1, 2) for t in (query, key, value)]
    return F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(count * length, -1)


def _audio_attention(self: Any, hidden_states: Tensor, cu_seqlens: Tensor, **_: Any) -> Tensor:
    tokens = len(hidden_states)
    projected = (p(hidden_states).view(tokens, self.num_heads, -1) for p in (self.q_proj, self.k_proj, self.v_proj))
    return self.out_proj(_segments(*projected, cu_seqlens))


def _vision_attention(
    self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
) -> Tensor:
    tokens = len(hidden_states)
    query, key, value = (p(hidden_states).view(tokens, self.num_heads, -1) for p in (self.q, self.k, self.v))
    query, key = qwen.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    return self.proj(_segments(query, key, value.to(query.dtype), cu_seqlens))


def _patch_embed(self: Any, hidden_states: Tensor) -> Tensor:
    """A convolution whose stride equals its kernel is a linear map of each patch."""
    return F.linear(hidden_states, self.proj.weight.view(self.embed_dim, -1))


def _prefix_attention(
    prefix: int, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Attention of packed rows: the media prefix is plain causal, the turns follow the mask given to the model."""
    key, value = (t.repeat_interleave(module.num_key_value_groups, 1) for t in (key, value))
    media = [t[:, :, :prefix] for t in (query, key, value)]
    first = F.scaled_dot_product_attention(*media, is_causal=True)
    mask = attention_mask[:, :, prefix:] if attention_mask is not None else None
    second = F.scaled_dot_product_attention(query[:, :, prefix:], key, value, attn_mask=mask)
    return torch.cat([first, second], 2).transpose(1, 2).contiguous(), None


@contextmanager
def fast_training(prefix: int = 0) -> Iterator[None]:
    """Batch the encoders' segments and split prefix from turns in the text model, until exit.

    Args:
        prefix: number of media tokens that each row begins with.
    """
    replaced = (
        (qwen.Qwen2_5OmniAudioAttention, _audio_attention),
        (qwen.Qwen2_5OmniVisionAttention, _vision_attention),
        (qwen.Qwen2_5_VisionPatchEmbed, _patch_embed),
    )
    originals = [(owner, owner.forward) for owner, _ in replaced]
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    try:
        for owner, forward in replaced:
            owner.forward = forward
        ALL_ATTENTION_FUNCTIONS["sdpa"] = partial(_prefix_attention, prefix)
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = sdpa
        for owner, forward in originals:
            owner.forward = forward
