"""Layers whose heads keep unequal numbers of entries: what they hold and answer, against the padded rectangle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AttentionInterface

from acckv.cache.cache import branch_layers
from acckv.cache.layer import CompressedLayer
from acckv.cache.packed import PackedEntries
from acckv.errors import InputError
from acckv.method.plan import LayerPlan
from acckv.runtime.attention import attend_packed, region_mask
from tests.support import not_none

ROWS, HEADS, GROUPS, SIZE = 2, 3, 2, 4


def committed(gates: Tensor, mass: float = 0.0) -> CompressedLayer:
    """A layer of random entries of which `gates` (bool ``[ROWS, HEADS, N]``) are kept, and two merged ones in all."""
    entries = gates.shape[-1]
    layer = CompressedLayer([])
    draw = torch.Generator().manual_seed(0)
    layer.update(*torch.randn(2, ROWS, HEADS, entries, SIZE, generator=draw))
    merged = torch.randn(2, ROWS, HEADS, 2 if mass else 0, SIZE, generator=draw)
    log_gates = torch.zeros(ROWS, HEADS, entries + merged.shape[3])
    log_gates[..., :entries].masked_fill_(~gates, -torch.inf)
    labels = torch.ones(ROWS, 1, entries, dtype=torch.long)
    layer.commit(LayerPlan(log_gates, merged[0], merged[1], torch.full(merged.shape[1:4], mass)), labels)
    return layer


def some_gates(entries: int = 9) -> Tensor:
    """Every head keeps another number, one of them nothing."""
    gates = torch.rand(ROWS, HEADS, entries, generator=torch.Generator().manual_seed(1)) < 0.5
    gates[0, 0], gates[0, 1], gates[1, 1, :5] = True, False, True
    return gates


def later(tokens: int) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn(2, ROWS, HEADS, tokens, SIZE, generator=torch.Generator().manual_seed(tokens))
    return keys, values


def as_lists(packed: PackedEntries) -> list[list[float]]:
    return [keys[0, 0, :, 0].tolist() for keys in packed.segments()[0]]


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_segments_are_lists_to_which_tokens_are_added(data: st.DataObject) -> None:
    """Against plain lists: append, crop, select and branches that go on by themselves, in any order."""
    counts = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3), min_size=1, max_size=3))
    )
    counts[0, 0] += 1
    width = int(counts.max())
    keys = torch.arange(float(counts.numel() * width)).view(*counts.shape, width, 1)
    packed = PackedEntries.of(keys, -keys, counts)
    lists = [
        keys[row, head, width - counts[row, head] :, 0].tolist() for row in range(len(counts)) for head in range(3)
    ]
    alive, number = [(packed, lists)], 1000.0
    for _ in range(data.draw(st.integers(1, 8))):
        index = data.draw(st.integers(0, len(alive) - 1))
        packed, lists = alive[index]
        rows = packed.lengths.shape[0]
        action = data.draw(st.sampled_from(["append", "crop", "select", "branch"]))
        if action == "append":
            tokens = data.draw(st.integers(1, 20))
            new = number + torch.arange(float(rows * 3 * tokens)).view(rows, 3, tokens, 1)
            number += new.numel()
            packed.append(new, -new)
            for place, each in enumerate(new.flatten(0, 1)[..., 0].tolist()):
                lists[place] += each
        elif action == "crop":
            tokens = data.draw(st.integers(0, packed.tail))
            packed.crop(tokens)
            lists[:] = [held[: len(held) - tokens] for held in lists]
        else:
            order = torch.tensor(data.draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4)))
            copy = packed.select(order) if action == "select" else packed.share()
            taken = [
                list(lists[int(row) * 3 + head])
                for row in (order if action == "select" else range(rows))
                for head in range(3)
            ]
            alive.append((copy, taken))
        for held, expected in alive:
            assert as_lists(held) == expected
            rectangle, _, empty = held.padded()
            assert rectangle.shape[2] == held.widest >= max(map(len, expected))
            assert (empty.sum(-1) + held.lengths).unique().tolist() == [held.widest - held.tail]
    assert all(torch.equal(held.values, -held.keys) for held, _ in alive)


def test_rows_that_hold_nothing_are_a_rectangle_of_empty_places() -> None:
    kept = torch.tensor([[2, 0], [0, 0]])
    packed = PackedEntries.of(torch.ones(2, 2, 2, SIZE), torch.ones(2, 2, 2, SIZE), kept).select(torch.tensor([1]))
    keys, values, empty = packed.padded()
    assert keys.shape == values.shape == (1, 2, 2, SIZE) and bool(empty.all())


def test_bytes_held_are_those_of_the_entries_kept() -> None:
    gates = some_gates(400)
    layer = committed(gates)
    entry = 2 * SIZE * 4
    assert layer.packed is not None and layer.keys is None
    assert sum(tensor.nbytes for tensor in layer.tensors) == int(gates.sum()) * entry
    layer.update(*later(1))
    with_room = sum(tensor.nbytes for tensor in layer.tensors)
    assert with_room <= (int(gates.sum()) + 9 * ROWS * HEADS) * entry
    pointers = [tensor.data_ptr() for tensor in layer.tensors]
    layer.update(*later(8))  # in place: what there is room for moves nothing
    assert [tensor.data_ptr() for tensor in layer.tensors] == pointers


def dense(layer: CompressedLayer) -> CompressedLayer:
    """The same entries as a padded rectangle."""
    (copy,) = branch_layers([layer])
    copy.unpack()
    assert isinstance(copy, CompressedLayer) and copy.packed is None and copy.keys.shape[2] == layer.physical
    return copy


class Attention(nn.Module):
    """Of a decoder layer, as transformers' attention functions know it."""

    num_key_value_groups, is_causal, scaling = GROUPS, True, 0.7


