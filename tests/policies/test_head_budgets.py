"""Budgets of KV heads: one ranking over all heads of a layer, against sorted lists."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from acckv import InputError, KVCompressor
from acckv.method.budgets import split_heads
from acckv.method.heads import one_head
from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerPlan
from acckv.method.topk import soft_topk
from acckv.method.weights import CalibratedWeights
from acckv.policies import POLICIES, AccKV
from tests.policies.random_layers import (
    ENTRIES,
    HEADS,
    KV_HEADS,
    LAYERS,
    SEEDS,
    SIZE,
    compressor_of,
    layers_of,
    watched,
)

CONTEXT = {"signal": "key_diversity", "focusing": False, "integration": False, "cross_calibration": False}
CASES: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in POLICIES if name != "full"] + [
    ("acckv", CONTEXT),
    ("h2o", {"share_heads": True}),
]
AMOUNTS = st.one_of(
    st.sampled_from([0.0, 0.07, 0.3, 0.62, 0.95]).map(lambda ratio: {"ratio": ratio}),
    st.sampled_from([0, 1, 5, 100]).map(lambda budget: {"budget": budget}),
)


def pairs_of(labels: ModalityMap, apart: bool, ratio: float = 0.0, budget: int | None = None) -> list[int]:
    """Of each row, the (head, entry) pairs that all layers together keep."""
    existing = labels.counts().sum(-1).tolist()
    if budget is not None:
        return [min(budget, count) * LAYERS * KV_HEADS for count in existing]
    heads = KV_HEADS if apart else 1
    return [math.floor(ratio * LAYERS * heads * count + 1e-9) * KV_HEADS // heads for count in existing]


def kept_media(plans: list[LayerPlan], labels: ModalityMap) -> Tensor:
    """bool ``[B, L, K, M]``: entries kept by each head that are no text, merged ones last."""
    kept = torch.stack([torch.isfinite(plan.log_gates).expand(-1, KV_HEADS, -1) for plan in plans], dim=1)
    media = torch.nn.functional.pad(labels.media, (0, kept.shape[-1] - ENTRIES), value=True)
    assert bool(kept[..., :ENTRIES].masked_select(labels.text[:, None, None]).all())
    assert not bool(kept[..., :ENTRIES].masked_select(~labels.real[:, None, None]).any())
    return kept & media[:, None, None]


def best_first(score: Tensor, members: Tensor) -> list[tuple[int, int]]:
    """(head, entry) of a row's members, best first, of equal ones the earlier."""
    entries = members.nonzero().flatten().tolist()
    return sorted(((k, j) for k in range(KV_HEADS) for j in entries), key=lambda at: (-float(score[at]), at))


@given(seed=SEEDS, amount=AMOUNTS)
@settings(max_examples=6, deadline=None)
@pytest.mark.parametrize(("policy", "options"), CASES)
def test_joint_heads_keep_the_best_pairs(policy: str, options: dict[str, Any], seed: int, amount: Any) -> None:
    observations, labels = layers_of(seed)
    seen = [watched(part, policy, 6) for part in observations]
    compressor = compressor_of(policy, window_size=6, head_budgets="joint", **amount, **options)
    planner = compressor.planners.default
    plans = planner.plan(seen, labels)
    kept = kept_media(plans, labels)
    apart = planner.policy.ranks_by_head and not options.get("share_heads")
    assert kept.sum((1, 2, 3)).tolist() == pairs_of(labels, apart, **amount)
    text = labels.text.sum(-1, keepdim=True)
    for layer, plan in enumerate(plans):
        assert plan.kept is not None
        assert torch.equal(plan.kept.view(2, -1).expand(-1, KV_HEADS), kept[:, layer].sum(-1) + text)
    if not apart:
        equal = compressor_of(policy, window_size=6, **amount, **options).planners.default.plan(seen, labels)
        assert all(torch.equal(one.log_gates, other.log_gates) for one, other in zip(plans, equal, strict=True))
    elif policy != "acckv" or options:  # merging and alignment change what is kept inside a head
        for layer, score in enumerate(planner.scores(seen, labels)):
            for b in range(2):
                groups = labels.media[b][None] if score.modality_shares is None else labels.by_modality[b]
                for members in groups:
                    ranked, held = best_first(score.score[b], members), kept[b, layer, :, :ENTRIES] & members
                    assert {tuple(at) for at in held.nonzero().tolist()} == set(ranked[: int(held.sum())])


@given(seed=SEEDS, ratio=st.floats(0, 1))
@settings(max_examples=20, deadline=None)
def test_joint_kvzip_is_one_ranking_of_all_layers_and_heads(seed: int, ratio: float) -> None:
    observations, labels = layers_of(seed)
    plans = compressor_of("kvzip", ratio=ratio, head_budgets="joint").planners.default.plan(observations, labels)
    kept = kept_media(plans, labels)
    for b, pairs in enumerate(pairs_of(labels, True, ratio)):
        ranked = sorted(
            (-float(seen.reconstruction[b, k, j]), layer, k, j)
            for layer, seen in enumerate(observations)
            if seen.reconstruction is not None
            for k in range(KV_HEADS)
            for j in labels.media[b].nonzero().flatten().tolist()
        )
        assert {tuple(at) for at in kept[b].nonzero().tolist()} == {tuple(at) for _, *at in ranked[:pairs]}


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_soft_heads_share_one_threshold(seed: int) -> None:
    """The gates of a layer's heads under their budgets are those of one list, and gradients reach every score."""
    draw = torch.Generator().manual_seed(seed)
    score = torch.randn(2, KV_HEADS, 12, generator=draw).requires_grad_()
    members = torch.rand(2, 1, 2, 12, generator=draw) < 0.6
    budget = torch.rand(2, 2, generator=draw) * members.sum((1, 3)) * KV_HEADS
    gates = soft_topk(0.3)
    by_head = split_heads(score, members, budget, gates)
    least = torch.minimum(budget.clamp_min(0.05), (KV_HEADS * members.sum((1, 3)) - 0.05).clamp_min(0.05))
    assert torch.allclose(by_head.sum(1), least, atol=1e-2)
    for b in range(2):
        for m in range(2):
            alone = gates(score[b], members[b, 0, m].expand(KV_HEADS, -1), by_head[b, :, m]).exp()
            flat = gates(score[b].flatten(), members[b, 0, m].repeat(KV_HEADS), budget[b, m]).exp()
            held = by_head[b, :, m, None].expand(-1, 12).flatten()  # no gate sum is near 0 or all
            solved = (held > 0.05) & (held < int(members[b, 0, m].sum()) - 0.05)
            assert torch.allclose(alone.flatten()[solved], flat[solved], atol=1e-4)


