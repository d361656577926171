"""The slow reference: an eager copy of a model, all of whose entries stay, with a mask that hides what was evicted.

It is written against plain transformers. What was evicted is read off the keys that a compressed cache still holds.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from acckv.cache.layer import CompressedLayer
from tests.support.running import plain_inputs

#: For each layer of the cache: (logical index from which queries no longer see them, bool [heads, columns] evicted).
Evictions = dict[int, list[tuple[int, Tensor]]]
#: Attributes that tell an attention module from a decoder layer.
PROJECTIONS = ("q_proj", "k_proj", "qkv_proj", "c_attn", "query_key_value", "kv_b_proj", "att_proj")


class NotReached(Exception):
    """A layer that lost entries takes no mask: the reference cannot speak of this model."""


class Reference:
    """An eager copy of a model, made before a session opens, and what one conversation lost in that session."""

    def __init__(self, model: Any, evictions: Evictions | None = None) -> None:
        self.model = copy.deepcopy(model)
        self.model.set_attn_implementation("eager")
        self.evictions: Evictions = evictions or {}

    @contextmanager
    def hiding(self) -> Iterator[Any]:
        """The model, in which later queries do not see what was evicted; the rows of a batch are equal."""
        reached = set()

        def hide(module: Any, args: Any, kwargs: Any) -> Any:
            index = source_layer(module)
            bound = inspect.signature(module.forward).bind(*args, **kwargs)
            mask = bound.arguments.get("attention_mask")
            if index not in self.evictions or not isinstance(mask, Tensor) or mask.ndim != 4:
                return None
            reached.add(index)
            hidden = hidden_columns(self.evictions[index], *mask.shape[-2:])
            hidden = hidden.repeat_interleave(query_heads(module, self.model) // len(hidden), 0)[None]
            low = torch.finfo(mask.dtype if mask.is_floating_point() else torch.float32).min
            mask = torch.where(mask, 0.0, low) if mask.dtype == torch.bool else mask
            bound.arguments["attention_mask"] = mask.expand(-1, hidden.shape[1], -1, -1).masked_fill(hidden, low)
            return bound.args, bound.kwargs

        with ExitStack() as stack, torch.no_grad():
            for module in self.model.modules():
                takes_mask = "attention_mask" in inspect.signature(module.forward).parameters
                if hasattr(module, "layer_idx") and takes_mask and any(hasattr(module, name) for name in PROJECTIONS):
                    stack.callback(module.register_forward_pre_hook(hide, with_kwargs=True).remove)
            yield self.model
        if reached != set(self.evictions):
            raise NotReached(f"the reference reached layers {sorted(reached)} of {sorted(self.evictions)}")

    def read(self, inputs: dict[str, Any], cache: Any) -> None:
        """Add what was evicted last, read off the keys that the compressed cache of one row still holds.

        Args:
            inputs: the conversation up to there, or further, as one prompt.
        """
        with self.hiding() as model:
            full = cache_of(model(**plain_inputs(inputs), use_cache=True))
        for index, layer in enumerate(cache.layers):
            if not isinstance(layer, CompressedLayer):
                continue
            boundary = cache.get_seq_length() - (layer.physical - layer.region)
            times = self.evictions.setdefault(index, [])
            if all(boundary != before for before, _ in times):
                bias = layer.bias
                if layer.packed is None:
                    held = layer.keys
                else:
                    held, _, empty = layer.packed.padded()
                    bias = (torch.zeros(empty.shape) if bias is None else bias).masked_fill(empty, -torch.inf)
                keys, held = full.layers[index].keys[0, :, :boundary], held[0, :, : layer.region]
                bias = torch.zeros(held.shape[:2]) if bias is None else bias[0]
                assert bool(((bias == 0) | (bias == -torch.inf)).all()), "a merged entry is no token"
                times.append((boundary, missing(keys, held, bias == 0)))


def hidden_columns(evictions: list[tuple[int, Tensor]], rows: int, columns: int) -> Tensor:
    """bool ``[heads, rows, columns]``: what the last `rows` of so many positions do not see in a layer."""
    positions = torch.arange(columns - rows, columns)
    hidden = torch.zeros(len(evictions[0][1]), rows, columns, dtype=torch.bool)
    for boundary, evicted in evictions:
        evicted = evicted[:, :columns]
        hidden[..., : evicted.shape[1]] |= evicted[:, None] & (positions >= boundary)[:, None]
    return hidden


def cache_of(output: Any) -> Any:
    """The cache of a model's output, under the name that the model has for it."""
    return output.get("cache", output.get("past_key_values"))


def missing(keys: Tensor, held: Tensor, read: Tensor | None = None) -> Tensor:
    """bool ``[heads, tokens]`` of the keys ``[heads, tokens, size]`` that are not among those held.

    Args:
        read: bool ``[heads, held]``, false at empty places; None where there are none.
    """
    tolerance = max(1e-4, 32 * torch.finfo(keys.dtype).eps)  # of rounding: other keys are as far as they are long
    keys, held = keys.double(), held.double()
    nearest = torch.cdist(held, keys).min(dim=-1)
    read = torch.ones(held.shape[:2], dtype=torch.bool) if read is None else read
    if bool(read.any()) and nearest.values[read].max() > tolerance * keys.abs().max():
        raise AssertionError("entries are held that were never there")
    return torch.zeros(keys.shape[:2]).scatter_add(1, nearest.indices, read.float()) == 0


def source_layer(module: Any) -> int:
    """The cache layer that an attention module reads: its own, or that of the layer whose entries it shares."""
    index = int(module.layer_idx)
    if getattr(module, "kv_shared_layer_index", None) is not None:
        return int(module.kv_shared_layer_index)
    if getattr(module, "is_kv_shared_layer", False):
        modes, kinds = module.config.kv_sharing_modes, module.config.layer_types
        return max(i for i in range(index) if modes[i] != "reuse" and kinds[i] == kinds[index])
    return index


def query_heads(module: Any, model: Any) -> int:
    """Of an attention module."""
    for name in ("num_heads", "num_attention_heads", "n_heads"):
        if isinstance(getattr(module, name, None), int):
            return int(getattr(module, name))
    return int(model.config.get_text_config(decoder=True).num_attention_heads)
