"""The policies that score by attention or by keys against slow ones written from their papers; their budgets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from acckv.method.modality import Modality
from acckv.policies.look_m import pivotal_merging
from tests.policies.random_layers import (
    ENTRIES,
    HEADS,
    KV_HEADS,
    LAYERS,
    PADDING,
    SEEDS,
    SIZE,
    attention,
    compressor_of,
    layer_budgets,
    layers_of,
    received,
    totals,
    watched,
)


@given(seed=SEEDS)
@settings(max_examples=3, deadline=None)
def test_pyramidkv_scores_as_snapkv(seed: int) -> None:
    observations, labels = layers_of(seed)
    window, kernel = 5, 3
    seen = watched(observations[0], "pyramidkv", window)
    score = (
        compressor_of("pyramidkv", window_size=window, kernel_size=kernel)
        .planners.default.scores([seen], labels)[0]
        .score
    )
    for b in range(2):
        for k in range(KV_HEADS):
            plain = received(seen, b, k, list(range(ENTRIES - window, ENTRIES)))
            for j in range(ENTRIES):
                pooled = max(plain[max(j - 1, 0) : j + 2])
                assert float(score[b, k, j]) == pytest.approx(pooled, abs=1e-5)


@given(seed=SEEDS, ratio=st.floats(0.01, 0.99), beta=st.sampled_from([1.0, 2.0, 20.0]))
@settings(max_examples=20, deadline=None)
def test_pyramidkv_budgets_fall_on_a_line(seed: int, ratio: float, beta: float) -> None:
    observations, labels = layers_of(seed)
    compressor = compressor_of("pyramidkv", ratio=ratio, beta=beta)
    budgets = layer_budgets(compressor.planners.default, observations, labels)
    for b, total in enumerate(totals(labels, ratio)):
        average = total / LAYERS
        smallest = average / beta
        largest = 2 * average - smallest
        available = int(labels.counts()[b].sum())
        if largest > available:
            largest, smallest = available, 2 * average - available
        step = (largest - smallest) / (LAYERS - 1)
        for layer in range(LAYERS):
            assert abs(int(budgets[b, layer]) - (largest - layer * step)) <= 1 + 1e-3
        assert int(budgets[b].sum()) == total


@given(seed=SEEDS)
@settings(max_examples=3, deadline=None)
def test_knorm_is_minus_the_norm_of_the_key(seed: int) -> None:
    observations, labels = layers_of(seed)
    score = compressor_of("knorm").planners.default.scores(observations, labels)[2].score
    for b in range(2):
        for k in range(KV_HEADS):
            for j in range(ENTRIES):
                norm = math.sqrt(sum(float(x) ** 2 for x in observations[2].keys[b, k, j]))
                assert float(score[b, k, j]) == pytest.approx(-norm, abs=1e-5)


@given(seed=SEEDS)
@settings(max_examples=3, deadline=None)
def test_fastv_ranks_by_the_last_row_of_layer_k(seed: int) -> None:
    observations, labels = layers_of(seed)
    seen = [watched(part, "fastv", 7) for part in observations]
    scores = compressor_of("fastv", agg_layer=3).planners.default.scores(seen, labels)
    for b in range(2):
        rows = [attention(seen[2], b, h, ENTRIES - 1) for h in range(HEADS)]
        mean = [sum(column) / HEADS for column in zip(*rows, strict=True)]
        for layer in range(LAYERS):
            assert scores[layer].score[b, 0].tolist() == pytest.approx(mean, abs=1e-5)


@given(seed=SEEDS, ratio=st.floats(0.01, 0.99), dense=st.integers(1, LAYERS + 1))
@settings(max_examples=20, deadline=None)
def test_fastv_budgets(seed: int, ratio: float, dense: int) -> None:
    """The first K layers keep everything, as long as that is no more than half of all."""
    observations, labels = layers_of(seed)
    compressor = compressor_of("fastv", ratio=ratio, agg_layer=dense)
    budgets = layer_budgets(compressor.planners.default, observations, labels)
    below = min(dense, LAYERS)
    for b, total in enumerate(totals(labels, ratio)):
        available = int(labels.counts()[b].sum())
        assert int(budgets[b].sum()) == total
        if below == LAYERS:
            expected = [total / LAYERS] * LAYERS
        else:
            first = min(available, total / 2 / below)
            rest = (total - below * first) / (LAYERS - below)
            if rest > available:  # the other layers are full, the first ones get what is left
                first, rest = (total - available * (LAYERS - below)) / below, available
            expected = [first] * below + [rest] * (LAYERS - below)
        for layer in range(LAYERS):
            assert abs(int(budgets[b, layer]) - expected[layer]) <= 1 + 1e-3
        if below < LAYERS and below * available <= total / 2:
            assert budgets[b, :below].tolist() == [available] * below


@given(seed=SEEDS, ratio=st.floats(0.05, 0.95), coverage=st.sampled_from([0.3, 0.9, 1.0]))
@settings(max_examples=6, deadline=None)
def test_madakv(seed: int, ratio: float, coverage: float) -> None:
    observations, labels = layers_of(seed)
    window = 4
    seen = [watched(part, "madakv", window) for part in observations]
    compressor = compressor_of("madakv", ratio=ratio, window_size=window, theta=coverage)
    planner = compressor.planners.default
    scores = planner.scores(seen, labels)
    by_layer = layer_budgets(planner, seen, labels)
    split = [planner.split(layer, score, by_layer[:, layer], [labels], ratio) for layer, score in enumerate(scores)]
    budgets = torch.stack(split, dim=1)
    demands = compressor.policy.layer_shares(scores, labels, torch.tensor(totals(labels, ratio)), ratio)
    for b, total in enumerate(totals(labels, ratio)):
        members = [[j for j in range(ENTRIES) if labels.labels[b, j] == m] for m in (Modality.VIDEO, Modality.AUDIO)]
        assert int(budgets[b, :, 0].sum()) == total
        for layer in range(LAYERS):
            needed = []
            for k in range(KV_HEADS):
                importance = received(seen[layer], b, k, list(range(ENTRIES - window, ENTRIES)))
                assert scores[layer].score[b, k].tolist() == pytest.approx(importance, abs=1e-5)
                weight = [sum(importance[j] for j in part) for part in members]
                kept = int(budgets[b, layer, k].sum())
                assert kept == int(budgets[b, layer, 0].sum())
                wanted = kept * weight[0] / sum(weight)
                wanted = max(min(wanted, len(members[0])), kept - len(members[1]))
                assert abs(int(budgets[b, layer, k, 0]) - wanted) < 1 + 1e-3
                count = 0
                for part, whole in zip(members, weight, strict=True):
                    covered = 0.0
                    for value in sorted((importance[j] for j in part), reverse=True):
                        if covered >= coverage * whole - 1e-9:
                            break
                        covered, count = covered + value, count + 1
                needed.append(count)
            assert float(demands[b, layer]) == pytest.approx(sum(needed) / KV_HEADS, abs=1e-6)


@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_pivotal_merging(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, KV_HEADS, 11, SIZE, generator=generator) for _ in range(2))
    state = torch.randint(0, 3, (2, KV_HEADS, 11), generator=generator)
    state[0, 0] = torch.where(state[0, 0] == 0, 1, state[0, 0])  # a head that keeps nothing
    kept, lost = state == 0, state == 1
    pivots = pivotal_merging(keys, values, kept, lost)
    assert pivots is not None
    new = pivots.place(keys, values)
    for b in range(2):
        for k in range(KV_HEADS):
            inside = kept[b, k].nonzero().flatten().tolist()
            taken: dict[int, list[int]] = {c: [] for c in inside}
            for e in lost[b, k].nonzero().flatten().tolist():
                if inside:
                    cosine = {c: float(torch.cosine_similarity(keys[b, k, e], keys[b, k, c], dim=0)) for c in inside}
                    taken[max(cosine, key=lambda c: cosine[c])].append(e)
            for j in range(11):
                for before, after in zip((keys, values), new, strict=True):
                    group = [before[b, k, j]] + [(before[b, k, j] + before[b, k, e]) / 2 for e in taken.get(j, [])]
                    assert torch.allclose(after[b, k, j], torch.stack(group).mean(0), atol=1e-5)
    assert pivotal_merging(keys, values, torch.zeros_like(kept), lost) is None


@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_look_m_changes_kept_media_only(seed: int) -> None:
    observations, labels = layers_of(seed)
    compressor = compressor_of("look_m", ratio=0.3)
    scores = compressor.planners.default.scores(observations, labels)
    for seen, plan in zip(observations, compressor.planners.default.plan(observations, labels), strict=True):
        kept = torch.isfinite(plan.log_gates)
        keys, _, _ = plan.apply(seen.keys, seen.values)
        changed = (keys != seen.keys).any(-1)
        assert not bool((changed & ~(kept & labels.media[:, None])).any())
        assert bool(changed.any())
    nothing = compressor.planners.default.plan(observations, labels, ratio=0.0)
    assert all(plan.merged_into is None for plan in nothing)
    for row in received(observations[1], 1, 0, list(range(PADDING, ENTRIES))), scores[1].score[1, 0].tolist():
        assert row == pytest.approx(scores[1].score[1, 0].tolist(), abs=1e-5)
