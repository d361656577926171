"""A compressed layer under everything that transformers does to a cache: nothing of it is left behind."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from acckv import InputError, KVCompressor
from acckv.cache.cache import CompressedCache, adopt, compressed_layers
from acckv.cache.layer import CompressedLayer
from acckv.method.plan import LayerPlan
from acckv.models.batching import next_position
from tests.families import FAMILIES, Tokenizer
from tests.reference import Reference


def layer(rows: int = 3) -> CompressedLayer:
    """Rows that kept 4, 3 and 2 of 6 entries, the last entry merged with a log mass."""
    made = CompressedLayer([])
    torch.manual_seed(0)
    made.update(torch.randn(rows, 2, 6, 4), torch.randn(rows, 2, 6, 4))
    keep = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 1]])[:rows].bool()
    gates = torch.cat([keep, torch.tensor([[True, False]] * rows)], dim=1)
    plan = LayerPlan(
        torch.zeros(gates.shape).masked_fill(~gates, -torch.inf)[:, None],
        torch.randn(rows, 2, 2, 4),
        torch.randn(rows, 2, 2, 4),
        torch.full((rows, 2, 2), 0.7),
    )
    made.commit(plan, torch.tensor([[[0, 1, 1, 2, 2, 0]]] * rows), torch.tensor([[2, 2]] * rows))
    return made


def state(made: CompressedLayer) -> list[Any]:
    return [made.keys, made.values, made.bias, made.labels, made.candidates, made.kept]


def test_rows_of_different_length_are_padded_with_masked_places() -> None:
    made = layer()
    assert (made.physical, made.region, made.get_seq_length()) == (4, 4, 6)
    assert made.bias is not None and made.labels is not None and made.kept is not None
    assert torch.isinf(made.bias[:, 0]).sum(-1).tolist() == [0, 1, 2]
    assert made.bias[:, 0, -1].tolist() == pytest.approx([0.7] * 3)
    assert made.labels[:, 0].tolist() == [[0, 1, 2, 1], [3, 1, 2, 1], [3, 3, 0, 1]]
    assert made.kept.tolist() == [[2, 1], [2, 1], [1, 0]]


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda made: made.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda made: made.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda made: made.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
    ],
)
def test_all_that_belongs_to_a_row_moves_with_it(change: Any, rows: list[int]) -> None:
    before, made = state(layer()), layer()
    change(made)
    for one, other in zip(state(made), before, strict=True):
        assert torch.equal(one, other[rows])


def test_crop_takes_back_later_tokens_only() -> None:
    made = layer()
    made.update(torch.randn(3, 2, 3, 4), torch.randn(3, 2, 3, 4))
    made.crop(-2)
    assert (made.physical, made.region, made.get_seq_length()) == (5, 4, 7)
    with pytest.raises(InputError, match="only 1 came after compression"):
        made.crop(-2)


def test_reset_leaves_an_empty_layer() -> None:
    made = layer()
    made.reset()
    assert (made.physical, made.region, made.get_seq_length()) == (0, 0, 0)
    assert state(made) == [None] * 6


def test_logical_and_physical_length() -> None:
    """The mask is as wide as the longest layer, and its columns are the latest tokens."""
    made = layer()
    longer = CompressedLayer(made.lengths)
    longer.update(torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4))
    assert made.get_mask_sizes(2) == (5 + 2, 6 - 5)


@pytest.mark.parametrize("kept", [[0, 0, 0], [1, 0, 0], [1, 1, 0]])
@pytest.mark.parametrize("name", ["videollama2", "avicuna"])
def test_nothing_kept_in_a_layer(name: str, kept: list[int]) -> None:
    """A prompt of media alone, nearly all evicted: later tokens see what is left, several at once too."""
    family = FAMILIES[name]
    model = family.build()
    question, reference = torch.tensor([[20, 21, 22]]), Reference(model)
    context = family.context(model, intro=())
    compressor = KVCompressor("keydiff", ratio=(sum(kept) + 0.5) / (3 * 14))
    with compressor(model) as session, torch.no_grad():
        cache = session.compress(**context)
        assert [one.physical for one in compressed_layers(cache)] == kept
        positions = cache.next_position + torch.arange(3)
        mask = torch.ones(1, cache.get_seq_length() + 3, dtype=torch.long)
        found = model(question, attention_mask=mask, position_ids=positions, cache=cache.branch()).logits
    embeds = torch.cat([context["inputs_embeds"], model.get_input_embeddings()(question)], dim=1)
    reference.read(context, cache)
    with reference.hiding() as full:
        expected = full(inputs_embeds=embeds, use_cache=False).logits[:, -3:]
    assert torch.allclose(found, expected, atol=1e-5)


def test_text_goes_on_after_the_furthest_of_three_positions() -> None:
    """Time, height and width of the last media token differ; generate puts a row of plain text positions before."""
    rotary = torch.tensor([[[7, 8]], [[7, 11]], [[7, 9]]])
    assert next_position(rotary).tolist() == [[12]]
    assert next_position(torch.cat([torch.tensor([[[90, 91]]]), rotary])).tolist() == [[12]]
    assert next_position(torch.tensor([[3, 4], [0, 1]])).tolist() == [[5], [2]]


def test_offloaded_caches_are_refused() -> None:
    """They move entries inside `update`; nothing could be gathered from them."""
    model = FAMILIES["avicuna"].build()
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    with (
        KVCompressor()(model, Tokenizer()) as session,
        pytest.raises(InputError, match="use the default dynamic cache"),
    ):
        adopt(cache, session.adapter)


def test_a_cache_without_a_config_learns_its_layers() -> None:
    """`DynamicCache()` is filled as layers come; sliding and sharing layers must not become full ones."""
    family = FAMILIES["gemma4"]
    model = family.build()
    clip = family.clip(model)
    with KVCompressor("keydiff", ratio=0.3)(model):
        cache = DynamicCache()
        one = model.generate(**clip, cache=cache, max_new_tokens=5, do_sample=False)
        other = model.generate(**clip, max_new_tokens=5, do_sample=False)
    assert torch.equal(one, other)
    kinds = [type(entry).__name__ for entry in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "CompressedLayer"] * 2 + ["DummyLayer"] * 2


def test_a_dropped_cache_frees_its_memory_at_once() -> None:
    """No ring of references: it must not wait for the garbage collector, which counts objects and not bytes."""
    family = FAMILIES["videollama2"]
    model = family.build()
    with KVCompressor("keydiff", ratio=0.5)(model) as session:
        gc.collect()
        gc.disable()
        try:
            cache = session.compress(**family.context(model))
            first = weakref.ref(cache.layers[0])
            cache = session.extend(family.context(model), cache)
            assert first() is None
            model.generate(**family.clip(model), max_new_tokens=2)
            second = weakref.ref(cache.layers[0])
            del cache
            assert second() is None
        finally:
            gc.enable()


def test_bytes_count_what_is_held() -> None:
    family = FAMILIES["gemma4"]
    model = family.build()
    with KVCompressor("keydiff", ratio=0.5)(model) as session:
        cache: CompressedCache = session.compress(**family.context(model))
    text, kept = cache.get_seq_length() - 14, int(0.5 * 2 * 14)
    full, sliding = 2 * 2 * 32 * 4, 2 * 2 * 16 * 4  # keys and values, heads, head size, bytes
    assert cache.kv_bytes() == full * (2 * text + kept) + sliding * 2 * 7
