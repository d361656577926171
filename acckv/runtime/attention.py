"""Scoped shadowing of transformers' attention function, and what is done in its place.

The attention function is the one place that sees queries, keys, values, mask and scaling after position embedding.
The entry in use is replaced inside a context manager and restored on exit. No new name is registered: a name that
transformers does not know gets no mask.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from acckv.cache.packed import PackedEntries
from acckv.errors import InputError
from acckv.models.base import AttentionLayer, ModelAdapter

#: (original, layer index, module, query, key, value, attention_mask, **kwargs) -> (output, weights)
Attend = Callable[..., tuple[Tensor, Tensor | None]]
#: (layer, query, keys held, values held, scaling) after the attention of one layer
Listener = Callable[[AttentionLayer, Tensor, Tensor, Tensor, float], None]
#: the decoder's keyword argument that carries a simulation to its attention
SIMULATION = "acckv_simulation"


@dataclass(frozen=True)
class Region:
    """The compressed entries that a layer's keys begin with.

    Args:
        width: of the longest head; bias: ``[B, K or 1, width]`` on attention logits, or None.
        packed: the layer's keys and values where its heads hold unequal numbers of entries.
    """

    width: int = 0
    bias: Tensor | None = None
    packed: PackedEntries | None = None


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
        self._regions: dict[int, Region] = {}
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
        region = self._region(layer)
        if region.packed is not None:
            mask = self._shared(attention_mask, query.dtype)
            return attend_packed(original, module, query, region.packed, mask, region.bias, **kwargs)
        wider = attention_mask is not None and attention_mask.shape[-1] > key.shape[2]
        mask = attention_mask
        if layer.slot is not None and (region.width or wider):
            shared = self._shared(attention_mask, query.dtype)
            mask = region_mask(shared, query, key.shape[2], region.width, region.bias)
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

    def _region(self, layer: AttentionLayer) -> Region:
        """The compressed region that this layer's keys begin with.

        A layer that shares entries got them from their owner in the same forward, so the owner's region of that moment
        counts: it may have been compressed anew since.
        """
        if layer.slot is None or self.cache is None:
            return Region()
        if layer.owner:
            held = self.cache.layers[layer.cache_index]
            now = Region(held.region, held.bias, held.packed) if isinstance(held, CompressedLayer) else Region()
            self._regions[layer.slot] = now
        return self._regions[layer.slot]


def attend_packed(
    original: Attend,
    module: nn.Module,
    query: Tensor,
    packed: PackedEntries,
    attention_mask: Tensor | None,
    bias: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention to a layer whose heads hold unequal numbers of entries: a call a row and KV head, on views.

    Args:
        query: ``[B, H, Q, D]``; attention_mask: additive ``[B, 1 or H, Q, W]``, or None (plain causal).
        bias: ``[B, K, region]`` of the longest head, shorter ones at its end; or None.

    Returns:
        output ``[B, Q, H, D]``, and weights ``[B, H, Q, W]`` of which the entries of shorter heads are the last, or
        None where the attention function gives none.

    Raises:
        InputError: the attention function takes something of every head, such as sinks.
    """
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if unknown:
        raise InputError(f"cannot be read head by head ({unknown[0]}); set head_budgets: equal", field="head_budgets")
    rows, heads = packed.lengths.shape
    asked = query.unflatten(1, (heads, -1)).flatten(0, 1)[:, None].unbind()
    if attention_mask is None and bias is None and query.shape[2] == 1:
        masks: Sequence[Tensor | None] = [None] * len(asked)
    else:
        masks = _masks_by_head(asked, packed, attention_mask, bias)
    calls = [
        original(module, ask, keys, values, mask, **kwargs)
        for ask, keys, values, mask in zip(asked, *packed.segments(), masks, strict=True)
    ]
    output = torch.cat([output for output, _ in calls]).unflatten(0, (rows, heads)).transpose(1, 2).flatten(2, 3)
    if calls[0][1] is None:
        return output, None
    weights = [F.pad(weight, (packed.widest - weight.shape[-1], 0)) for _, weight in calls if weight is not None]
    return output, torch.cat(weights).unflatten(0, (rows, heads)).flatten(1, 2)


def _masks_by_head(
    asked: Sequence[Tensor], packed: PackedEntries, attention_mask: Tensor | None, bias: Tensor | None
) -> list[Tensor | None]:
    masks = []
    heads = packed.lengths.shape[1]
    for place, region in enumerate(packed.lengths.flatten().tolist()):
        row, head = divmod(place, heads)
        mask = None if attention_mask is None else attention_mask[row : row + 1]
        if mask is not None and mask.shape[1] > 1:
            mask = mask.unflatten(1, (heads, -1))[:, head]
        mass = None if bias is None else bias[row : row + 1, head : head + 1, bias.shape[-1] - region :]
        masks.append(region_mask(mask, asked[place], region + packed.tail, region, mass))
    return masks


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
        if bias is None and length in (1, key_length):
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
