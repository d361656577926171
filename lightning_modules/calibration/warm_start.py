"""A warm start: what KVzip (arXiv 2505.23416) keeps, measured on some clips, as a calibration's first weights.

KVzip reads the context twice. What its ranking gives each layer, modality and KV head hardly depends on the clip, so
the learned budgets begin there. How it ranks the entries of a head can be told from each entry's key and value (KVzap,
arXiv 2601.07891, and Fast KVzip, arXiv 2601.17668, tell it from hidden states), so the scorer is fitted to that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from acckv.config import CompressionConfig, HeadBudgets
from acckv.errors import InputError
from acckv.io.progress import Progress
from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerPlan
from acckv.method.scoring import Observation, standardise
from acckv.method.weights import SIGNALS, CalibratedWeights, log_ratio, scaled_entries
from acckv.planner import Planner
from acckv.policies import AccKV, KVzip
from acckv.runtime.prefill import Prefill

#: Ratios at which budgets are measured.
RATIOS = (0.5, 0.2, 0.1, 0.05, 0.02)
#: Entries of a clip that the scorer is fitted to, and of how many clips one is left out to measure the fit.
ENTRIES, LEFT_OUT = 512, 8
STEPS, BATCH, LEARNING_RATE = 600, 512, 4e-3


@dataclass(frozen=True)
class _Sample:
    """Entries ``[L, K, n, 2 * D]``, their standardised log scores ``[L, K, n]`` and modality ``[n]``, 0 or 1."""

    entries: Tensor
    targets: Tensor
    modality: Tensor

    @classmethod
    def join(cls, samples: Sequence[_Sample]) -> _Sample:
        entries, targets = (torch.cat([getattr(one, name) for one in samples], 2) for name in ("entries", "targets"))
        return cls(entries, targets, torch.cat([one.modality for one in samples]))


class WarmStart:
    """Collects KVzip's scores of some prefills, and gives budgets and scorer of a calibration their first values.

    Args:
        policy: that is calibrated; head_budgets: as it will have them.
        seed: of the entries that are drawn, and of the fit; shown: whether progress is.

    Raises:
        InputError: the policy has no network to be fitted, or measures the split over the modalities by itself.
    """

    def __init__(self, policy: AccKV, head_budgets: HeadBudgets, seed: int = 0, shown: bool = True) -> None:
        if not policy.n_scorer_units:
            message = "fits the scorer's network, which has no units; set model.compression {n_scorer_units: 32}"
            raise InputError(message, field="model.warm_start")
        if policy.focusing:
            message = "gives each modality its budget, which 'focusing' measures; take preset context"
            raise InputError(message, field="model.warm_start")
        self.policy, self.head_budgets, self.shown = policy, head_budgets, shown
        self.kvzip = KVzip(share_heads=policy.share_heads)
        by_head: HeadBudgets = "equal" if head_budgets == "equal" else "joint"
        self.planner = Planner(CompressionConfig(head_budgets=by_head), self.kvzip)
        self.generator = torch.Generator().manual_seed(seed)
        self.samples: list[_Sample] = []
        self.shares: list[Tensor] = []
        """By clip ``[ratios, L, K, 2]``: the share of all that is kept, times layers and heads."""
        self.present: list[Tensor] = []
        """By clip ``[2]``: the share of the entries that is of each modality."""

    def add(self, prefill: Prefill, reconstruction: Sequence[Tensor]) -> None:
        """Measure the clips of a prefill.

        Args:
            reconstruction: of :meth:`acckv.runtime.session.Session.reconstruction`.
        """
        labels = prefill.labels
        seen = [
            replace(one, reconstruction=peak) for one, peak in zip(prefill.observations, reconstruction, strict=True)
        ]
        kept = torch.stack([_kept(self.planner.plan(seen, labels, ratio), seen, labels) for ratio in RATIOS], 1)
        self.shares += list(kept / kept.mean((2, 3), keepdim=True).sum(-1, keepdim=True).clamp_min(1e-12))
        counts = labels.counts().float()
        self.present += list(counts / counts.sum(-1, keepdim=True).clamp_min(1))
        targets = [self._target(layer, one, labels.to(one.keys.device)) for layer, one in enumerate(seen)]
        for row in range(len(counts)):
            self.samples.append(self._sample(seen, targets, labels, row))

    def _target(self, layer: int, seen: Observation, labels: ModalityMap) -> Tensor:
        """``[B, K, N]``: the logarithm of KVzip's scores, standardised in each modality."""
        score = self.kvzip.score(layer, seen, labels).score.clamp_min(1e-12).log()
        return standardise(score, labels).expand(-1, seen.keys.shape[1], -1)

    def _sample(self, seen: Sequence[Observation], targets: Sequence[Tensor], labels: ModalityMap, row: int) -> _Sample:
        media = labels.host.media[row].nonzero().flatten()
        drawn = media[torch.randperm(len(media), generator=self.generator)[:ENTRIES]]
        entries, wanted = [], []
        for one, target in zip(seen, targets, strict=True):
            at = drawn.to(one.keys.device)
            wanted.append(target[row][:, at].cpu())
            entries.append(scaled_entries(one.keys[row][:, at], one.values[row][:, at]).half().cpu())
        modality = labels.host.by_modality[row, 1, drawn].long()
        return _Sample(torch.stack(entries), torch.stack(wanted), modality)

    @torch.no_grad()
    def write(self, weights: CalibratedWeights) -> float:
        """Put what was measured in the weights of a calibration.

        Returns:
            the share of the scores' variance that the scorer explains, of clips that it was not fitted to where there
            are enough; not a number without any.
        """
        self._write_budgets(weights)
        weights.signal_mix[:, SIGNALS.index(self.policy.signal)] = -1.0  # the preset's own signal counts no more
        left_out = self.samples[LEFT_OUT - 1 :: LEFT_OUT]
        fitted = [one for place, one in enumerate(self.samples) if place % LEFT_OUT != LEFT_OUT - 1]
        train, test = _Sample.join(fitted), _Sample.join(left_out or fitted)
        explained, units = [], self.policy.n_scorer_units
        with Progress(
            "fitting the scorer to KVzip's scores", len(train.entries), "layers", shown=self.shown
        ) as progress:
            for layer, entries in enumerate(train.entries):
                network = fit_network(entries.float(), train.targets[layer], train.modality, units, self.generator)
                for name, value in zip(("scorer_hidden", "scorer_bias", "scorer_output"), network, strict=True):
                    getattr(weights, name)[layer] = value
                found = apply_network(*network, test.entries[layer].float(), test.modality)
                wanted = test.targets[layer]
                explained.append(1 - (found - wanted).square().mean() / wanted.square().mean())
                progress.advance()
        return float(torch.stack(explained).mean())

    def _write_budgets(self, weights: CalibratedWeights) -> None:
        shares = torch.stack(self.shares).mean(0) + 0.01  # what got nothing here may get something elsewhere
        present = torch.stack(self.present).mean(0).clamp_min(1e-6)
        of_layer = shares.sum(-1).mean(-1)  # [ratios, L], mean 1
        floor = self.policy.layer_floor
        above = ((of_layer - floor) / (1 - floor)).clamp_min(1e-3)
        _line(above.log(), weights.layer_budget.T)
        by_modality = shares.mean(2)  # [ratios, L, 2]
        split = by_modality / by_modality.sum(-1, keepdim=True) / present
        _line(split.log(), weights.modality_budget.permute(2, 0, 1))
        if self.head_budgets == "learned":
            _line((shares / by_modality[:, :, None]).log(), weights.head_budget.transpose(0, 1))