def filled(total: float, shares: list[float], capacity: list[int]) -> list[float]:
    """Water-filling by hand: the fullest part is closed first, what it cannot take goes to the others."""
    given = [0.0] * len(shares)
    open_parts = set(range(len(shares)))
    rest = float(min(total, sum(capacity)))
    while open_parts and rest > 0:
        whole = sum(shares[part] for part in open_parts)
        over = [part for part in open_parts if rest * shares[part] / whole >= capacity[part]]
        for part in over or open_parts:
            given[part] = float(capacity[part]) if over else rest * shares[part] / whole
        rest -= sum(given[part] for part in over or open_parts)
        open_parts = open_parts.difference(over) if over else set()
    return given


@given(seed=SEEDS, ratio=st.sampled_from([0.0, 0.07, 0.3, 0.62, 0.95]), spread=st.sampled_from([0.0, 0.5, 3.0]))
@settings(max_examples=25, deadline=None)
def test_learned_heads_get_their_shares(seed: int, ratio: float, spread: float) -> None:
    """Every head and modality within one entry of its share, all of them together exact; gates follow in training."""
    observations, labels = layers_of(seed)
    weights = CalibratedWeights(LAYERS, KV_HEADS, HEADS, SIZE, 0).requires_grad_(False)
    weights.head_budget.copy_(
        spread * torch.randn(weights.head_budget.shape, generator=torch.Generator().manual_seed(seed))
    )
    policy = AccKV.preset("context", n_probe_queries=0)
    compressor = KVCompressor(policy, ratio=ratio, head_budgets="learned", weights=weights)
    planner = compressor.planners.default
    kept = kept_media(planner.plan(observations, labels), labels)
    assert kept.sum((1, 2, 3)).tolist() == pairs_of(labels, True, ratio)
    by_layer = kept.sum((2, 3))
    assert int((by_layer.amax(1) - by_layer.amin(1)).max()) <= 1, "what heads keep moves nothing between layers"
    soft = planner.plan(observations, labels, temperature=0.02)
    for layer, b in itertools.product(range(LAYERS), range(2)):
        counts = labels.counts()[b].tolist()
        shares = [
            count / sum(counts) * math.exp(float(offset + slope * math.log(max(ratio, 1e-3) / 0.1)))
            for head in weights.head_budget[layer].unbind(1)
            for count, offset, slope in zip(counts, *head.tolist(), strict=True)
        ]
        expected = filled(int(by_layer[b, layer]), shares, counts * KV_HEADS)
        held = (kept[b, layer, :, None] & labels.by_modality[b]).sum(-1).flatten().tolist()
        assert all(abs(one - other) < 1 + 1e-3 for one, other in zip(held, expected, strict=True))
        media = soft[layer].log_gates[b].exp()[:, None] * labels.by_modality[b]
        asked = filled(pairs_of(labels, True, ratio)[b] / LAYERS, shares, counts * KV_HEADS)
        for gates, share, count in zip(media.sum(-1).flatten().tolist(), asked, counts * KV_HEADS, strict=True):
            assert gates == pytest.approx(min(max(share, 0.05), max(count - 0.05, 0.05)) if count else 0, abs=0.05)


def test_learned_heads_need_weights() -> None:
    with pytest.raises(InputError, match="which keydiff has no weights for"):
        compressor_of("keydiff", head_budgets="learned")


def test_layers_of_other_heads_are_refused() -> None:
    observations, labels = layers_of(0)
    observations[2] = one_head(observations[2], 0, observations[2].real)
    planner = compressor_of("keydiff", head_budgets="joint").planners.default
    with pytest.raises(InputError, match="as many KV heads in every layer"):
        planner.plan(observations, labels)


def test_soft_heads_pass_on_gradients() -> None:
    score = torch.tensor([[[0.0, 1.0], [0.2, 0.9]]], requires_grad=True)
    members, budget = torch.ones(1, 1, 1, 2, dtype=torch.bool), torch.tensor([[2.0]])
    by_head = split_heads(score, members, budget, soft_topk(0.5))
    (slope,) = torch.autograd.grad(by_head[0, 0, 0], score)
    step = torch.tensor([[[0.0, 0.01], [0.0, 0.0]]])
    more, less = (split_heads(score + sign * step, members, budget, soft_topk(0.5))[0, 0, 0] for sign in (1, -1))
    assert float(slope[0, 0, 1]) == pytest.approx(float((more - less).detach()) / 0.02, rel=1e-2)
    assert bool((slope[0, 0] > 0).all()) and bool((slope[0, 1] < 0).all())
