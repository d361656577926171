"""One layer of a compressed cache: its logical length (tokens seen) is not its physical length (entries held)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from acckv.cache.packed import PackedEntries
from acckv.errors import InputError
from acckv.method.modality import COMPRESSED, Modality
from acckv.method.plan import LayerPlan


class CompressedLayer(DynamicLayer):
    """A compressed region of `region` entries, then every later token uncompressed.

    Attributes:
        seen: tokens that went through the layer; what generate takes for the length and positions come from.
        region: entries at the front that were compressed; 0 before compression.
        bias: added to the attention logits of the region, ``[B, K, region]``: -inf marks the empty places of a row
            that kept fewer entries than the longest, other values are the log mass of merged entries. None is zero.
        labels: int8 ``[B, 1 or K, region]`` modality of each entry of the region, by head where heads chose apart.
        candidates: int64 ``[B, 2]`` video and audio entries that were there to choose from, evicted ones included.
        packed: the keys and values where the heads keep unequal numbers of entries; `keys` and `values` are None then.
            `region`, `bias` and `labels` are of the longest head, as if the others were padded.
        low_ratio: whether it was compressed, and is to be read, with what the lowest ratios have of their own.
        lengths: entries held by every compressed layer of the cache, one list for all; slot: this layer's place.
            Numbers and not the layers themselves: a ring of references would keep dropped caches in memory.
    """

    keys: Any
    values: Any
    _layer_type = None  # keeps transformers from taking this class for its own full-attention layer

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = 0
        self.region = 0
        self.bias: Tensor | None = None
        self.labels: Tensor | None = None
        self.candidates: Tensor | None = None
        self.packed: PackedEntries | None = None
        self.low_ratio = False
        self.slot, self.lengths = len(lengths), lengths
        lengths.append(0)

    @property
    def physical(self) -> int:
        """Entries that the longest head holds."""
        if self.packed is not None:
            return self.packed.widest
        return 0 if self.keys is None or self.keys.numel() == 0 else self.keys.shape[-2]

    @property
    def tensors(self) -> list[Tensor]:
        """The keys and values that are held."""
        both = (self.keys, self.values) if self.packed is None else (self.packed.keys, self.packed.values)
        return [tensor for tensor in both if tensor is not None]

    @property
    def kept(self) -> Tensor | None:
        """float ``[B, 2]`` video and audio entries of the region, merged ones included; None before compression.

        The mean over KV heads, which need not hold the same.
        """
        if self.labels is None:
            return None
        held = [(self.labels == modality).sum(-1).float().mean(dim=1) for modality in COMPRESSED]
        return torch.stack(held, dim=-1)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hold new tokens; gives all keys and values, but of packed ones the new alone: attention reads those here."""
        self.seen += key_states.shape[-2]
        if self.physical and self.tensors[0].device != key_states.device:  # of a prefill that was kept elsewhere
            self._map_rows(lambda rows: rows.to(key_states.device))
            self.packed = self.packed and self.packed.to(key_states.device)
        if self.packed is not None:
            self.packed.append(key_states, value_states)
            self.lengths[self.slot] = self.physical
            return key_states, value_states
        held = super().update(key_states, value_states)
        self.lengths[self.slot] = self.physical
        return held

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """One mask serves all layers, so it is as wide as the longest; attention cuts it to each layer's own."""
        longest = max(self.lengths)
        return longest + query_length, self.seen - longest

    def crop(self, tokens_to_remove: int) -> None:
        removed = abs(tokens_to_remove)
        if removed > self.physical - self.region:
            raise InputError(
                f"cannot take back {removed} tokens: only {self.physical - self.region} came after compression",
                field="crop",
            )
        if self.packed is None:
            super().crop(tokens_to_remove)
        else:
            self.packed.crop(removed)
        self.seen -= removed
        self.lengths[self.slot] = self.physical

    def reset(self) -> None:
        self.unpack()
        super().reset()
        self.seen, self.region, self.bias, self.labels, self.candidates, self.low_ratio = 0, 0, None, None, None, False
        self.lengths[self.slot] = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)), beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = None if self.packed is None else torch.arange(len(self.packed.lengths)).repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0), rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_rows(lambda rows: rows[indices.to(rows.device)], indices)

    def _map_rows(self, change: Callable[[Tensor], Tensor], rows: Tensor | None = None) -> None:
        """Change the rows of all that is held; packed entries are taken of `rows`, if given."""
        if self.packed is not None and rows is not None:
            self.packed = self.packed.select(rows)
        for name in ("keys", "values", "bias", "labels", "candidates"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))

    def unpack(self) -> None:
        """Lay packed entries out as a rectangle, shorter heads padded on the left with masked places."""
        if self.packed is None:
            return
        self.keys, self.values, empty = self.packed.padded()
        bias = self._region_bias(self.region)
        self.bias, self.packed = bias.masked_fill(empty, -torch.inf), None

    def commit(
        self, plan: LayerPlan, labels: Tensor, candidates: Tensor | None = None, low_ratio: bool = False
    ) -> None:
        """Evict: hold what the plan keeps, in order of position, merged entries last; all of it is the new region.

        Entries after those that the plan speaks of (a probe prompt's) are dropped; `seen` takes them back.

        Args:
            plan: hard log gates (0 or -inf) over the first N entries held and over merged ones.
            labels: integers ``[B, 1 or K, N]``: modality of these entries.
            candidates: int64 ``[B, 2]`` video and audio entries that `labels` brought for the first time.
            low_ratio: whether the plan is one of the lowest ratios.
        """
        self.unpack()
        self.low_ratio = low_ratio
        length, merged = labels.shape[-1], plan.merged_bias.shape[-1]
        labels = labels.to(self.keys.device, torch.int8)
        if merged:
            new = torch.tensor(COMPRESSED[:merged], device=labels.device, dtype=labels.dtype)
            labels = torch.cat([labels, new.expand(*labels.shape[:2], -1)], dim=-1)
        bias = None
        if self.bias is not None or (merged and bool((plan.merged_bias != 0).any())):
            bias = torch.cat([self._region_bias(length), plan.merged_bias], dim=-1)
        self.seen -= self.physical - length
        keys, values = self.keys[:, :, :length], self.values[:, :, :length]
        if plan.merged_into is not None:
            keys, values = plan.merged_into.place(keys, values)
        if candidates is not None:
            candidates = candidates.to(self.keys.device)
            self.candidates = candidates if self.candidates is None else self.candidates + candidates
        self._hold((keys, plan.merged_keys), (values, plan.merged_values), bias, labels, plan.log_gates, plan.kept)

    def compact(self, valid: Tensor) -> None:
        """Drop the entries that are no token of their row; what stays becomes the compressed region.

        Args:
            valid: bool ``[B, tail]`` of the entries after the region.
        """
        self.unpack()
        valid = valid.to(self.keys.device)
        held = self._region_bias(self.region)
        tail = torch.where(valid, 0.0, -torch.inf)[:, None].expand(-1, held.shape[1], -1)
        gates = torch.cat([torch.where(torch.isfinite(held), 0.0, -torch.inf), tail], dim=-1)
        bias = None if self.bias is None else self._region_bias(self.region + valid.shape[1])
        new = torch.zeros_like(valid, dtype=torch.int8).masked_fill(~valid, Modality.PADDING)[:, None]
        labels = new if self.labels is None else torch.cat([self.labels, new.expand(-1, self.labels.shape[1], -1)], -1)
        self._hold((self.keys,), (self.values,), bias, labels, gates, None)

    def _region_bias(self, length: int) -> Tensor:
        """``[B, K, length]``, at least the region long."""
        bias = self.keys.new_zeros(*self.keys.shape[:2], length, dtype=torch.float32)
        if self.bias is not None:
            bias[..., : self.region] = self.bias
        return bias

    def _hold(
        self,
        keys: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        bias: Tensor | None,
        labels: Tensor,
        gates: Tensor,
        kept: Tensor | None,
    ) -> None:
        """Gather the kept entries of each row and head; shorter rows are padded on the left with masked places.

        Args:
            keys, values: held, then merged: joined where anything was merged.
            bias: None is zero; gates: ``[B, 1 or K, M]``, 0 or -inf; kept: as in a plan.
        """
        counts = kept.view(len(kept), -1, 1) if kept is not None else (gates > -torch.inf).sum(-1, keepdim=True).cpu()
        width = int(counts.max())
        batch, kv_heads = self.keys.shape[:2]
        # A stable order by gate: what is evicted, then what is kept, in order of position.
        index = gates.argsort(dim=-1, stable=True)[..., gates.shape[-1] - width :]
        self.keys, self.values = _gather(keys, index), _gather(values, index)
        bias = None if bias is None else bias.gather(2, index.expand(-1, kv_heads, -1))
        heads = max(labels.shape[1], index.shape[1])
        labels = labels.expand(-1, heads, -1).gather(2, index.expand(-1, heads, -1))
        by_head = counts.flatten(1)
        empty = torch.arange(width) < width - counts
        if bool((by_head != by_head[:, :1]).any()):
            self.packed = PackedEntries.of(self.keys, self.values, by_head)
            self.keys = self.values = None
            # Where nothing was merged, a head's entries need no mask.
            bias = bias if bias is not None and bool((bias.masked_fill(empty.to(bias.device), 0) != 0).any()) else None
        elif bool(empty.any()):
            bias = torch.zeros(batch, kv_heads, width, device=gates.device) if bias is None else bias
            bias = bias.masked_fill(empty.to(gates.device), -torch.inf)
        self.bias, self.labels = bias, labels.masked_fill(empty.to(labels.device), Modality.PADDING)
        self.region = self.lengths[self.slot] = width


