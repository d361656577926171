"""AccKV (arXiv 2511.11106, as summarised), training-free and calibrated."""

from __future__ import annotations

import torch
from torch import Tensor

from acckv.config import CompressionConfig
from acckv.focusing import focus
from acckv.modality import ModalityMap
from acckv.pipeline import LayerScore
from acckv.policies.base import Policy, Rows
from acckv.scoring import Observation, heavy_hitter_score, key_diversity, redundancy, standardise
from acckv.weights import SIGNALS, CalibratedWeights, LayerWeights


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
        members, learned = labels.by_modality, self.weights
        weights = None if learned is None else learned.layer(layer, observation.keys.device)
        signals = self._signals(weights, observation, labels)
        shares = self._measured_shares(signals, labels)
        base = signals[self.config.signal]
        if weights is None or learned is None:
            return LayerScore(standardise(self.shared(base), members), shares)

        gain = torch.einsum("km,bmn->bkn", weights.modality_gain.exp(), members.to(base.dtype))
        mix = weights.signal_mix
        measured = {name: standardise(self.shared(signal), members) for name, signal in signals.items()}
        score = self.shared(gain) * measured[self.config.signal]
        for index, name in enumerate(SIGNALS[:3]):
            if name in measured:
                score = score + mix[index] * measured[name]
        saliency = learned.saliency_score(layer, observation.keys, observation.values, labels)
        # One selection for all heads sees all heads: a sum, so that the scorer is linear in the whole (key, value).
        saliency = saliency.sum(dim=1, keepdim=True) if self.config.share_heads else saliency
        # Never less than unit deviation: training would else meet the gates' temperature by scores that grow flat.
        score = standardise(score + (1 + mix[3]) * saliency, members, widest=1.0)
        if self.config.neighbours:
            held = redundancy(score, observation.values, members, self.config.neighbours)
            loss = torch.einsum("m,bmn->bn", weights.redundancy, members.to(score.dtype))[:, None] * held
            score = standardise(score - loss, members, widest=1.0)
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
            signals["key_diversity"] = key_diversity(observation.keys, labels.real)
        if weights is not None and weights.probe_queries.shape[1]:
            signals["probe"] = _probe_attention(weights.probe_queries, observation)
        return signals

    def _measured_shares(self, signals: dict[str, Tensor], labels: ModalityMap) -> Tensor:
        if self.config.focusing:
            return focus(signals["attention"], labels.by_modality)
        counts = labels.counts().float()
        return counts / counts.sum(-1, keepdim=True).clamp_min(1)


def _probe_attention(queries: Tensor, observation: Observation) -> Tensor:
    """Attention of learned queries ``[Hq, P, D]`` to every entry, as the rows of a probe prompt would give it."""
    keys = observation.keys
    groups = queries.shape[0] // keys.shape[1]
    by_head = queries.reshape(keys.shape[1], -1, keys.shape[-1]).to(keys.dtype)
    logits = (by_head @ keys.transpose(-1, -2)).float() * observation.scaling
    hidden = ~observation.real[:, None, None]
    return logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(-1).sum(2) / groups
