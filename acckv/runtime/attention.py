"""Scoped shadowing of transformers' attention function, and what is done in its place.

The attention function is the one place that sees queries, keys, values, mask and scaling after position embedding.
The entry in use is replaced inside a context manager and restored on exit. No new name is registered: a name that
transformers does not know gets no mask.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, local
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from acckv.cache.layer import CompressedLayer
from acckv.models.base import AttentionLayer, ModelAdapter

#: (original, layer index, module, query, key, value, attention_mask, **kwargs) -> (output, weights)
Attend = Callable[..., tuple[Tensor, Tensor | None]]
#: (layer, query, keys held, values held, scaling) after the attention of one layer
Listener = Callable[[AttentionLayer, Tensor, Tensor, Tensor, float], None]
#: the decoder's keyword argument that carries a simulation to its attention
SIMULATION = "acckv_simulation"


@dataclass
class _Entry:
    """An attention function of transformers while sessions are open that use it.

    Attributes:
        dispatch: stands in its place; before: what the mapping held of its own, or None where it inherits.
        watched: id of an attention module -> (its layer, where its attention goes).
    """

    dispatch: Attend
    before: Attend | None
    watched: dict[int, tuple[int, Attend]]


# The mapping is one for the whole process, and models whose sessions overlap share an entry of it, in any order of
# opening and closing: the first session puts the stand-in there and the last one takes it away.
_entries: dict[str, _Entry] = {}
_entries_lock = Lock()


@contextmanager
def hook_attention(modules: list[nn.Module], implementation: str, attend: Attend) -> Iterator[None]:
    """Send the attention of `modules` through `attend` while the context is open; all others stay untouched.

    Args:
        modules: the decoder's attention modules, in order of layer.
        implementation: the name that the decoder's config has in use, such as 'sdpa' or 'eager'.
    """
    ours = {id(module): (layer, attend) for layer, module in enumerate(modules)}
    with _entries_lock:
        entry = _entries.get(implementation)
        if entry is None:
            entry = _entries[implementation] = _installed(implementation)
        entry.watched.update(ours)
    try:
        yield
    finally:
        with _entries_lock:
            for module in ours:
                entry.watched.pop(module, None)
            if not entry.watched:
                del _entries[implementation]
                _restore(implementation, entry)


def _installed(implementation: str) -> _Entry:
    """A stand-in for an attention function, in the mapping, that watches nothing yet."""
    inherited = ALL_ATTENTION_FUNCTIONS.get(implementation)
    watched: dict[int, tuple[int, Attend]] = {}

    def dispatch(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        # 'eager' is no entry of the mapping: every model file has its own.
        original = inherited or sys.modules[type(module).__module__].eager_attention_forward
        place = watched.get(id(module))
        if place is None:
            return original(module, *args, **kwargs)
        layer, attend = place
        return attend(original, layer, module, *args, **kwargs)

    entry = _Entry(dispatch, ALL_ATTENTION_FUNCTIONS._local_mapping.get(implementation), watched)
    ALL_ATTENTION_FUNCTIONS[implementation] = dispatch
    return entry


def _restore(implementation: str, entry: _Entry) -> None:
    if ALL_ATTENTION_FUNCTIONS._local_mapping.get(implementation) is not entry.dispatch:
        return  # somebody else put theirs over it since; it may call the stand-in, which watches nothing any more
    if entry.before is None:
        del ALL_ATTENTION_FUNCTIONS[implementation]
    else:
        ALL_ATTENTION_FUNCTIONS[implementation] = entry.before


@contextmanager
def attention_of_masks(adapter: ModelAdapter) -> Iterator[None]:
    """Run the decoder with attention whose masks can be cut to a compressed layer while the context is open.

    Flash attention and its like read no mask for each layer; with a warning, SDPA takes their place, or whatever the
    decoder has. The towers keep theirs.
    """
    config, before = adapter.decoder.config, adapter.attention_implementation
    if before in adapter.attention_implementations:
        yield
        return
    has = {"sdpa": getattr(adapter.decoder, "_supports_sdpa", False), "eager": True}
    instead = next(name for name in adapter.attention_implementations if has[name])
    warnings.warn(
        f"attention {before!r} has no mask that could be cut to a compressed layer: the decoder runs with {instead!r} "
        "until the session is closed",
        stacklevel=5,
    )
    config._attn_implementation_internal = instead
    try:
        yield
    finally:
        config._attn_implementation_internal = before


class AttentionHook(local):
    """The session's part in every attention call of the decoder.

    Each thread has its own: backward of one thread may repeat attention (gradient checkpointing) while a request of
    another is running.

    Attributes:
        cache: of the forward that is running, or None.
        listener: told about every layer after its attention, or None.
        reached: whether any attention came through here since it was last set to False.
    """

    def __init__(self, layers: list[AttentionLayer]) -> None:
        self.layers = layers
        self.cache: Cache | None = None
        self.listener: Listener | None = None
        self.reached = False
        self._regions: dict[int, tuple[int, Tensor | None]] = {}
        self._additive: tuple[Tensor, Tensor] | None = None

    def forget(self) -> None:
        """Let go of what served the layers of one forward."""
        self._additive = None

    def attend(
        self,
        original: Attend,
        index: int,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The shadowed attention function of one decoder layer."""
        self.reached = True
        layer = self.layers[index]
        simulation = kwargs.pop(SIMULATION, None)
        if simulation is not None:
            return simulation.attend(original, layer, module, query, key, value, attention_mask, **kwargs)
        region, bias = self._region(layer)
        wider = attention_mask is not None and attention_mask.shape[-1] > key.shape[2]
        mask = attention_mask
        if layer.slot is not None and (region or wider):
            mask = region_mask(self._shared(attention_mask, query.dtype), query, key.shape[2], region, bias)
        output = original(module, query, key, value, mask, **kwargs)
        if self.listener is not None:
            scaling = kwargs.get("scaling")
            self.listener(layer, query, key, value, module.scaling if scaling is None else scaling)  # type: ignore[arg-type]
        return output

    def _shared(self, mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """The mask that all layers of a forward get, made additive once."""
        if mask is None:
            return None
        if self._additive is None or self._additive[0] is not mask:
            self._additive = mask, additive(mask, dtype)
        return self._additive[1]

    def _region(self, layer: AttentionLayer) -> tuple[int, Tensor | None]:
        """Width and bias of the compressed region that this layer's keys begin with.

        A layer that shares entries got them from their owner in the same forward, so the owner's region of that moment
        counts: it may have been compressed anew since.
        """
        if layer.slot is None or self.cache is None:
            return 0, None
        if layer.owner:
            held = self.cache.layers[layer.cache_index]
            now = (held.region, held.bias) if isinstance(held, CompressedLayer) else (0, None)
            self._regions[layer.slot] = now
        return self._regions[layer.slot]


def region_mask(
    attention_mask: Tensor | None, query: Tensor, key_length: int, region: int, bias: Tensor | None
) -> Tensor | None:
    """The mask of a layer whose first `region` entries are compressed.

    Every later query sees the whole region, but for empty places. The tail keeps the columns that transformers made
    for it: they are the last ones of a mask that is as wide as the longest layer.

    Args:
        attention_mask: ``[B, 1 or H, Q, W]`` bool or additive, or None (plain causal).
        query: ``[B, H, Q, D]``; bias: ``[B, K or 1, region]`` or None.

    Returns:
        a mask ``[B, 1 or H, Q, key_length]``, or None where the attention function needs none.
    """
    batch, heads, length = query.shape[:3]
    tail = key_length - region
    if attention_mask is None:
        if bias is None and (length == 1 or region == 0):
            return None
        causal = torch.ones(length, tail, dtype=torch.bool, device=query.device).tril(tail - length)
        attention_mask = causal[None, None].expand(batch, 1, -1, -1)
    attention_mask = attention_mask[..., attention_mask.shape[-1] - tail :]
    tail_mask = additive(attention_mask, query.dtype)
    if bias is None:
        return F.pad(tail_mask, (region, 0))
    context = bias.to(query).clamp_min(torch.finfo(query.dtype).min)[:, :, None]
    if context.shape[1] > 1:
        context = context.repeat_interleave(heads // context.shape[1], dim=1)
    context = context.expand(-1, -1, length, -1)
    tail_mask = tail_mask.expand(batch, context.shape[1], -1, -1)
    return torch.cat([context, tail_mask], dim=-1)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to attention logits."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
