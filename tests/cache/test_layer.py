"""The entries that a layer and a cache hold after each eviction, by row and head, against plain lists."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionLayer

from acckv.cache.cache import CompressedCache, adopt, as_compressed, compressed_layers, fresh_cache
from acckv.cache.layer import CompressedLayer, settle_window
from acckv.errors import InputError
from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerPlan
from acckv.models import find_adapter
from tests.families import FAMILIES

HEADS, SIZE = 2, 4
INF = torch.inf


def filled(entries: int = 6, rows: int = 2, heads: int = HEADS, dtype: torch.dtype = torch.float32) -> CompressedLayer:
    """Entry n of a row and head holds 100 * row + 10 * head + n, its value the same below zero."""
    layer = CompressedLayer([])
    numbers = 100 * torch.arange(rows)[:, None, None] + 10 * torch.arange(heads)[:, None] + torch.arange(entries)
    keys = numbers.to(dtype)[..., None].expand(-1, -1, -1, SIZE)
    layer.update(keys.clone(), -keys)
    return layer


def plan(gates: list[list[list[int]]], bias: float | None = None) -> LayerPlan:
    """Gates 1 or 0 by row and head; with a bias one merged video and one merged audio entry, 7 and 8."""
    kept = torch.tensor(gates).bool()
    merged = torch.tensor([7.0, 8.0])[:, None].expand(*kept.shape[:2], 2, SIZE)[:, :, : 0 if bias is None else 2]
    return LayerPlan(
        torch.zeros(kept.shape).masked_fill(~kept, -INF), merged, -merged, torch.full(merged.shape[:3], bias or 0.0)
    )


def held(layer: CompressedLayer) -> list[list[list[int]]]:
    """The number of every entry, by row and head; values are those of the keys."""
    assert torch.equal(layer.values, -layer.keys) and layer.keys.shape[-1] == SIZE
    return layer.keys[..., 0].long().tolist()


def test_heads_hold_what_each_keeps_in_order() -> None:
    layer = filled()
    gates = [[[1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 1]], [[0, 1, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1]]]
    layer.commit(plan(gates), torch.tensor([[[0, 1, 1, 2, 2, 0]]] * 2), torch.tensor([[2, 2], [1, 1]]), low_ratio=True)
    assert held(layer) == [[[0, 2, 3], [10, 11, 15]], [[101, 102, 104], [113, 114, 115]]]
    assert layer.bias is None and layer.low_ratio and layer.lengths == [3]
    assert layer.labels is not None and layer.labels.dtype == torch.int8
    assert layer.labels.tolist() == [[[0, 1, 2], [0, 1, 0]], [[1, 1, 2], [2, 2, 0]]]
    assert layer.kept is not None and layer.kept.tolist() == [[1.0, 0.5], [1.0, 1.5]]
    assert layer.candidates is not None and layer.candidates.tolist() == [[2, 2], [1, 1]]
    assert (layer.seen, layer.region, layer.get_mask_sizes(2)) == (6, 3, (5, 3))


def test_a_second_eviction_counts_what_it_offers_besides_and_drops_a_probe() -> None:
    layer = filled()
    layer.commit(
        plan([[[1, 0, 1, 1, 0, 0]] * HEADS] * 2), torch.tensor([[[0, 1, 1, 2, 2, 0]]] * 2), torch.tensor([[2, 2]] * 2)
    )
    later = torch.full((2, HEADS, 3, SIZE), 50.0) + torch.arange(3)[:, None]
    layer.update(later, -later)
    assert (layer.seen, layer.physical) == (9, 6)
    # Of three later entries the last is a probe, of which the plan does not speak.
    layer.commit(
        plan([[[1, 0, 1, 0, 1]] * HEADS] * 2), torch.tensor([[[0, 1, 2, 1, 1]]] * 2), torch.tensor([[2, 0]] * 2)
    )
    assert held(layer)[0] == [[0, 3, 51], [10, 13, 51]]
    assert (layer.seen, layer.region, layer.bias) == (8, 3, None)
    assert layer.candidates is not None and layer.candidates.tolist() == [[4, 2]] * 2 and not layer.low_ratio


def test_merged_entries_come_last_and_carry_their_mass_through_later_evictions() -> None:
    layer = filled()
    layer.commit(
        plan([[[1, 0, 0, 0, 0, 1, 1, 0]] * HEADS, [[0, 0, 1, 1, 0, 0, 1, 1]] * HEADS], 0.5),
        torch.tensor([[[0, 1, 1, 2, 2, 0]]] * 2),
    )
    assert held(layer)[1] == [[102, 103, 7, 8], [112, 113, 7, 8]]
    assert held(layer)[0][0][1:] == [0, 5, 7]  # one less: masked on the left
    assert layer.bias is not None and layer.labels is not None
    assert layer.bias[:, 0].tolist() == [[-INF, 0.0, 0.0, 0.5], [0.0, 0.0, 0.5, 0.5]]
    assert layer.labels[:, 0].tolist() == [[3, 0, 0, 1], [1, 2, 1, 2]]
    layer.commit(plan([[[0, 0, 1, 1]] * HEADS, [[0, 1, 0, 1]] * HEADS]), layer.labels)
    assert layer.bias.tolist() == [[[0.0, 0.5]] * HEADS, [[0.0, 0.5]] * HEADS] and layer.region == 2


def test_a_single_head_labels_its_merged_entries() -> None:
    layer = filled(heads=1)
    layer.commit(plan([[[1, 0, 0, 0, 0, 1, 1, 1]]] * 2, 0.5), torch.tensor([[[0, 1, 1, 2, 2, 0]]] * 2))
    assert held(layer) == [[[0, 5, 7, 8]], [[100, 105, 7, 8]]]
    assert layer.labels is not None and layer.labels.tolist() == [[[0, 0, 1, 2]]] * 2
    assert layer.labels.dtype == torch.int8


def test_half_entries_stay_half_and_their_mass_float32() -> None:
    layer = filled(dtype=torch.float16)
    layer.commit(plan([[[1, 0, 0, 0, 0, 1, 1, 1]] * HEADS] * 2, 0.3), torch.tensor([[[0, 1, 1, 2, 2, 0]]] * 2))
    layer.update(*torch.ones(2, 2, HEADS, 1, SIZE, dtype=torch.float16))
    layer.compact(torch.ones(2, 1, dtype=torch.bool))
    assert layer.keys.dtype == layer.values.dtype == torch.float16
    assert layer.bias is not None and torch.equal(layer.bias[1, 1], torch.tensor([0.0, 0.0, 0.3, 0.3, 0.0]))


def test_the_order_of_a_long_row_stays() -> None:
    """Sorts that are not stable leave a few entries in order; more than 16 they may not."""
    layer = filled(entries=40)
    layer.commit(plan([[[int(n % 3 > 0) for n in range(40)]] * HEADS] * 2), torch.ones(2, 1, 40, dtype=torch.long))
    assert held(layer)[0][0] == [n for n in range(40) if n % 3]


def test_what_was_held_elsewhere_follows_the_device_of_new_tokens() -> None:
    """Of a prefill that was kept on another device; the meta device stands for it."""
    layer = filled()
    layer.commit(
        plan([[[1, 0, 0, 0, 0, 1, 1, 1]] * HEADS] * 2, 0.5), torch.zeros(2, 1, 6).long(), torch.zeros(2, 2).long()
    )
    keys, values = layer.update(*torch.ones(2, 2, HEADS, 1, SIZE, device="meta"))
    assert keys.shape == values.shape == (2, HEADS, 5, SIZE)
    tensors = (keys, values, layer.bias, layer.labels, layer.candidates)
    assert [tensor is not None and tensor.device.type for tensor in tensors] == ["meta"] * 5


def test_merged_entries_of_no_mass_need_no_bias() -> None:
    layer = filled()
    layer.commit(plan([[[1, 0, 0, 0, 0, 1, 1, 1]] * HEADS] * 2, 0.0), torch.tensor([[[0, 1, 1, 2, 2, 0]]] * 2))
    assert layer.bias is None and held(layer)[0] == [[0, 5, 7, 8], [10, 15, 7, 8]]


@pytest.mark.parametrize("compressed", [False, True])
def test_what_is_no_token_is_dropped(compressed: bool) -> None:
    layer = filled()
    if compressed:
        gates = [[[1, 0, 0, 0, 0, 1, 1, 0]] * HEADS, [[0, 0, 1, 1, 0, 0, 1, 1]] * HEADS]
        layer.commit(plan(gates, 0.5), torch.tensor([[[0, 1, 1, 2, 2, 0]]] * 2))
        later = torch.full((2, HEADS, 2, SIZE), 50.0) + torch.arange(2)[:, None]
        layer.update(later, -later)
        layer.compact(torch.tensor([[True, False], [True, True]]))
        assert held(layer)[1][0] == [102, 103, 7, 8, 50, 51] and held(layer)[0][0][2:] == [0, 5, 7, 50]
        assert layer.bias is not None and layer.labels is not None
        assert layer.bias[:, 1].tolist() == [[-INF, -INF, 0, 0, 0.5, 0], [0, 0, 0.5, 0.5, 0, 0]]
        assert layer.labels[:, 0].tolist() == [[3, 3, 0, 0, 1, 0], [1, 2, 1, 2, 0, 0]]
    else:
        layer.compact(torch.tensor([[True] * 6, [False, True, True, False, True, True]]))
        assert held(layer)[0][0] == [0, 1, 2, 3, 4, 5] and held(layer)[1][0][2:] == [101, 102, 104, 105]
        assert layer.bias is not None and layer.labels is not None
        assert layer.bias[:, 0].tolist() == [[0.0] * 6, [-INF, -INF, 0, 0, 0, 0]]
        assert layer.labels[:, 0].tolist() == [[0] * 6, [3, 3, 0, 0, 0, 0]]
    assert layer.region == layer.physical == layer.lengths[0] == 6


def test_where_everything_is_a_token_nothing_is_masked() -> None:
    layer = filled()
    layer.compact(torch.ones(2, 6, dtype=torch.bool))
    assert layer.bias is None and layer.region == 6 and held(layer)[1][1] == [110, 111, 112, 113, 114, 115]


def test_a_sliding_window_keeps_the_latest_tokens_of_each_row() -> None:
    layer = DynamicSlidingWindowLayer(sliding_window=5)
    keys = (100 * torch.arange(2)[:, None] + torch.arange(4)).float()[:, None, :, None].expand(-1, HEADS, -1, SIZE)
    layer.update(keys.clone(), -keys)
    settle_window(layer, torch.tensor([[True, False, True, True], [True, True, False, False]]), 3)
    assert layer.keys is not None and layer.values is not None
    assert layer.keys[0, 1, :, 0].tolist() == [0, 2, 3] and layer.keys[1, 0, 1:, 0].tolist() == [100, 101]
    assert torch.equal(layer.values, -layer.keys) and layer.get_seq_length() == 3
    layer.update(keys[:, :, :3] + 50, -keys[:, :, :3] - 50)
    settle_window(layer, torch.tensor([[True, True, False, True], [False, True, True, True]]), 5)
    assert layer.keys[0, 0, 1:, 0].tolist() == [3, 50, 52] and layer.keys[1, 1, 1:, 0].tolist() == [150, 151, 152]
    assert layer.keys.shape == (2, HEADS, 4, SIZE) and layer.cumulative_length == 5


def test_the_order_of_a_long_window_stays() -> None:
    layer = DynamicSlidingWindowLayer(sliding_window=65)
    keys = torch.arange(64.0)[None, None, :, None].expand(1, HEADS, -1, SIZE)
    layer.update(keys.clone(), -keys)
    valid = torch.arange(64)[None] % 3 > 0
    settle_window(layer, valid, int(valid.sum()))
    assert layer.keys is not None and layer.keys[0, 0, :, 0].tolist() == [n for n in range(64) if n % 3]


def whole() -> CompressedCache:
    layers = [filled(), filled()]
    layers[1].lengths = layers[0].lengths
    layers[0].lengths.append(6)
    layers[1].slot = 1
    labels = ModalityMap(torch.tensor([[0, 1, 1, 2, 2, 0], [0, 0, 1, 1, 1, 2]]))
    return CompressedCache(layers, labels, torch.tensor([[6], [9]]))


def test_a_cache_counts_entries_and_positions() -> None:
    cache = whole()
    assert cache.full_entries().tolist() == [2.5, 1.5] and cache.kept_entries().tolist() == [[2.5, 1.5]] * 2
    gates = plan([[[1, 0, 1, 1, 0, 0]] * HEADS] * 2)
    compressed_layers(cache)[1].commit(gates, cache.labels.labels[:, None])
    assert cache.kept_entries().tolist() == [[2.5, 1.5], [1.5, 0.5]]
    held_bytes = 2 * 2 * HEADS * (6 + 3) * SIZE * 4
    stateful = CompressedCache([*cache.layers, LinearAttentionLayer()], cache.labels, cache.next_position)
    assert cache.kv_bytes() == stateful.kv_bytes() == held_bytes  # a layer of another kind has no keys
    for layer in compressed_layers(cache):
        layer.update(torch.ones(2, HEADS, 3, SIZE), torch.ones(2, HEADS, 3, SIZE))
    assert cache.next_position.tolist() == [[9], [12]]  # text goes on by one a token
    branch = cache.branch()
    assert branch.labels.labels[0].tolist() == [0, 1, 1, 2, 2, 0, 0, 0, 0] and branch.next_position.tolist() == [
        [9],
        [12],
    ]
    # Two tokens of text that nobody noted, then a frame of one token after which text goes on at 20.
    cache.note(ModalityMap(torch.tensor([[1], [1]])), torch.tensor([[20], [30]]))
    assert cache.labels.labels[1].tolist() == [0, 0, 1, 1, 1, 2, 0, 0, 1] and cache.next_position.tolist() == [
        [20],
        [30],
    ]


def test_a_branch_of_several_rows_and_what_reads_it() -> None:
    cache = whole()
    assert cache.branch(2).next_position.flatten().tolist() == [6, 6, 9, 9]
    many = cache.branch(3)
    copies, alone, own = (compressed_layers(one)[0].keys for one in (many, cache.branch(), cache))
    assert many.labels.labels.shape[0] == len(copies) == many.next_position.shape[0] == 6 and len(own) == 2
    assert many.next_position.flatten().tolist() == [6, 6, 6, 9, 9, 9] and alone.data_ptr() == own.data_ptr()
    many.batch_select_indices(torch.tensor([3, 0]))
    assert many.next_position.flatten().tolist() == [9, 6] and many.labels.labels[0].tolist() == [0, 0, 1, 1, 1, 2]
    many.check_rows(2)
    with pytest.raises(InputError, match=r"cache: holds 2 rows and is read by 3; give cache.branch\(n\)") as error:
        many.check_rows(3)
    assert error.value.field == "cache"


def test_a_plain_cache_becomes_compressed_in_place_and_one_of_another_class_is_shared() -> None:
    class Other(DynamicCache):
        pass

    labels, positions = ModalityMap(torch.zeros(1, 2, dtype=torch.long)), torch.tensor([[2]])
    plain, other = DynamicCache(), Other()
    made: object = as_compressed(plain, labels, positions)
    assert made is plain and isinstance(plain, CompressedCache) and plain.labels is labels
    assert plain.next_position.tolist() == [[0]]  # nothing of the two tokens is held yet
    shared = as_compressed(other, labels, positions)
    assert type(other) is Other and shared.layers is other.layers and shared.labels is labels
    assert shared.next_position.tolist() == [[0]] and as_compressed(shared, labels, positions) is shared


def test_whole_rows_of_one_count_need_no_look_at_the_gates() -> None:
    """A plan that knows what each row keeps pads by it, as one that must count does."""
    gates = [[[1, 0, 1, 1, 0, 0]] * HEADS, [[0, 0, 1, 0, 0, 1]] * HEADS, [[0, 1, 0, 0, 0, 0]] * HEADS]
    labels = torch.tensor([[[0, 1, 1, 2, 2, 0]]] * 3)
    one, other, counted = filled(rows=3), filled(rows=3), plan(gates)
    one.commit(counted, labels)
    other.commit(replace(counted, kept=torch.tensor([3, 2, 1])), labels)
    assert held(one) == held(other) and one.bias is not None and other.bias is not None
    assert one.bias.tolist() == [[[0, 0, 0]] * HEADS, [[-INF, 0, 0]] * HEADS, [[-INF, -INF, 0]] * HEADS]
    assert torch.equal(one.bias, other.bias)


def test_all_that_came_after_an_eviction_can_be_taken_back_and_a_reset_holds_nothing() -> None:
    layer = filled()
    layer.commit(plan([[[1, 0, 1, 1, 0, 0]] * HEADS] * 2), torch.zeros(2, 1, 6, dtype=torch.long))
    layer.update(torch.ones(2, HEADS, 2, SIZE), torch.ones(2, HEADS, 2, SIZE))
    layer.crop(-2)
    assert (layer.physical, layer.seen, layer.lengths) == (3, 6, [3])
    with pytest.raises(InputError, match="cannot take back 1 tokens") as error:
        layer.crop(-1)
    assert error.value.field == "crop"
    layer.reset()
    assert (layer.seen, layer.region, layer.lengths, layer.labels, layer.low_ratio) == (0, 0, [0], None, False)


def test_a_cache_that_holds_text_is_taken_over_with_it() -> None:
    """Of Gemma 4 the full layers alone; they hold the same tensors, and their lengths are known to each other."""
    model = FAMILIES["gemma4"].build()
    adapter = find_adapter(model)
    cache: Any = DynamicCache(config=model.config.get_text_config())
    with torch.no_grad():
        model(input_ids=torch.tensor([[2, 20, 21]]), mm_token_type_ids=torch.zeros(1, 3, dtype=torch.long), cache=cache)
    before = [layer.keys for layer in cache.layers]
    adopt(cache, adapter)
    made = compressed_layers(cache)
    assert [index for index, layer in enumerate(cache.layers) if layer in made] == [1, 3]
    assert all(layer.keys is before[index] for index, layer in zip((1, 3), made, strict=True))
    assert [(layer.seen, layer.region, layer.slot) for layer in made] == [(3, 0, 0), (3, 0, 1)]
    assert made[0].lengths is made[1].lengths and made[0].lengths == [3, 3]
    adopt(cache, adapter)
    assert compressed_layers(cache) == made
    fresh = fresh_cache(adapter)
    assert [type(layer).__name__ for layer in fresh.layers[:2]] == ["DynamicSlidingWindowLayer", "CompressedLayer"]
    assert isinstance(fresh.layers[0], DynamicSlidingWindowLayer) and fresh.layers[0].sliding_window == 8
