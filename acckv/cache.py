"""A KV cache whose logical length (tokens seen) is not its physical length (entries held)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from acckv.errors import InputError
from acckv.modality import ModalityMap
from acckv.pipeline import LayerPlan


class CompressedLayer(DynamicLayer):
    """One layer: a compressed region of `region` entries, then every later token uncompressed.

    Attributes:
        seen: tokens that went through the layer; what generate takes for the length and positions come from.
        region: entries at the front that were compressed; 0 before compression.
        bias: added to the attention logits of the region, ``[B, K, region]``: -inf marks the empty places of a row
            that kept fewer entries than the longest, other values are the log mass of merged entries. None is zero.
        kept: float ``[B, 2]`` video and audio entries held, merged ones included; mean over KV heads, which hold as
            many as each other but not always of the same modality. None before compression.
    """

    keys: Tensor  # type: ignore[assignment]  # None before the first update
    values: Tensor  # type: ignore[assignment]
    _layer_type = None  # keeps transformers from taking this class for its own full-attention layer

    def __init__(self, group: list[CompressedLayer]) -> None:
        super().__init__()
        self.seen = 0
        self.region = 0
        self.bias: Tensor | None = None
        self.kept: Tensor | None = None
        self.group = group

    @property
    def physical(self) -> int:
        return 0 if self.keys is None or self.keys.numel() == 0 else self.keys.shape[-2]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[-2]
        return super().update(key_states, value_states)

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """One mask serves all layers, so it is as wide as the longest; attention cuts it to each layer's own."""
        longest = max(layer.physical for layer in self.group)
        return longest + query_length, self.seen - longest

    def crop(self, tokens_to_remove: int) -> None:
        removed = abs(tokens_to_remove)
        if removed > self.physical - self.region:
            raise InputError(
                f"cannot take back {removed} tokens: only {self.physical - self.region} came after compression",
                field="crop",
            )
        super().crop(tokens_to_remove)
        self.seen -= removed

    def reset(self) -> None:
        super().reset()
        self.seen, self.region, self.bias, self.kept = 0, 0, None, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices])

    def _map_rows(self, change: Any) -> None:
        if self.bias is not None:
            self.bias = change(self.bias)
        if self.kept is not None:
            self.kept = change(self.kept)

    def commit(self, plan: LayerPlan, labels: ModalityMap) -> None:
        """Evict: hold what the plan keeps of the prompt, in order of position, merged entries last.

        Args:
            plan: hard log gates (0 or -inf) over prompt and merged entries.
        """
        kv_heads = self.keys.shape[1]
        keep = torch.isfinite(plan.log_gates).expand(-1, kv_heads, -1)
        keys, values = (self.keys, self.values) if plan.pivots is None else plan.pivots.place(self.keys, self.values)
        keys = torch.cat([keys, plan.keys.to(keys.dtype)], dim=2)
        values = torch.cat([values, plan.values.to(values.dtype)], dim=2)
        bias = torch.cat([torch.zeros_like(self.keys[..., 0], dtype=plan.bias.dtype), plan.bias], dim=-1)
        media = labels.by_modality[:, :, : keep.shape[-1]]
        prompt, merged = keep.split([media.shape[-1], plan.bias.shape[-1]], dim=-1)
        held = torch.stack([(prompt & media[:, m, None]).sum(-1) for m in range(2)], dim=-1)
        self.kept = (held + merged.long() if merged.shape[-1] else held).float().mean(dim=1)
        self._hold(keys, values, bias, keep)

    def compact(self, valid: Tensor) -> None:
        """Drop the entries that are no token of their row; what stays becomes the compressed region.

        Args:
            valid: bool ``[B, tail]`` of the entries after the region.
        """
        region = self.keys.new_zeros(*self.keys.shape[:2], self.region, dtype=torch.float32)
        region = region if self.bias is None else self.bias
        keep = torch.cat([torch.isfinite(region), valid[:, None].expand(-1, region.shape[1], -1)], dim=-1)
        bias = torch.cat([region, torch.zeros_like(keep[..., self.region :], dtype=region.dtype)], dim=-1)
        self._hold(self.keys, self.values, bias, keep)

    def _hold(self, keys: Tensor, values: Tensor, bias: Tensor, keep: Tensor) -> None:
        """Gather the kept entries of each row and head; shorter rows are padded on the left with masked places."""
        counts = keep.sum(-1)
        width = int(counts.max())
        # A stable sort puts evicted entries first, so the last `width` places end with the kept ones, in order.
        index = keep.to(torch.uint8).argsort(dim=-1, stable=True)[..., keep.shape[-1] - width :]
        empty = torch.arange(width, device=keep.device) < (width - counts)[..., None]
        place = index[..., None]
        self.keys = keys.gather(2, place.expand(-1, -1, -1, keys.shape[-1]))
        self.values = values.gather(2, place.expand(-1, -1, -1, values.shape[-1]))
        bias = bias.gather(2, index).masked_fill(empty, -torch.inf)
        self.bias = bias if bool((bias != 0).any()) else None
        self.region = width


