"""The flagship: physical eviction, masked full attention and the hard training simulation are one and the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from acckv import KVCompressor
from acckv.cache.cache import CompressedCache, branch_layers, compressed_layers
from acckv.method.plan import LayerPlan
from acckv.policies import AccKV
from tests import tiny_omni
from tests.reference import Reference

LAYERS, KV_HEADS, MEDIA = 3, 2, tiny_omni.VIDEO_TOKENS + tiny_omni.AUDIO_TOKENS
ENTRY_BYTES = 2 * 16 * 4  # key and value of one head
QUESTION = torch.tensor([[20, 21, 22, 23, 24]])


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_omni.build(LAYERS, request.param)


@st.composite
def keep_sets(draw: st.DrawFn) -> list[Tensor]:
    """By layer which media entries stay: others, and of another number, in every layer and every head."""
    sets = []
    for _ in range(LAYERS):
        count = [draw(st.integers(0, MEDIA)) for _ in range(KV_HEADS)]
        order = [draw(st.permutations(range(MEDIA))) for _ in range(KV_HEADS)]
        kept = torch.zeros(1, KV_HEADS, MEDIA, dtype=torch.bool)
        for head in range(KV_HEADS):
            kept[0, head, order[head][: count[head]]] = True
        sets.append(kept)
    return sets


@given(kept=keep_sets())
@settings(max_examples=25, deadline=None)
def test_eviction_equals_masking_equals_simulation(model: Any, kept: list[Tensor]) -> None:
    inputs = tiny_omni.context()
    compressor = KVCompressor("keydiff")
    with compressor(model) as session:
        prefill = session.prefill(**inputs)
        media = prefill.labels.media
        keep = [torch.ones(1, KV_HEADS, media.shape[1], dtype=torch.bool) for _ in kept]
        for full, part in zip(keep, kept, strict=True):
            full[:, :, media[0]] = part
        plans = [
            LayerPlan(
                torch.zeros(mask.shape).masked_fill(~mask, -torch.inf),
                seen.keys[:, :, :0],
                seen.values[:, :, :0],
                torch.zeros(1, KV_HEADS, 0),
            )
            for mask, seen in zip(keep, prefill.observations, strict=True)
        ]
        cache = CompressedCache(branch_layers(prefill.cache.layers), prefill.labels, prefill.next_position)
        for layer, plan in zip(compressed_layers(cache), plans, strict=True):
            layer.commit(plan, prefill.labels.labels[:, None])
        assert cache.kv_bytes() == sum(int(mask.sum()) for mask in keep) * ENTRY_BYTES
        start = prefill.next_position + torch.arange(QUESTION.shape[1])
        after = {
            "input_ids": QUESTION,
            "attention_mask": torch.ones(1, media.shape[1] + QUESTION.shape[1], dtype=torch.long),
            "position_ids": session.adapter.text_positions(start),
        }
        with torch.no_grad():
            evicted = model(cache=cache.branch(), use_cache=True, **after).logits
            simulated = session.simulate(prefill, plans, **after)
    whole = {**inputs, "input_ids": torch.cat([inputs["input_ids"], QUESTION], dim=1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    gone = {layer: [(media.shape[1], ~mask[0])] for layer, mask in enumerate(keep)}
    with Reference(model, gone).hiding() as full:
        reference = full(**whole, use_cache=False).logits[:, media.shape[1] :]
    assert (evicted - reference).abs().max() < 1e-5
    assert (simulated - evicted).abs().max() < 1e-5


@pytest.mark.parametrize("preset", ["paper", "context"])
@pytest.mark.parametrize("ratio", [0.6, 0.3, 0.1])
def test_simulated_plan_equals_compressed_cache(model: Any, preset: str, ratio: float) -> None:
    """With merged entries and cross-calibration too, for a batch of two clips."""
    first, second = tiny_omni.context(), tiny_omni.context(1)
    inputs: dict[str, Any] = {
        name: torch.cat([value, second[name]]) if isinstance(value, Tensor) else value for name, value in first.items()
    }
    question = QUESTION.expand(2, -1)
    compressor = KVCompressor(AccKV.preset(preset), ratio=ratio)
    with compressor(model, tiny_omni.Tokenizer()) as session, torch.no_grad():
        prefill = session.prefill(**inputs)
        cache = session.compress(prefill)
        start = prefill.next_position + torch.arange(question.shape[1])
        positions = session.adapter.text_positions(start)
        mask = torch.ones(2, prefill.labels.labels.shape[1] + question.shape[1], dtype=torch.long)
        after = {"input_ids": question, "attention_mask": mask, "position_ids": positions}
        simulated = session.simulate(prefill, session.plan(prefill), **after)
        evicted = model(cache=cache.branch(), use_cache=True, **after).logits
    assert cache.kept_entries().sum() <= ratio * LAYERS * MEDIA + 1e-6
    assert cache.kept_entries().sum() == int(ratio * LAYERS * MEDIA + 1e-9)
    assert (simulated - evicted).abs().max() < 1e-5
