"""Observed queries and entries of a prefill, and the listeners that record them or evict layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer

from acckv.cache.layer import CompressedLayer
from acckv.errors import InputError
from acckv.method.modality import Modality, ModalityMap
from acckv.method.scoring import Observation
from acckv.models.base import AttentionLayer, ModelAdapter


@dataclass(frozen=True)
class Observer:
    """A prefill of `labels` tokens behind what a cache holds, followed by the queries of a probe prompt or none.

    Args:
        labels: modality map ``[B, F]`` of the tokens that stay.
        queries: bool ``[B, F]``, on the CPU: those of their queries that a policy reads.
        past: bool ``[B, seen]``, which of the tokens seen before are no padding.
        probe: queries of the probe prompt after them.
    """

    labels: ModalityMap
    queries: Tensor
    past: Tensor
    probe: int = 0

    @property
    def width(self) -> int:
        """Tokens that stay, F."""
        return self.labels.labels.shape[1]

    @cached_property
    def _known_past(self) -> Tensor:
        return self.past.cpu()

    def held_labels(self, layer: CompressedLayer, physical: int) -> Tensor:
        """int64 ``[B, 1 or K, physical + F]``, on the CPU: modality of what the layer held before, then of the new
        tokens.

        Args:
            physical: entries that the layer held before this prefill.
        """
        new = self.labels.host.labels[:, None].long()
        if not physical:
            return new
        tail = physical - layer.region
        after = self._known_past[:, self.past.shape[1] - tail :].long() - 1  # 0 text, -1 padding
        after = after.masked_fill(after < 0, Modality.PADDING)[:, None]
        if layer.labels is None:
            return torch.cat([after, new], dim=-1)
        held = layer.labels.cpu().long()
        heads = held.shape[1]
        return torch.cat([held, after.expand(-1, heads, -1), new.expand(-1, heads, -1)], dim=-1)

    def observe(self, real: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Observation:
        """The queries of the prompt that the policy reads.

        Args:
            real: bool ``[B, N]``, on the CPU, of the entries held and new; keys and values may be longer by a probe
                prompt's.
        """
        first = real.shape[1] - self.width
        return _observation(query[:, :, : self.width], first, key, value, real, scaling).select(self.queries)

    def observe_probe(self, real: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Observation:
        """The queries of the probe prompt."""
        return _observation(query[:, :, self.width :], real.shape[1], key, value, real, scaling)

    def forget_probe(self, cache: Cache, layer: AttentionLayer) -> None:
        """Take the probe prompt's entries back out of a layer that owns entries."""
        if self.probe and layer.owner:
            held: Any = cache.layers[layer.cache_index]
            held.crop(-self.probe)


def _observation(queries: Tensor, first: int, key: Tensor, value: Tensor, real: Tensor, scaling: float) -> Observation:
    """An observation of all `queries`, of which the first stands at index `first` of the sequence."""
    entries = real.shape[1]
    positions = torch.arange(first, first + queries.shape[2]).expand(real.shape[0], -1)
    counted = torch.ones_like(positions, dtype=torch.bool)
    return Observation(queries, key[:, :, :entries], value[:, :, :entries], positions, counted, real, scaling)


class LayerListener(Protocol):
    """Told about each layer of a watched prefill, then that it is over."""

    observer: Observer

    def __call__(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None: ...

    def finish(self) -> None: ...


@dataclass
class Recorder:
    """Keeps what every layer showed; nothing is evicted.

    Attributes:
        observations, probes: one a compressed layer; no probes where none was run.
    """

    observer: Observer
    cache: Cache
    observations: list[Observation] = field(default_factory=list)
    probes: list[Observation] = field(default_factory=list)

    def __call__(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        if layer.owner and layer.slot is not None:
            real = self.observer.labels.host.real
            self.observations.append(self.observer.observe(real, query, key, value, scaling))
            if self.observer.probe:
                self.probes.append(self.observer.observe_probe(real, query, key, value, scaling))
        self.observer.forget_probe(self.cache, layer)

    def finish(self) -> None:
        """Nothing is left to do."""


class CheckedListener:
    """Hands the attention calls of a watched prefill on to its listener, and checks that every layer made one.

    Raises:
        InputError: a layer's attention reads other keys and values than its cache holds, or none came through.
    """

    def __init__(self, adapter: ModelAdapter, cache: Cache, listener: LayerListener) -> None:
        self.adapter, self.cache, self.listener = adapter, cache, listener
        self.slots: set[int] = set()

    def __call__(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        if layer.owner and layer.slot is not None:
            held: Any = self.cache.layers[layer.cache_index]
            for read, kept in ((key, held.keys), (value, held.values)):
                if kept is None or read.shape != kept.shape:
                    shape = "nothing" if kept is None else list(kept.shape)
                    raise InputError(
                        f"{self._name} cannot be compressed: its attention reads entries of {list(read.shape)} "
                        f"where its cache holds {shape} (latent attention, or heads made after the cache)",
                        field="model",
                    )
            if layer.slot in self.slots:
                raise InputError(f"{self._name} cannot be compressed: it runs a layer more than once", field="model")
            self.slots.add(layer.slot)
        self.listener(layer, query, key, value, scaling)

    def finish(self) -> None:
        """The prefill is over."""
        missing = {layer.slot for layer in self.adapter.attention_layers} - {None} - self.slots
        if missing:
            raise InputError(
                f"{self._name} cannot be compressed: the attention of {len(missing)} of its layers does not go through "
                "transformers' attention interface, or was changed while the session was open",
                field="model",
            )
        self.listener.finish()

    @property
    def _name(self) -> str:
        return type(self.adapter.model).__name__


def record_past(cache: Cache) -> dict[int, bool]:
    """Let sliding layers hold all they are given until they are cropped; gives the flags to restore."""
    before = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            before[index] = layer.record_past
            layer.record_past = True
    return before


def restore_past(cache: Cache, flags: dict[int, bool]) -> None:
    """Undo :func:`record_past`; what exceeds a window then is trimmed by the next update."""
    for index, flag in flags.items():
        layer: Any = cache.layers[index]
        layer.record_past = flag