def _kept(plans: Sequence[LayerPlan], seen: Sequence[Observation], labels: ModalityMap) -> Tensor:
    """``[B, L, K, 2]``: entries of each modality that each head keeps."""
    parts = []
    for plan, one in zip(plans, seen, strict=True):
        gates = plan.log_gates.exp().expand(-1, one.keys.shape[1], -1).cpu()
        parts.append(gates @ labels.host.masks.transpose(1, 2))
    return torch.stack(parts, 1)


def _line(values: Tensor, into: Tensor) -> None:
    """Write the line over log ratio that is nearest to values ``[ratios, ...]``: ``[2, ...]``, its place and slope."""
    places = torch.tensor([log_ratio(ratio) for ratio in RATIOS])
    design = torch.stack([torch.ones_like(places), places], 1)
    into.copy_((torch.linalg.pinv(design) @ values.flatten(1).cpu()).view(2, *values.shape[1:]))


def apply_network(hidden: Tensor, bias: Tensor, output: Tensor, entries: Tensor, modality: Tensor) -> Tensor:
    """Scores ``[K, n]`` of entries ``[K, n, 2 * D]``."""
    by_modality = F.gelu(entries @ hidden + bias[:, None]) @ output
    return by_modality.gather(-1, modality.expand(len(entries), -1)[..., None])[..., 0]


@torch.enable_grad()
def fit_network(
    entries: Tensor, targets: Tensor, modality: Tensor, units: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The networks of a layer's heads that are nearest to their targets in mean square.

    Args:
        entries: ``[K, n, 2 * D]``; targets: ``[K, n]``; modality: int64 ``[n]``, 0 or 1.

    Returns:
        ``[K, 2 * D, U]``, ``[K, U]`` and ``[K, U, 2]``, as of :class:`~acckv.method.weights.CalibratedWeights`.
    """
    heads, count, size = entries.shape
    # Numbers of like size are fitted fastest; the first layer undoes that afterwards.
    mean, deviation = entries.mean(1, keepdim=True), entries.std(1, keepdim=True) + 1e-3
    entries = (entries - mean) / deviation
    hidden = (torch.randn(heads, size, units, generator=generator) / math.sqrt(size)).requires_grad_()
    bias, output = (torch.zeros(heads, *shape, requires_grad=True) for shape in ((units,), (units, 2)))
    optimizer = torch.optim.AdamW([hidden, bias, output], lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
    for _ in range(STEPS):
        drawn = torch.randint(count, (BATCH,), generator=generator)
        found = apply_network(hidden, bias, output, entries[:, drawn], modality[drawn])
        loss = (found - targets[:, drawn]).square().mean(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    hidden, bias, output = hidden.detach(), bias.detach(), output.detach()
    return hidden / deviation.transpose(1, 2), bias - ((mean / deviation) @ hidden)[:, 0], output
