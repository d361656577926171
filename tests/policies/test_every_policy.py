"""Exact budgets, padding, and eviction against masking and simulation, of every policy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from acckv.cache.cache import compressed_layers
from acckv.config import HeadBudgets, When
from acckv.method.plan import MergedInto
from acckv.policies import POLICIES
from tests import tiny_omni
from tests.pairwise import by_turns
from tests.policies.random_layers import (
    ENTRIES,
    KV_HEADS,
    PADDING,
    SEEDS,
    compressor_of,
    layers_of,
    totals,
    watched,
)
from tests.support import not_none

COMPRESSING = [name for name in POLICIES if name != "full"]
ATTENTION = ["sdpa", "eager"]
QUESTION = torch.tensor([[20, 21, 22, 23, 24]])


def masked_full_attention(
    model: Any, inputs: dict[str, Any], keep: list[Tensor], merged: list[MergedInto | None]
) -> Tensor:
    """Logits of the question where every entry stays: what was evicted is masked, what was merged into is changed.

    Args:
        keep: by layer bool ``[B, K, N]``; merged: by layer the entries that the question reads changed.
    """
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], QUESTION], dim=1)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any) -> Any:
        layer, groups = module.layer_idx, query.shape[1] // key.shape[1]
        outputs: list[Tensor] = []
        later_key, later_value = key.clone(), value.clone()
        if (into := merged[layer]) is not None:
            place = into.index[..., None].expand(-1, key.shape[1], -1, key.shape[-1])
            later_key.scatter_(2, place, into.keys.expand_as(place))
            later_value.scatter_(2, place, into.values.expand_as(place))
        for part, keys, values in ((query[:, :, :length], key, value), (query[:, :, length:], later_key, later_value)):
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
            logits = part @ keys.transpose(-1, -2) * scaling
            first = length if outputs else 0
            queries = torch.arange(first, first + part.shape[2])[:, None]
            visible = (torch.arange(keys.shape[2]) <= queries).expand_as(logits).clone()
            if outputs:
                visible[..., :length] &= keep[layer].repeat_interleave(groups, 1)[:, :, None]
            outputs.append(logits.masked_fill(~visible, -torch.inf).softmax(-1) @ values)
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None

    full = copy.deepcopy(model)
    full.model.language_model.config._attn_implementation = "spelled_out"
    ALL_ATTENTION_FUNCTIONS["spelled_out"] = attend
    try:
        return full(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, use_cache=False).logits[
            :, length:
        ]
    finally:
        del ALL_ATTENTION_FUNCTIONS["spelled_out"]


@given(seed=SEEDS, ratio=st.sampled_from([0.0, 0.07, 0.3, 0.62, 0.95]))
@settings(max_examples=5, deadline=None)
@pytest.mark.parametrize("share_heads", [False, True])
@pytest.mark.parametrize("policy", COMPRESSING)
def test_budgets_are_exact_and_text_stays(policy: str, share_heads: bool, seed: int, ratio: float) -> None:
    observations, labels = layers_of(seed)
    compressor = compressor_of(policy, ratio=ratio, share_heads=share_heads, window_size=6)
    seen = [watched(part, policy, 6) for part in observations]
    plans = compressor.planners.default.plan(seen, labels)
    kept = torch.stack([torch.isfinite(plan.log_gates).expand(-1, KV_HEADS, -1) for plan in plans], dim=1)
    media = torch.nn.functional.pad(labels.media, (0, kept.shape[-1] - ENTRIES), value=True)
    entries = (kept & media[:, None, None]).sum(-1)
    assert entries.sum(1).tolist() == [[total] * KV_HEADS for total in totals(labels, ratio)]
    assert bool((entries == entries[:, :, :1]).all()), "all heads of a layer keep equally many"
    assert bool(kept[..., :ENTRIES].masked_select(labels.text[:, None, None]).all())
    assert not bool(kept[..., :ENTRIES].masked_select(~labels.real[:, None, None]).any())


@given(seed=SEEDS, ratio=st.sampled_from([0.13, 0.5]))
@settings(max_examples=5, deadline=None)
@pytest.mark.parametrize("policy", [name for name in COMPRESSING if name != "random"])
def test_a_padded_row_is_planned_as_the_row_alone(policy: str, seed: int, ratio: float) -> None:
    compressor = compressor_of(policy, ratio=ratio, window_size=6)
    gates, entries = [], []
    for padded in (True, False):
        observations, labels = layers_of(seed, padded)
        first = PADDING if padded else 0
        seen = [watched(part, policy, 6) for part in observations]
        plans = compressor.planners.default.plan(seen, labels)
        gates.append([plan.log_gates[-1, ..., first:] for plan in plans])
        applied = [plan.apply(part.keys, part.values)[:2] for plan, part in zip(plans, seen, strict=True)]
        entries.append([torch.cat(pair, dim=-1)[-1, :, first:] for pair in applied])
    for one, other in zip(*gates, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*entries, strict=True):
        assert torch.allclose(one, other, atol=1e-5), "padding was merged into what is kept"


@pytest.mark.parametrize(
    ("model", "policy", "when", "amount"),
    by_turns(
        ATTENTION,
        [name for name in COMPRESSING if name != "acckv"],
        ["context", "prompt"],
        [(0.6, "equal"), (0.2, "equal"), (0.15, "joint")],
    ),
    indirect=["model"],
)
def test_eviction_is_simulation_is_masking(
    model: Any, policy: str, when: When, amount: tuple[float, HeadBudgets]
) -> None:
    """The evicted cache, the gated full cache and masked full attention without a cache give the same logits."""
    inputs = tiny_omni.context() if when == "context" else tiny_omni.prompt()
    ratio, heads = amount
    compressor = compressor_of(policy, ratio=ratio, when=when, head_budgets=heads)
    with compressor(model, tiny_omni.Tokenizer()) as session, torch.no_grad():
        prefill = session.prefill(**inputs)
        plans = session.plan(prefill)
        evicted_cache = session.compress(prefill)
        length = prefill.labels.labels.shape[1]
        after = {
            "input_ids": QUESTION,
            "attention_mask": torch.ones(1, length + QUESTION.shape[1], dtype=torch.long),
            "position_ids": session.adapter.text_positions(prefill.next_position + torch.arange(QUESTION.shape[1])),
        }
        simulated = session.simulate(prefill, plans, **after)
        evicted = model(cache=evicted_cache.branch(), use_cache=True, **after).logits
    keep = [torch.isfinite(plan.log_gates).expand(-1, 2, -1) for plan in plans]
    reference = masked_full_attention(model, inputs, keep, [plan.merged_into for plan in plans])
    assert (evicted - reference).abs().max() < 1e-5
    assert (simulated - evicted).abs().max() < 1e-5
    media = tiny_omni.VIDEO_TOKENS + tiny_omni.AUDIO_TOKENS
    apart = compressor.planners.default.heads(2)
    assert float(evicted_cache.kept_entries().sum()) == int(ratio * 3 * apart * media + 1e-9) / apart


def test_kept_modalities_are_the_mean_over_heads(model: Any) -> None:
    with compressor_of("madakv", ratio=0.4)(model, tiny_omni.Tokenizer()) as session, torch.no_grad():
        prefill = session.prefill(**tiny_omni.context())
        plans, cache_ = session.plan(prefill), session.compress(prefill)
    for layer, plan in zip(compressed_layers(cache_), plans, strict=True):
        kept = torch.isfinite(plan.log_gates)[:, :, None] & prefill.labels.by_modality[:, None]
        assert torch.equal(not_none(layer.kept), kept.sum(-1).float().mean(1))
