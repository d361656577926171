"""Whether a decoder's attention is what a session takes it for, found out before anything is answered."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from acckv.errors import InputError
from acckv.models.base import AttentionLayer, ModelAdapter
from acckv.runtime.observation import WatchListener


class Heard:
    """Hands the attention calls of a watched prefill on to its listener, and checks that every layer made one.

    Raises:
        InputError: a layer's attention reads other keys and values than its cache holds, or none came through.
    """

    def __init__(self, adapter: ModelAdapter, cache: Cache, listener: WatchListener) -> None:
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
