"""The slow reference: the full cache stays, and attention hides what a session evicted.

It is written against plain transformers: an ordinary DynamicCache, a softmax spelled out, one mask a layer and head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from acckv.cache.layer import CompressedLayer
from acckv.models import AttentionLayer, find_adapter
from acckv.runtime.attention import hook_attention

#: For each compressed layer: (logical index from which queries no longer see them, bool [heads, columns] evicted).
Evictions = list[list[tuple[int, Tensor]]]


@contextmanager
def masked(model: Any, evictions: Evictions) -> Iterator[None]:
    """Full attention of a batch of equal rows in which later queries do not see what was evicted."""
    layers = find_adapter(model).attention_layers

    def attend(original: Any, index: int, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any):
        layer: AttentionLayer = layers[index]
        if layer.slot is None:
            return original(module, query, key, value, mask, **kw)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = query.float() @ key.float().transpose(-1, -2) * kw["scaling"]
        rows, columns = logits.shape[-2:]
        visible = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows).expand_as(logits).clone()
        if mask is not None:
            visible = (mask if mask.dtype == torch.bool else mask > -1).expand_as(logits).clone()
        positions = torch.arange(columns - rows, columns)
        for boundary, evicted in evictions[layer.slot]:
            evicted = evicted[:, :columns]
            hidden = evicted.repeat_interleave(groups, 0)[:, None] & (positions >= boundary)[:, None]
            visible[..., : evicted.shape[1]] &= ~hidden
        weights = logits.masked_fill(~visible, torch.finfo(torch.float32).min).softmax(-1)
        return (weights @ value.float()).to(query.dtype).transpose(1, 2).contiguous(), None

    modules = [layer.module for layer in layers]
    with hook_attention(modules, find_adapter(model).attention_implementation, attend), torch.no_grad():
        yield


class Ledger:
    """Follows every eviction of single-row caches: which token of the conversation each head still holds."""

    def __init__(self, slots: int) -> None:
        self.evictions: Evictions = [[] for _ in range(slots)]
        self.tokens: dict[int, Tensor] = {}

    @contextmanager
    def following(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
        commit = CompressedLayer.commit

        def followed(
            layer: CompressedLayer, plan: Any, labels: Tensor, candidates: Any = None, low_ratio: bool = False
        ) -> None:
            slot, region, before = layer.slot, layer.region, layer.physical
            length = labels.shape[-1]
            commit(layer, plan, labels, candidates, low_ratio)
            heads = layer.keys.shape[1]
            assert plan.merged_bias.shape[-1] == 0, "a merged entry is no token"
            later = torch.arange(layer.seen - (length - region), layer.seen).expand(heads, -1)
            held = torch.cat([self.tokens[slot], later], dim=1) if region else later
            keep = torch.isfinite(plan.log_gates[0, :, :length]).expand(heads, -1)
            evicted = torch.ones(heads, layer.seen, dtype=torch.bool)
            self.tokens[slot] = torch.stack([held[head][keep[head]] for head in range(heads)])
            evicted.scatter_(1, self.tokens[slot], False)
            self.evictions[slot].append((layer.seen, evicted))
            assert layer.physical == self.tokens[slot].shape[1] <= before

        with monkeypatch.context() as patch:
            patch.setattr(CompressedLayer, "commit", followed)
            yield self
