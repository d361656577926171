"""The rotary layout of each layer of a loaded model, found by running the layer and not by knowing its family."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import Any

import torch
from torch import Tensor

from acckv.errors import InputError
from acckv.method.rotary import RotaryLayout, rotate
from acckv.models.base import AttentionLayer, ModelAdapter
from acckv.models.batching import rope_positions
from acckv.runtime.attention import AttentionHook

#: Positions of the three tokens that are run.
_POSITIONS = (0, 3, 11)


@torch.no_grad()
def find_layouts(adapter: ModelAdapter, attention_hook: AttentionHook) -> list[RotaryLayout]:
    """The rotary layout of every compressed layer, checked against the queries of the model's own attention.

    The decoder runs over three tokens, then each attention once more on the same hidden states with cosines of 1 and
    sines of 0. The layout that turns the second queries into the first is the layer's.

    Args:
        attention_hook: of an open session, through which the decoder's attention is watched.

    Raises:
        InputError: no layout does, so that positions cannot be taken off.
    """
    device = adapter.device
    positions = adapter.text_positions(torch.tensor([_POSITIONS], device=device))
    if positions.ndim == 3:  # three axes that differ, so that a mistaken one shows
        positions = positions + 2 * torch.arange(len(positions), device=device)[:, None, None]
    calls: dict[int, tuple[Any, Any]] = {}
    with _noting_calls(adapter, calls), _queries(attention_hook) as turned:
        ids = torch.arange(3, 3 + len(_POSITIONS), device=device)[None]
        adapter.decoder(**adapter.embed(ids), position_ids=positions, use_cache=False)
    layouts = []
    for layer in adapter.attention_layers:
        if layer.slot is None or not layer.owner:
            continue
        args, options = calls[id(layer.module)]
        with _queries(attention_hook) as plain:
            layer.module(*args, **_without_rotation(options))
        tables = adapter.rotation(rope_positions(positions), layer)
        layouts.append(_match(adapter, layer, plain[layer.slot], turned[layer.slot], tables))
    return layouts


def _match(
    adapter: ModelAdapter, layer: AttentionLayer, plain: Tensor, turned: Tensor, tables: tuple[Tensor, Tensor] | None
) -> RotaryLayout:
    tolerance = 32 * torch.finfo(turned.dtype).eps * float(turned.float().abs().max())
    for layout in _candidates(turned.shape[-1], tables):
        cos, sin = spread(layout, tables, plain.float()[:, 0])
        found = rotate(plain.float(), cos[:, None].to(plain.device), sin[:, None].to(plain.device), layout)
        if float((found - turned.float()).abs().max()) <= tolerance:
            return layout
    name = type(adapter.model).__name__
    raise InputError(
        f"takes positions off queries, which layer {layer.cache_index} of {name} turns in a way that is not known; "
        "take another policy",
        field="policy",
    )


def spread(layout: RotaryLayout, tables: tuple[Tensor, Tensor] | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for each element of a head ``[B, N, D]``.

    Args:
        tables: as the model makes them; None, or unread, where the layer has no position embedding.
        like: ``[B, N, D]``.
    """
    if tables is None or not layout.size:
        return torch.ones_like(like), torch.zeros_like(like)
    return layout.spread(tables[0].float(), 1.0), layout.spread(tables[1].float(), 0.0)


def _candidates(head_size: int, tables: tuple[Tensor, Tensor] | None) -> Iterator[RotaryLayout]:
    """The layouts of position embeddings: none, part of a head or all of it, by halves or by neighbours."""
    yield RotaryLayout(head_size)
    if tables is None or torch.is_complex(tables[0]):
        return
    width = tables[0].shape[-1]
    sizes = dict.fromkeys(size for size in (width, 2 * width) if size <= head_size)
    for size, neighbours, interleaved in product(sizes, (False, True), (False, True)):
        for start in dict.fromkeys((0, head_size - size)):
            if not (interleaved and size != width):
                yield RotaryLayout(head_size, start, size, neighbours, interleaved)


@contextmanager
def _noting_calls(adapter: ModelAdapter, calls: dict[int, tuple[Any, Any]]) -> Iterator[None]:
    """The arguments that every attention module is called with."""

    def note(module: Any, args: Any, options: Any) -> None:
        calls[id(module)] = args, options

    with ExitStack() as stack:
        for module in adapter.decoder_attention:
            stack.callback(module.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield


@contextmanager
def _queries(attention_hook: AttentionHook) -> Iterator[dict[int, Tensor]]:
    """By compressed layer, the queries ``[B, H, N, D]`` that its attention gets."""
    found: dict[int, Tensor] = {}

    def listen(layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        if layer.slot is not None and layer.owner:
            found[layer.slot] = query

    before, attention_hook.listener = attention_hook.listener, listen
    try:
        yield found
    finally:
        attention_hook.listener = before


def _without_rotation(options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of an attention with position embeddings that new_tokens nothing."""
    tables = options.get("position_embeddings")
    if not isinstance(tables, tuple):
        return options if tables is None else {**options, "position_embeddings": torch.ones_like(tables)}
    return {**options, "position_embeddings": (torch.ones_like(tables[0]), torch.zeros_like(tables[1]))}
