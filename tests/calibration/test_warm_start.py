"""Calibrations that begin with what KVzip keeps: the fit of the scorer, the measured budgets, a run that goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from acckv import InputError, KVCompressor
from acckv.method.modality import ModalityMap
from acckv.method.scoring import standardise
from acckv.method.weights import CalibratedWeights
from acckv.policies import AccKV
from lightning_modules.calibration import warm_start
from lightning_modules.calibration.warm_start import RATIOS, WarmStart, apply_network, fit_network
from tests.calibration.runs import clip_data, configured, fit
from tests.learned import weights_of

UNITS: dict[str, Any] = {"compression": {"n_scorer_units": 8}, "lora_rank": 0}


def test_the_fit_finds_a_network_that_is_there() -> None:
    """Two heads with rules of their own for each modality, inputs of unlike size."""
    draw = torch.Generator().manual_seed(0)
    entries = torch.randn(2, 4096, 6, generator=draw) * torch.tensor([5.0, 1, 1, 0.2, 1, 1]) + 3
    modality = torch.randint(2, (4096,), generator=draw)
    by_modality = torch.stack([entries[..., 0] / 5 - entries[..., 3], F.relu(entries[..., 1] - 3)], -1)
    targets = by_modality.gather(-1, modality.expand(2, -1)[..., None])[..., 0] * torch.tensor([[1.0], [-1.0]])
    targets = targets - targets.mean(1, keepdim=True)
    network = fit_network(entries, targets, modality, 16, draw)
    assert [tuple(part.shape) for part in network] == [(2, 6, 16), (2, 16), (2, 16, 2)]
    missed = (apply_network(*network, entries, modality) - targets).square().mean(1)
    assert (missed < 0.15 * targets.square().mean(1)).all()


@pytest.fixture(autouse=True)
def short_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm_start, "STEPS", 150)


def test_budgets_and_scores_are_those_of_kvzip(cache: Path) -> None:
    """Of the clips that were measured, heads keep about what KVzip's joint ranking gives them, and mostly the same."""
    data = clip_data(cache)
    data.setup()
    batch = data.datasets["train"].batch(0, [0, 1, 2])
    with configured(head_budgets="learned", **UNITS) as module:
        start = WarmStart(module.policy, "learned")
        prefill = module.teacher.prefill(batch)
        peaks = module.live.reconstruction(prefill)
        start.add(prefill, peaks)
        explained = start.write(module.weights)
        plans = {ratio: module.live.plan(prefill, ratio) for ratio in RATIOS}
        labels = prefill.labels
    assert 0.3 < explained < 1
    masks = labels.masks.transpose(1, 2)
    ranked = torch.stack(peaks, 1).masked_fill(~labels.media[:, None, None], -torch.inf)
    for ratio, by_layer in plans.items():
        kept = torch.stack([(plan.log_gates == 0) & labels.media[:, None] for plan in by_layer], 1)
        wanted = torch.zeros_like(kept)
        for row, scores in enumerate(ranked):
            places = scores.flatten().topk(int(kept[row].sum())).indices
            wanted[row].view(-1)[places] = True
        found, expected = ((each.float() @ masks[:, None]).mean(0) for each in (kept, wanted))
        alike = expected.mean((0, 1), keepdim=True)
        assert (found - expected).abs().sum() < 0.5 * (alike - expected).abs().sum(), ratio
        by_chance = kept.float().mean()
        assert (kept & wanted).sum() > max(0.5, 2 * by_chance if by_chance < 0.3 else 0) * wanted.sum(), ratio

    first = peaks[0]
    target = standardise(first.clamp_min(1e-12).log(), labels)
    assert torch.allclose(start.samples[0].targets[0].mean(1), torch.zeros(len(target[0])), atol=0.2)


def test_a_calibration_begins_there_and_exports(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {**UNITS, "warm_start": "kvzip", "warm_start_clips": 3, "head_budgets": "learned"}
    module = fit(cache, tmp_path / "one", steps=4, stop=2, **options)
    assert "of the variance of KVzip's scores" in capsys.readouterr().out
    began = module.weights.state_dict()
    assert began["signal_mix"][:, 1].add(1).abs().max() < 0.05, "the preset's own signal counts no more"
    for name in ("layer_budget", "modality_budget", "head_budget", "scorer_output"):
        assert began[name].abs().amax() > 0.1, name
    resumed = fit(cache, tmp_path / "two", steps=4, resume=next((tmp_path / "one").glob("*.ckpt")), **options)
    assert "of the variance" not in capsys.readouterr().out, "it goes on where it was"
    export = KVCompressor.from_pretrained(tmp_path / "two" / "export")
    assert torch.equal(weights_of(export).scorer_hidden, resumed.weights.scorer_hidden)


def test_it_is_refused_where_nothing_could_begin() -> None:
    with pytest.raises(InputError, match=r"model\.warm_start: fits the scorer's network, which has no units; set"):
        WarmStart(AccKV.preset("context"), "equal")
    with pytest.raises(
        InputError, match=r"model\.warm_start: gives each modality its budget, which 'focusing' measures"
    ):
        WarmStart(AccKV.preset("paper", n_scorer_units=4), "equal")


def test_a_scorer_without_a_network_is_as_before() -> None:
    """Exports and draws of before: the network has no part in them."""
    draw = torch.Generator().manual_seed(1)
    plain, wide = (CalibratedWeights(2, 2, 4, 4, 3, units) for units in (0, 5))
    assert torch.equal(plain.probe_queries, wide.probe_queries) and not plain.scorer_hidden.numel()
    keys, values = torch.randn(2, 1, 2, 6, 4, generator=draw)
    labels = ModalityMap(torch.tensor([[0, 1, 1, 2, 2, 1]]))
    with torch.no_grad():
        for each in (plain, wide):
            each.saliency.fill_(0.3)
    assert torch.equal(plain.saliency_score(0, keys, values, labels), wide.saliency_score(0, keys, values, labels))
