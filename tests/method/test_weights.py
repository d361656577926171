"""Learned weights: what each adds to a score or a budget, entry by entry, and where copies of them are kept."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from acckv.method.heads import join_heads, one_head
from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerPlan, MergedInto
from acckv.method.scoring import Observation, standardise, standardised_sum
from acckv.method.weights import SIGNALS, WEIGHT_GROUPS, CalibratedWeights

LAYERS, KV_HEADS, HEADS, SIZE, PROBES, UNITS = 3, 2, 6, 4, 5, 7
LABELS = torch.tensor([[0, 1, 1, 0, 2, 2, 2, 1], [3, 3, 2, 2, 1, 0, 1, 1]])


def weights(seed: int = 0) -> CalibratedWeights:
    """No two numbers alike."""
    made = CalibratedWeights(LAYERS, KV_HEADS, HEADS, SIZE, PROBES, UNITS)
    draw = torch.Generator().manual_seed(seed)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw)
    return made.requires_grad_(False)


def test_the_start_is_the_preset() -> None:
    """Only probes and a hidden layer are drawn, the same ones everywhere; every weight belongs to one group."""
    made = CalibratedWeights(LAYERS, KV_HEADS, HEADS, SIZE, PROBES, UNITS)
    named = dict(made.named_parameters())
    assert {name for name, value in named.items() if value.any()} == {"probe_queries", "scorer_hidden"}
    shapes = {
        **dict.fromkeys(("layer_budget", "redundancy"), (LAYERS, 2)),
        **dict.fromkeys(("modality_gain", "merge_bias", "merge_gain"), (LAYERS, KV_HEADS, 2)),
        **dict.fromkeys(("redistribution", "alignment_weight", "alignment_threshold"), (LAYERS,)),
        "modality_budget": (LAYERS, 2, 2),
        "head_budget": (LAYERS, 2, KV_HEADS, 2),
        "probe_queries": (LAYERS, HEADS, PROBES, SIZE),
        "saliency": (LAYERS, 2, KV_HEADS, 2 * SIZE),
        "saliency_bias": (LAYERS, 2, KV_HEADS),
        "saliency_position": (LAYERS, 2, KV_HEADS, 3),
        "scorer_hidden": (LAYERS, KV_HEADS, 2 * SIZE, UNITS),
        "scorer_bias": (LAYERS, KV_HEADS, UNITS),
        "scorer_output": (LAYERS, KV_HEADS, UNITS, 2),
        "signal_mix": (LAYERS, 4),
    }
    assert {name: tuple(value.shape) for name, value in named.items()} == shapes
    drawn = torch.randn(LAYERS, HEADS, PROBES, SIZE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(made.probe_queries, drawn)
    grouped = [name for names in WEIGHT_GROUPS.values() for name in names]
    assert len(grouped) == len(set(grouped)) and set(grouped) == set(named)
    with torch.device("meta"):
        assert CalibratedWeights(1, 1, 1, 2, 1).probe_queries.device.type == "meta"


@pytest.mark.parametrize("ratio", [0.5, 0.1, 0.001, 0.0])
def test_shares_of_layers_and_modalities(ratio: float) -> None:
    """exp(offset + slope * log(ratio / 0.1)); ratios below one in a thousand count as that."""
    made, over = weights(), math.log(max(ratio, 0.001) / 0.1)
    raw = [math.exp(float(a + b * over)) for a, b in made.layer_budget]
    expected = [0.2 + 0.8 * LAYERS * each / sum(raw) for each in raw]
    assert made.layer_shares(ratio, 0.2).tolist() == pytest.approx(expected, rel=1e-4)
    measured = torch.tensor([[0.3, 0.7], [1.0, 0.0]])
    found = made.modality_shares(1, measured, ratio)
    for row, (video, audio) in enumerate(measured.tolist()):
        (a, b), (c, d) = made.modality_budget[1].tolist()
        moved = video * math.exp(a + b * over), audio * math.exp(c + d * over)
        assert found[row].tolist() == pytest.approx([each / sum(moved) for each in moved], rel=1e-4)
    assert made.modality_shares(1, torch.zeros(1, 2), ratio).tolist() == [[0.0, 0.0]]
    for shares in (measured, torch.rand(2, KV_HEADS, 2, generator=torch.Generator().manual_seed(5))):
        by_head = made.head_shares(1, shares, ratio)
        assert by_head.shape == (2, KV_HEADS, 2)
        for b, k, m in itertools.product(range(2), range(KV_HEADS), range(2)):
            offset, slope = made.head_budget[1, :, k, m].tolist()
            share = float(shares[b, m] if shares.ndim == 2 else shares[b, k, m])
            assert float(by_head[b, k, m]) == pytest.approx(share * math.exp(offset + slope * over), rel=1e-4)


def test_saliency_of_each_entry() -> None:
    """By the scorer of the entry's modality: key and value side by side at root mean square 1, through a linear part
    and a hidden layer; its position, a bias."""
    made, labels = weights(), ModalityMap(LABELS)
    draw = torch.Generator().manual_seed(1)
    keys, values = torch.randn(2, 2, KV_HEADS, 8, SIZE, generator=draw)
    found, positions = made.saliency_score(1, keys.half(), values.half(), labels), labels.segment_position
    keys, values = keys.half().float(), values.half().float()
    assert found.shape == (2, KV_HEADS, 8) and found.dtype == torch.float32
    for row, kinds in enumerate(LABELS.tolist()):
        for entry, kind in enumerate(kinds):
            for head in range(KV_HEADS):
                expected = 0.0
                if kind in (1, 2):
                    both = torch.cat([keys[row, head, entry], values[row, head, entry]])
                    both = both / both.square().mean().sqrt()
                    hidden = torch.nn.functional.gelu(both @ made.scorer_hidden[1, head] + made.scorer_bias[1, head])
                    expected = float(
                        hidden @ made.scorer_output[1, head, :, kind - 1]
                        + made.saliency[1, kind - 1, head] @ both
                        + made.saliency_position[1, kind - 1, head] @ positions[row, entry]
                        + made.saliency_bias[1, kind - 1, head]
                    )
                assert float(found[row, head, entry]) == pytest.approx(expected, abs=1e-4)


def test_entries_of_no_length_have_a_finite_saliency() -> None:
    nothing = torch.zeros(1, KV_HEADS, 8, SIZE)
    found = weights().saliency_score(0, nothing, nothing, ModalityMap(LABELS[:1]))
    assert bool(torch.isfinite(found).all())


def test_weights_of_signals() -> None:
    """The base signal has the gain of its head and modality besides the learned mix; shared heads have their mean."""
    made = weights()
    layer, names = made.layer(2, torch.device("cpu")), ("attention", "probe", "saliency")
    for shared in (False, True):
        found = layer.signal_weights(names, "probe", shared)
        assert found.shape == (3, 1 if shared else KV_HEADS, 2)
        for signal, name in enumerate(names):
            gain = made.modality_gain[2].exp() * (name == "probe")
            gain = gain.mean(0, keepdim=True) if shared else gain
            assert torch.allclose(found[signal], gain + made.signal_mix[2, SIGNALS.index(name)])
        assert layer.signal_weights(names, "probe", shared) is found
    assert not torch.allclose(
        layer.signal_weights(names, "attention", False), layer.signal_weights(names, "probe", False)
    )
    assert float(layer.saliency_weight) == pytest.approx(1 + float(made.signal_mix[2, 3]))
    assert torch.equal(layer.scaled_probes(0.3), made.probe_queries[2] * 0.3)
    assert torch.equal(layer.scaled_probes(2.0), made.probe_queries[2] * 2.0)


def test_one_head_of_the_weights_scores_as_among_others() -> None:
    made, labels = weights(), ModalityMap(LABELS)
    keys, values = torch.randn(2, 2, KV_HEADS, 8, SIZE, generator=torch.Generator().manual_seed(2))
    for head in range(KV_HEADS):
        alone, here = made.head(head), slice(head, head + 1)
        assert torch.equal(alone.probe_queries, made.probe_queries[:, 3 * head : 3 * head + 3])
        for name in ("modality_gain", "merge_bias", "merge_gain", "scorer_bias", "scorer_output"):
            assert torch.equal(alone.get_parameter(name), made.get_parameter(name)[:, here])
        assert torch.equal(alone.head_budget, made.head_budget[:, :, here])
        for name in ("layer_budget", "modality_budget", "redistribution", "signal_mix", "redundancy"):
            assert torch.equal(alone.get_parameter(name), made.get_parameter(name))
        found = alone.saliency_score(1, keys[:, here], values[:, here], labels)
        assert torch.allclose(found, made.saliency_score(1, keys, values, labels)[:, here], atol=1e-5)
        for name, parameter in alone.named_parameters():
            assert torch.equal(alone.head(0).get_parameter(name), parameter)


def test_copies_follow_a_change_and_trained_weights_are_views() -> None:
    made, cpu = weights(), torch.device("cpu")
    kept = made.layer(1, cpu)
    assert made.layer(1, cpu) is kept and made.layer(0, cpu) is not kept
    with torch.no_grad():
        made.redundancy.add_(1)
    assert torch.equal(made.layer(1, cpu).redundancy, made.redundancy[1]) and made.layer(1, cpu) is not kept
    assert kept.merge_gain.data_ptr() != made.merge_gain[1].data_ptr()
    made.requires_grad_(True)
    assert made.layer(1, cpu).merge_gain.data_ptr() == made.merge_gain[1].data_ptr()
    made.layer(2, cpu).merge_gain.sum().backward()
    assert made.merge_gain.grad is not None and made.merge_gain.grad[2].eq(1).all()
    half = weights().to(torch.bfloat16).layer(0, cpu)
    assert half.merge_bias.dtype == half.saliency.dtype == torch.float32


def test_standardised_scores_are_summed_by_weight() -> None:
    labels, draw = ModalityMap(LABELS), torch.Generator().manual_seed(3)
    scores = list(torch.randn(3, 2, KV_HEADS, 8, generator=draw))
    by_signal = torch.randn(3, KV_HEADS, 2, generator=draw)
    found, expected = standardised_sum(scores, by_signal, labels), torch.zeros(2, KV_HEADS, 8)
    for score, weight in zip(scores, by_signal, strict=True):
        whole = standardise(score, labels)
        for kind in (1, 2):
            expected += whole * weight[:, kind - 1, None] * LABELS.eq(kind)[:, None]
    assert torch.allclose(found, expected, atol=1e-4)


def test_a_head_alone_and_heads_joined() -> None:
    draw = torch.Generator().manual_seed(4)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw)

    seen = Observation(
        *(random(2, HEADS, 3, SIZE), random(2, KV_HEADS, 8, SIZE), random(2, KV_HEADS, 8, SIZE)),
        torch.arange(5, 8).expand(2, -1),
        torch.ones(2, 3, dtype=torch.bool),
        torch.ones(2, 8, dtype=torch.bool),
        0.5,
    )
    for head in range(KV_HEADS):
        alone = one_head(seen, head, seen.real)
        assert torch.equal(alone.queries, seen.queries[:, 3 * head : 3 * head + 3])
        assert torch.equal(alone.keys, seen.keys[:, head : head + 1])
        assert torch.equal(alone.values, seen.values[:, head : head + 1])
        assert alone.reconstruction is None and alone.scaling == 0.5
    attention = random(2, KV_HEADS, 8)
    fed = one_head(Observation(**vars(seen) | {"reconstruction": attention}), 1, seen.real)
    assert fed.reconstruction is not None and torch.equal(fed.reconstruction, attention[:, 1:])

    def plan(merged: bool, kept: list[int]) -> LayerPlan:
        into = MergedInto(torch.tensor([[[1]], [[4]]]), random(2, 1, 1, SIZE), random(2, 1, 1, SIZE))
        parts = random(2, 1, 10), random(2, 1, 2, SIZE), random(2, 1, 2, SIZE), random(2, 1, 2)
        return LayerPlan(*parts, into if merged else None, torch.tensor(kept))

    plans = [plan(True, [3, 4]), plan(True, [3, 4])]
    joined = join_heads(plans)
    for name in ("log_gates", "merged_keys", "merged_values", "merged_bias"):
        assert torch.equal(getattr(joined, name), torch.cat([getattr(each, name) for each in plans], dim=1))
    for name in ("index", "keys", "values"):
        parts = [getattr(each.merged_into, name) for each in plans]
        assert torch.equal(getattr(joined.merged_into, name), torch.cat(parts, dim=1))
    assert joined.kept is not None and joined.kept.tolist() == [3, 4]
    apart = join_heads([plan(False, [3, 4]), plan(False, [3, 5])])
    assert apart.merged_into is None and apart.kept is not None and apart.kept.tolist() == [[3, 3], [4, 5]]