@pytest.mark.parametrize("mass", [0.0, 0.8])
@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_by_head_is_masked_attention(mass: float, tokens: int, masked: bool, implementation: str) -> None:
    if implementation == "eager":
        from transformers.models.llama.modeling_llama import eager_attention_forward as original
    else:
        original = AttentionInterface()["sdpa"]
    layer, module = committed(some_gates(), mass), Attention().eval()
    reference = dense(layer)
    for one in (layer, reference):
        one.update(*later(3))
        one.update(*later(tokens))
    assert layer.packed is not None and layer.physical == reference.physical
    query = torch.randn(ROWS, HEADS * GROUPS, tokens, SIZE)
    mask = None
    if masked:  # the first of the later tokens is padding in one row
        mask = torch.zeros(ROWS, 1, tokens, layer.physical + 2)  # as wide as another layer
        mask[..., -tokens:] = torch.full((tokens, tokens), -1e9).triu(1)
        mask[1, ..., -tokens - 3] = -1e9
    got, weights = attend_packed(original, module, query, layer.packed, mask, layer.bias, scaling=0.7)
    full = region_mask(mask, query, reference.physical, reference.region, reference.bias)
    expected, full_weights = original(module, query, reference.keys, reference.values, full, scaling=0.7)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert (weights is None) == (full_weights is None)
    if weights is not None and full_weights is not None:
        torch.testing.assert_close(weights, full_weights, atol=1e-6, rtol=1e-5)


def test_what_is_given_by_head_is_refused() -> None:
    layer = committed(some_gates())
    assert layer.packed is not None
    with pytest.raises(InputError, match="cannot be read head by head"):
        attend_packed(
            lambda *_: (torch.zeros(1), None),
            Attention(),
            torch.zeros(ROWS, 6, 1, SIZE),
            layer.packed,
            None,
            None,
            s_aux=torch.zeros(6),
        )


def same(layer: CompressedLayer, other: CompressedLayer) -> None:
    """Two layers hold the same entries, with the same marks."""
    layer, other = dense(layer), dense(other)
    real = torch.isfinite(other._region_bias(other.physical))
    assert torch.equal(real, torch.isfinite(layer._region_bias(layer.physical)))
    assert torch.equal(layer.keys[real], other.keys[real]) and torch.equal(layer.values[real], other.values[real])
    assert torch.equal(layer._region_bias(layer.region), other._region_bias(other.region)) and (
        layer.seen,
        layer.region,
    ) == (
        other.seen,
        other.region,
    )
    assert layer.labels is not None and other.labels is not None and torch.equal(layer.labels, other.labels)


@pytest.mark.parametrize("mass", [0.0, 0.8])
def test_beams_batches_and_further_evictions_are_those_of_the_rectangle(mass: float) -> None:
    changes: list[Any] = [
        lambda layer: layer.update(*later(3)),
        lambda layer: layer.crop(-1),
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([3, 0])),
        lambda layer: layer.compact(torch.tensor([[True, False], [True, True]])),
        lambda layer: layer.update(*later(2)),
    ]
    packed = committed(some_gates(), mass)
    padded = dense(packed)
    for change in changes:
        change(packed)
        change(padded)
        padded.unpack()
        assert packed.packed is not None and packed.physical == padded.physical == packed.lengths[packed.slot]
        same(packed, padded)
    assert packed.kept is not None and padded.kept is not None and torch.equal(packed.kept, padded.kept)
    before = packed.physical
    gates = torch.zeros(ROWS, 1, before)
    gates[..., : before - 3] = -torch.inf  # every head keeps its last three: a rectangle again
    labels = torch.zeros(ROWS, 1, before, dtype=torch.long)
    none = torch.zeros(ROWS, HEADS, 0, SIZE)
    packed.commit(LayerPlan(gates, none, none, none[..., 0]), labels)
    assert packed.packed is None and packed.keys.shape == (ROWS, HEADS, 3, SIZE)


def test_branches_leave_the_entries_of_each_other_alone() -> None:
    layer = committed(some_gates())
    layer.update(*later(3))  # there is room from now on
    (first,), (second,) = branch_layers([layer]), branch_layers([layer])
    packed = [not_none(one.packed) for one in (layer, first, second)]
    assert len({one.keys.data_ptr() for one in packed}) == 1
    before = as_lists(packed[0])
    layer.crop(-2)
    layer.update(*later(1))  # where the others' entries lie
    first.update(*later(2))
    second.update(*later(4))
    for one, cut, added in zip(packed, (2, 0, 0), (1, 2, 4), strict=True):
        new = later(added)[0].flatten(0, 1)[..., 0].tolist()
        assert as_lists(one) == [held[: len(held) - cut] + more for held, more in zip(before, new, strict=True)]


def test_a_cache_of_an_inference_mode_goes_on_outside_of_it() -> None:
    with torch.inference_mode():
        layer = committed(some_gates())
        layer.update(*later(1))
    layer.update(*later(2))
    assert layer.packed is not None and layer.packed.tail == 3
    layer.reset()
    assert layer.packed is None and layer.physical == 0 and layer.seen == 0
