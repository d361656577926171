"""AccKV (arXiv 2511.11106, as summarised), training-free and calibrated."""

from __future__ import annotations

import torch
from torch import Tensor

from acckv.config import CompressionConfig
from acckv.method.budgets import focus
from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import (
    Observation,
    heavy_hitter_score,
    key_diversity,
    redundancy,
    standardise,
    standardised_sum,
)
from acckv.method.weights import CalibratedWeights, LayerWeights
from acckv.policies.base import Policy, Rows


class AccKV(Policy):
    """Redistributed heavy hitters (or diverse keys) of each modality, the budget split by adaptive focusing.

    With `weights`, every hand-set number gets its learned residual; at zero they change nothing.
    """

    name = "acckv"

    def __init__(self, config: CompressionConfig, weights: CalibratedWeights | None = None) -> None:
        super().__init__(config)
        self.weights = weights

    @property
    def rows(self) -> Rows:  # type: ignore[override]
        return "text" if self.config.observes_attention else "none"

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        learned = self.weights
        weights = None if learned is None else learned.layer(layer, observation.keys.device)
        signals = self._signals(weights, observation, labels)
        shares = self._measured_shares(signals, labels)
        if weights is None or learned is None:
            return LayerScore(standardise(self.shared(signals[self.config.signal]), labels), shares)

        heard = weights.signal_weights(tuple(signals), self.config.signal, self.config.share_heads)
        score = standardised_sum([self.shared(signal) for signal in signals.values()], heard, labels)
        saliency = learned.saliency_score(layer, observation.keys, observation.values, labels)
        # One selection for all heads sees all heads: a sum, so that the scorer is linear in the whole (key, value).
        saliency = saliency.sum(dim=1, keepdim=True) if self.config.share_heads else saliency
        # Never less than unit deviation: training would else meet the gates' temperature by scores that grow flat.
        score = standardise(torch.addcmul(score, saliency, weights.saliency_weight), labels, widest=1.0)
        if self.config.neighbours:
            held = redundancy(score, observation.values, labels, self.config.neighbours)
            price = (weights.redundancy @ labels.masks)[:, None]
            score = standardise(torch.addcmul(score, price, held, value=-1), labels, widest=1.0)
        return LayerScore(score, shares)

    def _signals(
        self, weights: LayerWeights | None, observation: Observation, labels: ModalityMap
    ) -> dict[str, Tensor]:
        """Every score that the config or the learned mix reads, by name, each ``[B, K, N]``."""
        signals = {}
        if self.config.observes_attention:
            gamma: Tensor | float = float(self.config.redistribution)
            if weights is not None:
                gamma = gamma + weights.redistribution
            signals["attention"] = heavy_hitter_score(observation, gamma)
        if weights is not None or self.config.signal == "key_diversity":
            real = labels.real if labels.is_padded else None
            signals["key_diversity"] = key_diversity(observation.keys, observation.key_scale, real)
        if weights is not None and weights.probe_queries.shape[1]:
            signals["probe"] = _probe_attention(weights.scaled_probes(observation.scaling), observation)
        return signals

    def _measured_shares(self, signals: dict[str, Tensor], labels: ModalityMap) -> Tensor:
        if self.config.focusing:
            return focus(signals["attention"], labels.by_modality)
        counts = labels.counts().float()  # known on the CPU, where budgets are made
        return counts / counts.sum(-1, keepdim=True).clamp_min(1)


def _probe_attention(queries: Tensor, observation: Observation) -> Tensor:
    """Attention of learned queries ``[Hq, P, D]``, scaled, to every entry, as rows of a probe prompt would give it."""
    keys = observation.keys
    groups = queries.shape[0] // keys.shape[1]
    by_head = queries.reshape(keys.shape[1], -1, keys.shape[-1]).to(keys.dtype)
    logits = by_head @ keys.transpose(-1, -2)
    if not bool(observation.real.all()):
        hidden = ~observation.real[:, None, None].to(logits.device)
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    return logits.softmax(-1, dtype=torch.float32).sum(2) / groups
