"""Training's stand-in for an evicted cache: later tokens read the whole prefill through gates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from acckv.method.plan import LayerPlan
from acckv.models.base import AttentionLayer
from acckv.runtime.attention import Attend, region_mask

#: A log gate at which an entry is as good as evicted: it weighs less than float32 resolves beside a kept one.
SHUT = -30.0


class Simulation:
    """Tokens that follow a prefill, seen through plans; it equals physical eviction where the gates are hard.

    Attention gets the prefill's entries from here and not from a cache, and finds this object among its arguments: the
    same in the first forward and in the one that gradient checkpointing repeats during backward, when transformers has
    taken the cache away.

    Args:
        layers: of the prefill's cache; plans: one a compressed layer, or None to read everything (the teacher).
        replaced: arguments of the decoder in place of the model's: embeddings of tokens that are no text.
    """

    def __init__(
        self, layers: list[Any], plans: list[LayerPlan] | None, replaced: dict[str, Any] | None = None
    ) -> None:
        self.layers, self.plans, self.replaced = layers, plans, replaced or {}
        self.reached = False

    def attend(
        self,
        original: Attend,
        layer: AttentionLayer,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the new tokens; `key` and `value` are theirs alone."""
        self.reached = True
        held = self.layers[layer.cache_index]
        keys, values, mask = held.keys, held.values, attention_mask  # kept and planned on any device
        if self.plans is not None and layer.slot is not None:
            keys, values, bias = readable(*self.plans[layer.slot].apply(keys, values))
            region = bias.shape[-1]
            mask = region_mask(attention_mask, query, region + key.shape[2], region, bias)
        key, value = (torch.cat([old.to(new.device), new], dim=2) for old, new in ((keys, key), (values, value)))
        return original(module, query, key, value, mask, **kwargs)


def readable(keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same without entries whose gate is shut in every head: hard gates leave most of the attention undone.

    Args:
        keys, values: ``[B, K, M, D]``; bias: ``[B, K or 1, M]`` on attention logits.

    Returns:
        the same, with M the most that any row reads; shorter rows are filled with entries whose gate is shut.
    """
    is_open = (bias.detach() > SHUT).any(dim=1)
    width = int(is_open.sum(-1).max())
    order = is_open.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[:, :width]

    def taken(entries: Tensor) -> Tensor:
        return entries.gather(2, order[:, None, :, None].expand(-1, entries.shape[1], -1, entries.shape[-1]))

    return taken(keys), taken(values), bias.gather(2, order[:, None].expand(-1, bias.shape[1], -1))


class LengthCache(Cache):
    """Tells a decoder how much was prefilled, for masks and positions, and holds nothing."""

    def __init__(self, layers: list[Any]) -> None:
        super().__init__(layers=[_Length(layer) if isinstance(layer, CacheLayerMixin) else layer for layer in layers])


class _Length(CacheLayerMixin):
    """The lengths of another layer."""

    def __init__(self, layer: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layer = layer
        self.is_sliding = getattr(layer, "is_sliding", False)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """It never holds anything."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layer.get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        return self.layer.get_seq_length()

    def get_max_length(self) -> int:
        return self.layer.get_max_length()


def enable_checkpointing(decoder: Any) -> None:
    """Gradient checkpointing of a frozen decoder's layers, which stay in evaluation mode otherwise (no dropout)."""
    decoder.activation_checkpointing_enable({"use_reentrant": False})
    for module in decoder.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # of this module alone: what is inside it stays as it is


def disable_checkpointing(decoder: Any) -> None:
    """Undo :func:`enable_checkpointing`: a decoder that generates needs its cache."""
    decoder.activation_checkpointing_disable()
    for module in decoder.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = False


@contextmanager
def without_checkpointing(decoder: nn.Module) -> Iterator[None]:
    """A prefill needs its cache, which gradient checkpointing takes from the layers of a model in training mode."""
    active: list[Any] = [module for module in decoder.modules() if getattr(module, "gradient_checkpointing", False)]
    for module in active:
        module.gradient_checkpointing = False
    try:
        yield
    finally:
        for module in active:
            module.gradient_checkpointing = True