class CompressedCache(DynamicCache):
    """A cache that holds a compressed prompt, as :meth:`Session.compress` returns it.

    Attributes:
        labels: the prompt's modality map.
        next_position: int64 ``[B, 1]``, where text after the prompt goes on. It is kept with the cache: the model's own
            record belongs to the last forward that was run, and media positions need not be monotone.
    """

    def __init__(self, layers: list[Any], labels: ModalityMap, next_position: Tensor) -> None:
        Cache.__init__(self, layers=layers)
        self.labels = labels
        self.next_position = next_position

    def branch(self, repeats: int = 1) -> CompressedCache:
        """A cache that goes on from here without changing this one; with one repeat the entries are shared.

        Args:
            repeats: rows made of each row, side by side (several questions about each clip).
        """
        layers = branch_layers(self.layers)
        cache = CompressedCache(layers, self.labels, self.next_position)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
            cache.next_position = self.next_position.repeat_interleave(repeats, dim=0)
            cache.labels = ModalityMap(self.labels.labels.repeat_interleave(repeats, dim=0))
        return cache

    def kept_entries(self) -> Tensor:
        """float ``[layers, 2]``: video and audio entries held by each layer, merged ones included; mean over rows."""
        counts = self.labels.counts()
        kept = [counts if layer.kept is None else layer.kept for layer in compressed_layers(self)]
        return torch.stack(kept).float().mean(dim=1)

    def full_entries(self) -> Tensor:
        """float ``[2]``: video and audio entries that the full cache holds; mean over rows."""
        return self.labels.counts().float().mean(dim=0)

    def kv_bytes(self) -> int:
        """Bytes of all keys and values held."""
        return sum(
            tensor.numel() * tensor.element_size()
            for layer in compressed_layers(self)
            for tensor in (layer.keys, layer.values)
        )


def compressed_layers(cache: Cache) -> list[CompressedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]


def branch_layers(layers: list[Any]) -> list[Any]:
    """Copies of cache layers that share the tensors; an update of a copy leaves the original as it is."""
    copies = [copy.copy(layer) for layer in layers]
    group = [layer for layer in copies if isinstance(layer, CompressedLayer)]
    for layer in group:
        layer.group = group
    return copies


def adopt(cache: Cache, layer_count: int) -> None:
    """Make the layers of an empty cache compressible, in place: generate goes on holding the same cache object.

    Raises:
        InputError: the cache is of a kind that cannot be compressed (static, offloaded, quantized).
    """
    if compressed_layers(cache):
        return
    if getattr(cache, "offloading", False) or any(type(layer) is not DynamicLayer for layer in cache.layers):
        kinds = sorted({type(layer).__name__ for layer in cache.layers})
        raise InputError(
            f"a {type(cache).__name__} of {', '.join(kinds)} cannot be compressed; use the default dynamic cache",
            field="past_key_values",
        )
    group: list[CompressedLayer] = []
    group.extend(CompressedLayer(group) for _ in range(max(layer_count, len(cache.layers))))
    cache.layers[:] = group
