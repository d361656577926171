"""Caches made of compressed layers: branching them, counting what they hold, adopting the cache of generate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from acckv.cache.layer import CompressedLayer
from acckv.errors import InputError
from acckv.method.modality import Modality, ModalityMap
from acckv.models.base import ModelAdapter


class CompressedCache(DynamicCache):
    """A cache that holds a compressed prompt, as :meth:`Session.compress` returns it.

    Attributes:
        labels: modality map of every token seen up to the last forward of several tokens.
    """

    def __init__(self, layers: list[Any], labels: ModalityMap, next_position: Tensor) -> None:
        Cache.__init__(self, layers=layers)
        self.labels = labels
        self._next_position = next_position

    @property
    def _later(self) -> int:
        """Tokens of text that came one by one since `labels`; below zero where guesses were taken back."""
        return self.get_seq_length() - self.labels.labels.shape[1]

    @property
    def next_position(self) -> Tensor:
        """``[B, 1]``, where text goes on: int64, or float32 where a family's media stand at fractions.

        It is kept with the cache: the model's own record belongs to the last forward that was run, and media positions
        need not be monotone.
        """
        return self._next_position + self._later

    def check_rows(self, rows: int) -> None:
        """Refuse to be read by another number of rows.

        Raises:
            InputError: says how many there are.
        """
        held = self.labels.labels.shape[0]
        if rows != held:
            raise InputError(
                f"holds {held} rows and is read by {rows}; give cache.branch(n) with n copies of each row",
                field="cache",
            )

    def note(self, labels: ModalityMap, next_position: Tensor) -> None:
        """Take down what one forward has just brought: tokens of these labels, after which text goes on there."""
        before = self._later - labels.labels.shape[1]
        held = F.pad(self.labels.labels, (0, before), value=Modality.TEXT)
        self.labels = ModalityMap(torch.cat([held, labels.labels.to(held.device)], dim=1))
        self._next_position = next_position

    def branch(self, repeats: int = 1) -> CompressedCache:
        """A cache that goes on from here without changing this one; with one repeat the entries are shared.

        Args:
            repeats: rows made of each row, side by side (several questions about each clip).
        """
        labels = F.pad(self.labels.labels, (0, self._later), value=Modality.TEXT)
        cache = CompressedCache(branch_layers(self.layers), ModalityMap(labels), self.next_position)
        if repeats > 1:
            cache.batch_repeat_interleave(repeats)
        return cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda rows: rows[indices.to(rows.device)])

    def _map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.labels = ModalityMap(change(self.labels.labels))
        self._next_position = change(self._next_position)

    def kept_entries(self) -> Tensor:
        """float ``[layers, 2]``: video and audio entries held by each compressed layer, merged ones included; mean
        over rows."""
        counts = self.labels.counts()
        held = [layer.kept for layer in compressed_layers(self)]
        kept = [counts if each is None else each.to(counts.device) for each in held]
        return torch.stack(kept).float().mean(dim=1)

    def full_entries(self) -> Tensor:
        """float ``[2]``: video and audio entries that the full cache holds in a layer; mean over rows."""
        return self.labels.counts().float().mean(dim=0)

    def kv_bytes(self) -> int:
        """Bytes of all keys and values held, sliding layers included."""
        held = [
            layer.tensors
            if isinstance(layer, CompressedLayer)
            else [getattr(layer, n, None) for n in ("keys", "values")]
            for layer in self.layers
        ]
        return sum(tensor.nbytes for tensors in held for tensor in tensors if tensor is not None)


def compressed_layers(cache: Cache) -> list[CompressedLayer]:
    return [layer for layer in cache.layers if isinstance(layer, CompressedLayer)]


def as_compressed(cache: Cache, labels: ModalityMap, next_position: Tensor) -> CompressedCache:
    """A cache that has taken in its first media, with what it is to know of them.

    A plain dynamic one becomes it in place, since its holder goes on with the object; of another class, which may do
    more, the layers are shared.
    """
    if type(cache) is DynamicCache:
        vars(cache).update(labels=labels, _next_position=next_position)
        cache.__class__ = CompressedCache
    if isinstance(cache, CompressedCache):
        return cache
    return CompressedCache(cache.layers, labels, next_position)


def sliding_layers(cache: Cache) -> list[DynamicSlidingWindowLayer]:
    return [layer for layer in cache.layers if isinstance(layer, DynamicSlidingWindowLayer)]


def branch_layers(layers: list[Any]) -> list[Any]:
    """Copies of cache layers that share the tensors; an update of a copy leaves the original as it is."""
    copies = [copy.copy(layer) for layer in layers]
    compressed = [layer for layer in copies if isinstance(layer, CompressedLayer)]
    lengths = [layer.physical for layer in compressed]
    for layer in compressed:
        layer.lengths, layer.packed = lengths, layer.packed and layer.packed.share()
    return copies


def fresh_cache(adapter: ModelAdapter) -> DynamicCache:
    """An empty cache for the decoder whose full-attention layers can be compressed."""
    cache = DynamicCache(config=adapter.decoder.config)
    adopt(cache, adapter)
    return cache


def adopt(cache: Cache, adapter: ModelAdapter) -> None:
    """Make the layers of a cache compressible, in place: generate goes on holding the same cache object.

    Only layers that own full-attention entries are replaced; what they hold already stays, as text that was seen.

    Raises:
        InputError: the cache is of a kind that cannot be compressed (static, offloaded, quantized).
    """
    if compressed_layers(cache):
        return
    if not cache.layers:  # a DynamicCache that was made without a config learns its layers as they come
        cache.layers.extend(DynamicCache(config=adapter.decoder.config).layers)
    slots = [layer.cache_index for layer in adapter.attention_layers if layer.owner and layer.slot is not None]
    if getattr(cache, "offloading", False) or any(type(cache.layers[index]) is not DynamicLayer for index in slots):
        kinds = sorted({type(cache.layers[index]).__name__ for index in slots})
        raise InputError(
            f"a {type(cache).__name__} of {', '.join(kinds)} cannot be compressed; use the default dynamic cache",
            field="cache",
        )
    lengths: list[int] = []
    for index in slots:
        before: Any = cache.layers[index]
        layer = CompressedLayer(lengths)
        if before.is_initialized:
            layer.lazy_initialization(before.keys, before.values)
            layer.keys, layer.values, layer.seen = before.keys, before.values, before.get_seq_length()
            lengths[layer.slot] = layer.physical
        cache.layers[index] = layer
