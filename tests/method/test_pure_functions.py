"""Scores, budgets and gates against independent slow implementations written from the words of docs/method.md."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from acckv.method.budgets import allocate, focus, round_exactly, share_out, split_layer, total_budget, water_fill
from acckv.method.cross_calibration import alignment, integrate, rebalance
from acckv.method.modality import ModalityMap
from acckv.method.scoring import Observation, heavy_hitter_score, inverse_norm, key_diversity, redundancy, standardise
from acckv.method.topk import kept, soft_log_gates
from tests.support import not_none

SEEDS = st.integers(0, 10_000)


def observation(seed: int, rows: int = 5, entries: int = 9, padding: int = 2) -> Observation:
    """Two batch rows, 2 KV heads with 2 query heads each; the first `padding` entries of row 1 are no tokens."""
    generator = torch.Generator().manual_seed(seed)
    real = torch.ones(2, entries, dtype=torch.bool)
    real[1, :padding] = False
    valid = torch.ones(2, rows, dtype=torch.bool)
    valid[0, 0] = False
    return Observation(
        torch.randn(2, 4, rows, 6, generator=generator),
        torch.randn(2, 2, entries, 6, generator=generator),
        torch.randn(2, 2, entries, 6, generator=generator),
        torch.arange(entries - rows, entries).expand(2, -1),
        valid,
        real,
        0.4,
    )


def slow_heavy_hitter(seen: Observation, gamma: float) -> Tensor:
    batch, heads, rows, _ = seen.queries.shape
    kv_heads, entries = seen.keys.shape[1:3]
    score = torch.zeros(batch, kv_heads, entries)
    for b in range(batch):
        padding = int((~seen.real[b]).sum())
        for h in range(heads):
            k = h // (heads // kv_heads)
            for r in range(rows):
                i = int(seen.query_positions[b, r])
                if not seen.query_valid[b, r]:
                    continue
                visible = [j for j in range(i + 1) if j < entries and bool(seen.real[b, j])]
                logits = [float(seen.queries[b, h, r] @ seen.keys[b, k, j]) * seen.scaling for j in visible]
                total = sum(math.exp(logit) for logit in logits)
                for j, logit in zip(visible, logits, strict=True):
                    weight = ((i + 1 - padding) / (entries - j)) ** gamma
                    score[b, k, j] += weight * math.exp(logit) / total / (heads // kv_heads)
    return score


@pytest.mark.parametrize("gamma", [0.0, 1.0, 0.5])
@given(seed=SEEDS)
@settings(max_examples=5, deadline=None)
def test_heavy_hitter_score(gamma: float, seed: int) -> None:
    seen = observation(seed)
    assert torch.allclose(heavy_hitter_score(seen, gamma), slow_heavy_hitter(seen, gamma), atol=1e-5)


def test_rows_are_worked_off_in_chunks() -> None:
    from acckv.method.scoring import attention_of_queries

    seen = observation(3)
    whole = next(iter(attention_of_queries(seen, chunk=100)))[1]
    parts = torch.cat([weights for _, weights in attention_of_queries(seen, chunk=2)], dim=3)
    assert torch.allclose(whole, parts, atol=1e-7)


def test_redistribution_undoes_the_triangle() -> None:
    """With uniform attention every column scores the same: that is what step 1 is for."""
    entries = 7
    zeros = torch.zeros(1, 1, entries, 4)
    positions = torch.arange(entries)[None]
    ones = torch.ones(1, entries, dtype=torch.bool)
    seen = Observation(zeros, zeros, zeros, positions, ones, ones, 1.0)
    assert heavy_hitter_score(seen, 0.0)[0, 0, 0] > 5 * heavy_hitter_score(seen, 0.0)[0, 0, -1]
    assert torch.allclose(heavy_hitter_score(seen, 1.0), torch.ones(1, 1, entries), atol=1e-6)


@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_key_diversity(seed: int) -> None:
    seen = observation(seed)
    score = key_diversity(seen.keys, seen.key_scale, seen.real)
    for b in range(2):
        for k in range(2):
            keys = seen.keys[b, k]
            unit = [key / key.norm() for key in keys]
            mean = sum(unit[j] for j in range(len(unit)) if bool(seen.real[b, j]))
            for j in range(len(unit)):
                assert float(score[b, k, j]) == pytest.approx(-float(unit[j] @ mean / mean.norm()), abs=1e-5)


def test_standardise_keeps_the_order_in_each_modality() -> None:
    score = torch.tensor([[[5.0, 1.0, 3.0, 100.0, 300.0, 7.0]]])
    labels = ModalityMap(torch.tensor([[1, 1, 1, 2, 2, 0]]))
    result = standardise(score, labels)[0, 0]
    assert result[:3].tolist() == pytest.approx([1.2247, -1.2247, 0.0], abs=1e-3)
    assert result[3:5].tolist() == pytest.approx([-1.0, 1.0], abs=1e-3)
    assert result[5] == 0


def test_a_wide_score_stays_as_wide_as_it_is_and_one_that_hardly_differs_narrow() -> None:
    """Divided by no more than `widest`; by the deviation and a floor of 1e-4, so that rounding makes no ranking."""
    labels = ModalityMap(torch.tensor([[1, 1, 2, 2]]))
    score = torch.tensor([[[5.0, 15.0, 0.3, 0.5]]])
    assert standardise(score, labels, widest=1.0)[0, 0].tolist() == pytest.approx([-5, 5, -1, 1], rel=2e-3)
    assert standardise(score, labels)[0, 0].tolist() == pytest.approx([-1, 1, -1, 1], rel=2e-3)
    narrow = 1 / (math.sqrt(2) + 1)
    flat = torch.tensor([[[1e-4, -1e-4, -1e-4, 1e-4]]])
    assert standardise(flat, labels)[0, 0].tolist() == pytest.approx([narrow, -narrow, -narrow, narrow], rel=1e-3)


def test_focus_is_the_share_of_mean_attention() -> None:
    score = torch.tensor([[[1.0, 3.0, 9.0, 5.0], [1.0, 3.0, 1.0, 5.0]]])
    members = torch.tensor([[[True, True, False, False], [False, False, True, False]]])
    assert focus(score, members)[0].tolist() == pytest.approx([2 / 7, 5 / 7])


@given(seed=SEEDS, total=st.floats(0, 40))
@settings(max_examples=50, deadline=None)
def test_water_filling(seed: int, total: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    shares = torch.rand(4, generator=generator)
    capacity = torch.randint(0, 12, (4,), generator=generator).float()
    filled = water_fill(torch.tensor(total), shares, capacity)
    assert float(filled.sum()) == pytest.approx(min(total, float(capacity.sum())), abs=1e-3)
    assert bool((filled <= capacity + 1e-5).all())
    open_parts = filled < capacity - 1e-3
    if int(open_parts.sum()) > 1:  # what is not full is in proportion
        ratio = filled[open_parts] / shares[open_parts]
        assert torch.allclose(ratio, ratio.mean().expand_as(ratio), rtol=1e-3)


@given(seed=SEEDS, ratio=st.floats(0, 1), layers=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_budgets_are_exact(seed: int, ratio: float, layers: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 30, (3, 2), generator=generator)
    layer_shares = torch.rand(layers, generator=generator) ** 3
    modality_shares = torch.rand(3, layers, 2, generator=generator)
    total = total_budget(ratio, None, layers, counts)
    amounts = allocate(total, layer_shares, modality_shares, counts)
    assert torch.allclose(amounts.sum((1, 2)), total.float(), atol=1e-3)
    by_layer = share_out(total, layer_shares, counts.sum(-1, keepdim=True).expand(-1, layers))
    split = [split_layer(by_layer[:, layer], modality_shares[:, layer], counts) for layer in range(layers)]
    whole = torch.stack(split, dim=1)
    assert torch.equal(whole.sum(-1), by_layer)
    assert whole.sum((1, 2)).tolist() == [math.floor(ratio * layers * int(n) + 1e-9) for n in counts.sum(-1)]
    assert bool((whole >= 0).all()) and bool((whole <= counts[:, None]).all())
    if bool((amounts < counts[:, None] - 2).all()):  # nothing was capped: each rounding moves a count by less than one
        assert bool(((whole - amounts).abs() < 2 + 1e-3).all())


def test_round_exactly_gives_largest_remainders_first() -> None:
    amounts = torch.tensor([[1.6, 2.9, 0.5]])
    assert round_exactly(amounts, torch.tensor([5]), torch.tensor([[9, 9, 9]])).tolist() == [[2, 3, 0]]
    few = torch.tensor([[5.1, 1.9]])
    assert round_exactly(few, torch.tensor([7]), torch.tensor([[9, 9]])).tolist() == [[5, 2]]


def test_absolute_budget() -> None:
    counts = torch.tensor([[10, 20], [1, 2]])
    assert total_budget(0.5, 6, 4, counts).tolist() == [24, 12]


@given(seed=SEEDS)
@settings(max_examples=30, deadline=None)
def test_kept_are_the_top_k(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(2, 2, 11, generator=generator)
    members = torch.rand(2, 1, 11, generator=generator) < 0.7
    budget = torch.stack([torch.randint(0, int(row.sum()) + 1, (2,), generator=generator) for row in members])
    gates = kept(score, members, budget)
    for b in range(2):
        for k in range(2):
            inside = [j for j in range(11) if bool(members[b, 0, j])]
            best = sorted(inside, key=lambda j: -float(score[b, k, j]))[: int(budget[b, k])]
            assert sorted(gates[b, k].nonzero().flatten().tolist()) == sorted(best)


def test_equal_scores_keep_the_earlier_entry() -> None:
    gates = kept(torch.zeros(1, 1, 6), torch.ones(1, 1, 6, dtype=torch.bool), torch.tensor([[2]]))
    assert gates.tolist() == [[[1, 1, 0, 0, 0, 0]]]


@given(seed=SEEDS, temperature=st.sampled_from([0.5, 0.1, 0.04]), share=st.floats(0.1, 0.9))
@settings(max_examples=30, deadline=None)
def test_soft_gates_sum_to_the_budget(seed: int, temperature: float, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randn(2, 1, 40, generator=generator)
    members = torch.rand(2, 1, 40, generator=generator) < 0.8
    budget = members.sum(-1) * share
    gates = soft_log_gates(score, members, budget, temperature).exp()
    assert torch.allclose(gates.sum(-1), budget, atol=0.02)
    assert bool((gates[~members.expand_as(gates)] == 0).all())


def test_soft_gate_gradient_is_the_implicit_one() -> None:
    """Moving a score or the budget moves theta so that the sum stays: checked by finite differences."""
    torch.manual_seed(0)
    score = torch.randn(1, 1, 12, dtype=torch.float64, requires_grad=True)
    budget = torch.tensor([[4.0]], dtype=torch.float64, requires_grad=True)
    members = torch.ones(1, 1, 12, dtype=torch.bool)
    weight = torch.randn(1, 1, 12, dtype=torch.float64)

    def value(s: Tensor, b: Tensor) -> Tensor:
        return (soft_log_gates(s, members, b, 0.3, iterations=80).exp() * weight).sum()

    value(score, budget).backward()
    step = 1e-5
    with torch.no_grad():
        for index in (0, 5, 11):
            moved = score.clone()
            moved[0, 0, index] += step
            slope = (value(moved, budget) - value(score, budget)) / step
            assert float(not_none(score.grad)[0, 0, index]) == pytest.approx(float(slope), abs=1e-3)
        slope = (value(score, budget + step) - value(score, budget)) / step
    assert float(not_none(budget.grad)) == pytest.approx(float(slope), abs=1e-3)


def test_integration_averages_what_a_modality_loses() -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(1, 2, 6, 3), torch.randn(1, 2, 6, 3)
    members = torch.tensor([[[True, True, True, False, False, False], [False, False, False, True, True, False]]])
    gates = torch.tensor([[[1.0, 0, 0, 0, 1, 1], [0, 0, 1.0, 0, 0, 1]]])
    merged_keys, merged_values, mass = integrate(keys, values, gates, members)
    assert mass.tolist() == [[[2, 1], [2, 2]]]
    assert torch.allclose(merged_keys[0, 0, 0], keys[0, 0, 1:3].mean(0))
    assert torch.allclose(merged_values[0, 0, 1], values[0, 0, 3])
    assert torch.allclose(merged_values[0, 1, 1], values[0, 1, 3:5].mean(0))


def test_integration_weighs_by_what_soft_gates_lose() -> None:
    """A loss of less than one entry is averaged as any other; half entries stay half."""
    keys, values = torch.tensor([[2.0], [5.0], [7.0]]).view(1, 1, 3, 1), torch.tensor([[1.0], [4.0], [9.0]]).half()
    members = torch.tensor([[[True, True, False], [False, False, True]]])
    gates = torch.tensor([[[0.9, 0.8, 0.5]]])
    merged_keys, merged_values, mass = integrate(keys, values.view(1, 1, 3, 1), gates, members)
    assert mass.flatten().tolist() == pytest.approx([0.3, 0.5])
    assert merged_keys.flatten().tolist() == pytest.approx([0.1 / 0.3 * 2 + 0.2 / 0.3 * 5, 7.0], rel=1e-5)
    assert merged_values.dtype == torch.float16 and merged_values.flatten().tolist() == pytest.approx([3.0, 9.0])


@pytest.mark.parametrize("gates", [(1.0, 1.0), (0.5, 0.1)], ids=["hard", "soft, less than one in all"])
def test_alignment_is_the_mean_cosine_to_the_kept(gates: tuple[float, float]) -> None:
    torch.manual_seed(0)
    keys = torch.randn(1, 1, 5, 4)
    kept = torch.tensor([[[gates[0], 0, gates[1], 0, 0]]])
    found = alignment(keys, inverse_norm(keys), kept, kept.sum(-1))[0, 0]
    for j in range(5):
        cosines = [float(torch.cosine_similarity(keys[0, 0, j], keys[0, 0, i], dim=0)) for i in (0, 2)]
        slow = (gates[0] * cosines[0] + gates[1] * cosines[1]) / sum(gates)
        assert float(found[j]) == pytest.approx(slow, abs=1e-5)


def test_rebalance_hands_on_what_the_threshold_freed() -> None:
    high = torch.tensor([[[True, False]]])
    counts = torch.tensor([[[6, 9]]])
    for aligned, expected in ((2, [5, 2]), (5, [3, 4]), (0, [6, 1])):
        split = rebalance(torch.tensor([[[3.0, 4.0]]]), torch.tensor([[aligned]]), high, counts)
        assert split.tolist() == [[expected]]


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, heads=st.sampled_from([1, 2]), entries=st.sampled_from([0, 1, 2, 9]))
@example(seed=0, heads=1, entries=0)
@example(seed=0, heads=1, entries=1)
@example(seed=0, heads=2, entries=30)
def test_redundancy(seed: int, heads: int, entries: int) -> None:
    """Neighbours of the same modality that score higher count by how similar their values are."""
    generator = torch.Generator().manual_seed(seed)
    width, softness = 3, 0.2
    labels = torch.randint(0, 4, (2, entries), generator=generator)
    score = torch.randn(2, heads, entries, generator=generator)
    values = torch.randn(2, 2, entries, 5, generator=generator)
    found = redundancy(score, values, ModalityMap(labels), width)
    for b in range(2):
        for k in range(heads):
            vectors = values[b].transpose(0, 1).flatten(1) if heads == 1 else values[b, k]
            for i in range(entries):
                total = 0.0
                for j in range(entries):
                    kind = int(labels[b, i])
                    if i == j or abs(i - j) > width or kind != int(labels[b, j]) or kind not in (1, 2):
                        continue
                    mean = vectors[labels[b] == kind].mean(0)
                    one, other = vectors[i] - mean, vectors[j] - mean
                    cosine = float(one @ other / (one.norm() * other.norm()).clamp_min(1e-12))
                    higher = 1 / (1 + math.exp(-float(score[b, k, j] - score[b, k, i]) / softness))
                    total += max(cosine, 0.0) * higher
                assert float(found[b, k, i]) == pytest.approx(total, abs=1e-5)


def test_neighbours_are_other_entries_of_the_same_modality() -> None:
    """Text and padding have none, and there is none beyond the first and the last entry."""
    kinds, width = [[2, 2, 1, 0, 0, 1, 2, 2], [3, 3, 1, 2, 2, 2, 1, 1]], 2
    found = ModalityMap(torch.tensor(kinds)).alike_around(width)
    for row, labels in enumerate(kinds):
        for i, kind in enumerate(labels):
            near = [j for j in range(i - width, i + width + 1)]
            alike = [kind in (1, 2) and j != i and 0 <= j < 8 and labels[j] == kind for j in near]
            assert found[row, 0, i].tolist() == alike


def test_redundancy_leaves_one_of_each_event() -> None:
    """Two events of three alike entries each: the second best entries of the better event fall behind the other one."""
    labels = ModalityMap(torch.ones(1, 6, dtype=torch.long))
    values = torch.tensor([[1.0, 0.0]] * 3 + [[0.0, 1.0]] * 3)[None, None]
    score = torch.tensor([[[2.0, 1.9, 1.8, 1.0, 0.9, 0.8]]])
    assert kept(score, labels.media, torch.tensor([[2]])).tolist() == [[[1, 1, 0, 0, 0, 0]]]
    less = score - 2 * redundancy(score, values, labels, width=4, softness=0.01)
    assert kept(less, labels.media, torch.tensor([[2]])).tolist() == [[[1, 0, 0, 1, 0, 0]]]


@given(st.lists(st.sampled_from("tva"), min_size=1, max_size=12), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_place_in_a_segment(kinds: list[str], padding: int) -> None:
    """Against runs found one by one; padding on the left changes nothing."""
    labels = [3] * padding + ["tva".index(kind) for kind in kinds]
    found = ModalityMap(torch.tensor([labels])).segment_position[0, padding:]
    for index, kind in enumerate(kinds):
        start, end = index, index
        while start and kinds[start - 1] == kind:
            start -= 1
        while end + 1 < len(kinds) and kinds[end + 1] == kind:
            end += 1
        if kind != "t":
            place = (index - start + 0.5) / (end - start + 1)
            turn = 2 * math.pi * place
            expected = torch.tensor([place, math.sin(turn), math.cos(turn)])
            torch.testing.assert_close(found[index], expected, atol=1e-5, rtol=0)