def _gather(parts: tuple[Tensor, ...], index: Tensor) -> Tensor:
    """Entries ``[B, K, width, D]`` of parts that follow each other; joined, which is a copy, only if there are two."""
    parts = tuple(part for part in parts if part.shape[2]) or parts[:1]
    tensor = parts[0] if len(parts) == 1 else torch.cat([part.to(parts[0].dtype) for part in parts], dim=2)
    return tensor.gather(2, index[..., None].expand(-1, tensor.shape[1], -1, tensor.shape[-1]))


def settle_window(layer: DynamicSlidingWindowLayer, valid: Tensor, seen: int) -> None:
    """Drop the entries of a sliding layer that are no token of their row and move the others to the right.

    Distances in a sliding window are counted in columns, so a gap inside a row would shorten its reach.

    Args:
        valid: bool ``[B, held]`` of the entries that the layer holds now.
        seen: columns that the layer has seen when the gaps are not counted.
    """
    keys: Any = layer.keys
    held = keys.shape[-2]
    width = min(layer.sliding_window - 1, seen)
    # A stable sort puts gaps first: each row's last `width` places are its latest tokens.
    index = valid.to(keys.device, torch.uint8).argsort(dim=-1, stable=True)[:, held - width :, None]
    for name in ("keys", "values"):
        tensor = getattr(layer, name)
        place = index[:, None].expand(-1, tensor.shape[1], -1, tensor.shape[-1])
        setattr(layer, name, tensor.gather(2, place))
    layer.cumulative_length = seen
