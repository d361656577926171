"""One layer's plan against each step done in turn for one row and head; rotations against complex numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from acckv.method.budgets import allocate, focus, round_exactly
from acckv.method.modality import ModalityMap
from acckv.method.plan import (
    AlignmentRule,
    LayerInputs,
    LayerPlan,
    LayerScore,
    MergedInto,
    MergeRule,
    plan_layer,
)
from acckv.method.rotary import RotaryLayout, rotate, unrotate
from acckv.method.scoring import Observation, standardise
from acckv.method.topk import soft_topk
from tests.support import not_none

LABELS = torch.tensor([[0, 1, 1, 1, 2, 2, 2, 2, 0, 1], [3, 2, 2, 1, 2, 1, 1, 1, 1, 0]])
KV_HEADS, SIZE = 2, 4


def layer(seed: int) -> tuple[LayerScore, Observation, ModalityMap]:
    draw = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 2, KV_HEADS, 10, SIZE, generator=draw)
    seen = Observation(
        torch.randn(2, KV_HEADS, 1, SIZE, generator=draw),
        keys,
        values,
        torch.full((2, 1), 9),
        torch.ones(2, 1, dtype=torch.bool),
        LABELS != 3,
        1.0,
    )
    shares = torch.tensor([[0.6, 0.4], [0.2, 0.8]])  # video leads in the first row, audio in the second
    return LayerScore(torch.randn(2, KV_HEADS, 10, generator=draw), shares), seen, ModalityMap(LABELS)


def best(score: dict[int, float], count: int) -> set[int]:
    return set(sorted(score, key=lambda entry: (-score[entry], entry))[:count])


def slow_aligned(
    score: Tensor, keys: Tensor, kinds: list[int], split: list[int], first: int, rule: AlignmentRule
) -> set[int]:
    """Kept media entries of one row and head."""
    members = [[entry for entry, kind in enumerate(kinds) if kind == modality] for modality in (1, 2)]
    raw = {entry: float(score[entry]) for entry in (*members[0], *members[1])}
    high, low = members[first], members[1 - first]
    kept_high = best({entry: raw[entry] for entry in high}, split[first])
    cosine = {
        entry: sum(float(torch.cosine_similarity(keys[entry], keys[other], dim=0)) for other in kept_high)
        / max(len(kept_high), 1)
        for entry in low
    }
    moved = {entry: raw[entry] + float(rule.weight) * cosine[entry] for entry in low}
    to_low = split[1 - first]
    if rule.drop:
        aligned = [entry for entry in low if cosine[entry] >= float(rule.threshold)]
        total = sum(split)
        to_high = min(len(high), total - min(to_low, len(aligned)))
        to_low = total - to_high
        kept_high = best({entry: raw[entry] for entry in high}, to_high)
        moved = {entry: value - (0 if entry in aligned else 1000) for entry, value in moved.items()}
    return kept_high | best(moved, to_low)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "rule",
    [
        AlignmentRule(0.1),
        AlignmentRule(-0.2, weight=1.5),
        AlignmentRule(0.6, weight=torch.tensor(-0.8)),
        AlignmentRule(9.0, weight=2.0, drop=False),
    ],
    ids=["threshold", "both", "none aligned", "weight"],
)
def test_alignment_of_a_layer(seed: int, rule: AlignmentRule) -> None:
    score, seen, labels = layer(seed)
    budgets = torch.tensor([[2, 3], [4, 1]])
    plan = plan_layer(LayerInputs(0, score, seen, labels, budgets), align=rule)
    for row, kinds in enumerate(LABELS.tolist()):
        text = {entry for entry, kind in enumerate(kinds) if kind == 0}
        for head in range(KV_HEADS):
            split, first = budgets[row].tolist(), int(not_none(score.modality_shares)[row].argmax())
            media = slow_aligned(score.score[row, head], seen.keys[row, head], kinds, split, first, rule)
            assert set(plan.log_gates[row, head].eq(0).nonzero().flatten().tolist()) == text | media


def test_an_entry_exactly_at_the_threshold_is_aligned() -> None:
    """Video entry 0 is kept first; of the audio entries, 2 is at right angles to it and 3 against it: 3 is dropped."""
    keys = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).view(1, 1, 4, 2)
    seen, labels = layer(0)[1], ModalityMap(torch.tensor([[1, 1, 2, 2]]))
    seen = Observation(**vars(seen) | {"keys": keys, "values": keys, "real": labels.real})
    score = LayerScore(torch.tensor([[[2.0, 1.0, 0.0, 1.0]]]), torch.tensor([[0.6, 0.4]]))
    for threshold, expected in ((0.0, [0, 1, 2]), (1e-6, [0, 1, 3]), (-1.0, [0, 2, 3])):
        plan = plan_layer(LayerInputs(0, score, seen, labels, torch.tensor([[1, 2]])), align=AlignmentRule(threshold))
        assert plan.log_gates[0, 0].eq(0).nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("budgets", [[[2.0, 3.0], [3.5, 1.0]], [[0.0, 3.0], [2.0, 0.0]]], ids=["some", "nothing leads"])
@pytest.mark.parametrize("shared", [False, True])
def test_soft_alignment_of_a_layer(shared: bool, budgets: list[list[float]]) -> None:
    """In training the threshold is a sigmoid, and budgets and scores follow it; step by step for one row and head."""
    score, seen, labels = layer(3)
    heads = 1 if shared else KV_HEADS
    score = LayerScore(score.score[:, :heads], score.modality_shares)
    rule, soft = AlignmentRule(torch.tensor(0.1), weight=0.7, softness=0.2), soft_topk(0.3)
    split = torch.tensor(budgets)
    plan = plan_layer(LayerInputs(0, score, seen, labels, split, 0.3), align=rule)
    for row, kinds in enumerate(LABELS):
        first = int(not_none(score.modality_shares)[row].argmax())
        high, low = kinds == first + 1, kinds == 2 - first
        for head in range(heads):
            raw = score.score[row, head]
            gates = soft(raw[None], high[None], split[row, first, None])[0].exp()
            cosines = []
            for each in range(KV_HEADS) if shared else [head]:
                keys = torch.nn.functional.normalize(seen.keys[row, each], dim=-1)
                cosines.append(keys @ (gates[:, None] * keys).sum(0) / gates.sum())
            cosine = torch.stack(cosines).mean(0)
            passes = torch.sigmoid((cosine - 0.1) / 0.2)
            to_low = min(float(split[row, 1 - first]), float(passes[low].sum()))
            to_high = min(int(high.sum()), float(split[row].sum()) - to_low)
            to_low = float(split[row].sum()) - to_high
            moved = raw + 0.7 * cosine * low
            moved = moved - (moved.max() - moved.min() + 1) * (1 - passes) * low
            for side, budget in ((high, to_high), (low, to_low)):
                expected = soft(moved[None], side[None], torch.tensor([budget]))[0]
                assert torch.allclose(plan.log_gates[row, head][side], expected[side], atol=2e-3)


def test_heads_that_share_a_score_align_by_their_mean() -> None:
    score, seen, labels = layer(0)
    shared = LayerScore(score.score[:, :1], score.modality_shares)
    rule = AlignmentRule(9.0, weight=2.0, drop=False)
    plan = plan_layer(LayerInputs(0, shared, seen, labels, torch.tensor([[2, 3], [4, 1]])), align=rule)
    assert plan.log_gates.shape == (2, 1, 10)
    high = best({entry: float(score.score[0, 0, entry]) for entry in (1, 2, 3, 9)}, 2)
    moved = {}
    for entry in (4, 5, 6, 7):
        pairs = [(seen.keys[0, head, entry], seen.keys[0, head, other]) for head in (0, 1) for other in high]
        mean = sum(float(torch.cosine_similarity(*pair, dim=0)) for pair in pairs) / len(pairs)
        moved[entry] = float(score.score[0, 0, entry]) + 2 * mean
    assert set(plan.log_gates[0, 0].eq(0).nonzero().flatten().tolist()) == {0, 8} | high | best(moved, 3)


@pytest.mark.parametrize("split", [[1, 2], [2, 3], [4, 4], [0, 0]])
def test_a_merged_entry_takes_a_place_of_two_or_more(split: list[int]) -> None:
    """It is the mean of what its modality loses, with the gain of its head; nothing is merged where all is kept."""
    score, seen, labels = layer(1)
    bias, gain = torch.tensor([[0.1, 0.2], [0.3, 0.4]]), torch.tensor([[0.5, -0.5], [1.0, 0.0]])
    plan = plan_layer(LayerInputs(0, score, seen, labels, torch.tensor([split, split])), MergeRule(bias, gain))
    assert torch.equal(plan.merged_bias, bias.expand(2, -1, -1))
    for row, kinds in enumerate(LABELS.tolist()):
        for head in range(KV_HEADS):
            held = plan.log_gates[row, head].eq(0)
            for modality, budget in enumerate(split):
                entries = [entry for entry, kind in enumerate(kinds) if kind == modality + 1]
                merges = 2 <= budget < len(entries)
                assert bool(held[10 + modality]) == merges
                ranked = best({entry: float(score.score[row, head, entry]) for entry in entries}, budget - merges)
                assert {entry for entry in entries if held[entry]} == ranked
                lost = [entry for entry in entries if entry not in ranked]
                if merges:
                    expected = seen.values[row, head, lost].mean(0) * (1 + gain[head, modality])
                    assert torch.allclose(plan.merged_keys[row, head, modality], seen.keys[row, head, lost].mean(0))
                    assert torch.allclose(plan.merged_values[row, head, modality], expected, atol=1e-6)


def test_a_plan_applied_stands_before_later_tokens() -> None:
    """Merged entries lie between the prompt and what follows, gates and bias with them."""
    draw = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, KV_HEADS, 12, SIZE, generator=draw)
    gates = torch.where(torch.rand(1, KV_HEADS, 12, generator=draw) < 0.5, 0.0, -torch.inf)
    more = torch.randn(2, 1, KV_HEADS, 2, SIZE, generator=draw)
    bias = torch.randn(1, KV_HEADS, 2, generator=draw)
    changed = torch.randn(2, 1, KV_HEADS, 1, SIZE, generator=draw)
    into = MergedInto(torch.tensor([[[3], [5]]]), *changed)
    found = LayerPlan(gates, more[0], more[1], bias, into).apply(keys, values)
    for tensor, extra, new, old in zip(found[:2], more, changed, (keys, values), strict=True):
        assert torch.equal(tensor[:, :, 10:12], extra) and torch.equal(tensor[:, :, 12:], old[:, :, 10:])
        expected = old[:, :, :10].clone()
        expected[0, 0, 3], expected[0, 1, 5] = new[0, 0, 0], new[0, 1, 0]
        assert torch.equal(tensor[:, :, :10], expected)
    assert torch.equal(found[2][..., :10], gates[..., :10])
    assert torch.equal(found[2][..., 10:], gates[..., 10:] + bias)


def test_rounding_takes_back_and_hands_out_whole_entries() -> None:
    """Amounts that round to more than the total lose from the largest; what is missing goes where there is room."""
    amounts = torch.tensor([[2.9999999, 1.0, 3.0], [0.4, 0.3, 0.3], [1.5, 9.0, 0.5]])
    capacity = torch.tensor([[5, 5, 5], [1, 5, 5], [2, 3, 9]])
    found = round_exactly(amounts, torch.tensor([6, 3, 9]), capacity)
    assert found.tolist() == [[2, 1, 3], [1, 1, 1], [2, 3, 4]]
    assert round_exactly(amounts, torch.tensor([7, 1, 99]), capacity).tolist() == [[3, 1, 3], [1, 0, 0], [2, 3, 9]]


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("start", [0, 2])
def test_a_rotation_is_that_of_complex_numbers(neighbours: bool, interleaved: bool, start: int) -> None:
    """Pairs lie side by side or half a rotary part apart; the elements outside of it stay as they are."""
    draw, size, width = torch.Generator().manual_seed(0), 6, 10
    layout = RotaryLayout(width, start, size, neighbours, interleaved)
    vectors, angles = torch.randn(2, 5, width, generator=draw), torch.randn(2, 5, size // 2, generator=draw)
    table = angles.repeat_interleave(2, -1) if interleaved else torch.cat([angles, angles], -1)
    cos, sin = layout.spread(table.cos(), 1.0), layout.spread(table.sin(), 0.0)
    found = rotate(vectors, cos, sin, layout)
    expected = vectors.clone()
    for pair in range(size // 2):
        one, other = (2 * pair, 2 * pair + 1) if neighbours else (pair, pair + size // 2)
        turned = torch.complex(vectors[..., start + one], vectors[..., start + other])
        turned = turned * torch.polar(torch.ones(2, 5), angles[..., pair])
        expected[..., start + one], expected[..., start + other] = turned.real, turned.imag
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(
        unrotate(3 * found, 3 * cos, 3 * sin, layout)[..., start : start + size],
        vectors[..., start : start + size],
        atol=1e-5,
    )


def test_budgets_of_several_rows_are_those_of_each() -> None:
    draw = torch.Generator().manual_seed(0)
    score, labels = torch.rand(2, KV_HEADS, 10, generator=draw), ModalityMap(LABELS)
    members, shares = labels.by_modality, torch.rand(2, 3, 2, generator=draw)
    counts, total, layers = labels.counts(), torch.tensor([7.3, 9.6]), torch.tensor([[0.5, 1.0, 1.5], [1.2, 0.9, 0.9]])
    focused, allocated = focus(score, members), allocate(total, layers, shares, counts)
    for row in range(2):
        means = [float(score[row][:, members[row, kind]].mean()) for kind in range(2)]
        assert focused[row].tolist() == pytest.approx([each / sum(means) for each in means], rel=1e-4)
        here = slice(row, row + 1)
        assert torch.allclose(allocated[here], allocate(total[here], layers[row], shares[here], counts[here]))
        assert float(allocated[row].sum()) == pytest.approx(float(total[row]), rel=1e-4)


def test_entries_keep_the_type_of_the_cache() -> None:
    """Weights are float32, a cache may be half: what is merged is computed in the one and held in the other."""
    score, seen, labels = layer(2)
    half = Observation(**vars(seen) | {"keys": seen.keys.half(), "values": seen.values.half()})
    plan = plan_layer(LayerInputs(0, score, half, labels, torch.tensor([[2, 3], [2, 3]])), MergeRule())
    assert plan.merged_keys.dtype == plan.merged_values.dtype == torch.float16
    wide = LayerPlan(plan.log_gates, plan.merged_keys.float(), plan.merged_values.float(), plan.merged_bias)
    keys, values, _ = wide.apply(half.keys, half.values)
    assert keys.dtype == values.dtype == torch.float16
    into = MergedInto(torch.zeros(2, KV_HEADS, 1, dtype=torch.long), *torch.ones(2, 2, KV_HEADS, 1, SIZE))
    assert {tensor.dtype for tensor in into.place(half.keys, half.values)} == {torch.float16}


def test_a_score_that_is_the_same_everywhere_stands_at_its_mean() -> None:
    found = standardise(torch.full((2, 1, 10), 0.5), ModalityMap(LABELS))
    assert bool(torch.isfinite(found).all()) and found.abs().max() < 1e-3
