"""AccKV (arXiv 2511.11106, as summarised), training-free and calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from acckv.config import from_options
from acckv.errors import InputError
from acckv.method.budgets import focus
from acckv.method.modality import ModalityMap
from acckv.method.plan import AlignmentRule, LayerInputs, LayerPlan, LayerScore, MergeRule, plan_layer
from acckv.method.scoring import (
    Observation,
    heavy_hitter_score,
    key_diversity,
    redundancy,
    standardise,
    standardised_sum,
)
from acckv.method.weights import CalibratedWeights, LayerWeights
from acckv.policies.base import Policy, Queries
from acckv.policies.registry import register_policy

Signal = Literal["attention", "key_diversity"]
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "context": {"signal": "key_diversity", "focusing": False, "integration": False, "cross_calibration": False},
}


@register_policy("acckv")
@dataclass(frozen=True)
class AccKV(Policy):
    """Redistributed heavy hitters (or diverse keys) of each modality, the budget split by adaptive focusing.

    The defaults are the paper's AccKV. Deviations from arXiv 2511.11106: text is always kept; the budgets of the layers
    are exact; the paper observes the question, here a probe prompt stands in for it where none has been seen yet.
    """

    signal: Signal = field(
        default="attention",
        metadata={
            "help": "Heavy-hitter signal: 'attention' of the observed queries or 'key_diversity'.",
            "choices": get_args(Signal),
        },
    )
    redistribution: bool = field(
        default=True, metadata={"help": "Step 1: undo the bias of causal attention to early columns."}
    )
    focusing: bool = field(
        default=True, metadata={"help": "Step 2: split a layer's budget by the attention each modality gets."}
    )
    integration: bool = field(
        default=True, metadata={"help": "Step 3: average what a modality loses into one merged entry."}
    )
    cross_calibration: bool = field(
        default=True, metadata={"help": "Step 4: drop low-priority entries that match no kept key."}
    )
    alignment_threshold: float = field(
        default=0.6,
        metadata={"help": "Step 4: least mean cosine similarity (paper: 0.9 or 0.6).", "low": -1, "high": 1},
    )
    layer_floor: float = field(
        default=0.1,
        metadata={
            "help": "Calibrated: least share of the uniform budget that a layer keeps; 0 to 1.",
            "low": 0,
            "high": 1,
        },
    )
    n_probe_queries: int = field(
        default=4, metadata={"help": "Calibrated: learned probe queries a query head; 0 to 16.", "low": 0, "high": 16}
    )
    n_scorer_units: int = field(
        default=0,
        metadata={
            "help": "Calibrated: hidden units of the scorer's network a KV head, beside its linear part; 0 to 1024.",
            "low": 0,
            "high": 1024,
        },
    )
    n_neighbours: int = field(
        default=8,
        metadata={
            "help": "Calibrated: entries on either side that a learned score competes with; 0 to 64.",
            "low": 0,
            "high": 64,
        },
    )

    @classmethod
    def preset(cls, name: str, **options: Any) -> AccKV:
        """The options of a named preset; keyword arguments override it.

        ``paper`` is AccKV as published. ``context`` is its variant for compression before the question: key diversity
        as heavy-hitter signal, since no query of a question exists yet, no split by attention and no merging.

        Raises:
            InputError: an unknown preset or option.
        """
        if name not in PRESETS:
            raise InputError(f"{name!r} is not one of {', '.join(PRESETS)}", field="preset")
        return from_options(cls, {**PRESETS[name], **options}, cls.name)

    @property
    def observes_attention(self) -> bool:
        """Whether it needs the attention of observed queries (a probe prompt in `when: context`)."""
        return self.signal == "attention" or self.focusing

    @property
    def queries(self) -> Queries:  # type: ignore[override]
        return "text" if self.observes_attention else "none"

    def new_weights(self, layers: int, kv_heads: int, query_heads: int, head_size: int) -> CalibratedWeights:
        sizes = layers, kv_heads, query_heads, head_size
        return CalibratedWeights(*sizes, self.n_probe_queries, self.n_scorer_units)

    def calibrated(self, weights: CalibratedWeights) -> CalibratedAccKV:
        return CalibratedAccKV(**self.options, weights=weights)

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        signals = self._signals(observation, labels, float(self.redistribution))
        score = standardise(self.shared(signals[self.signal]), labels)
        return LayerScore(score, self._measured_shares(signals, labels))

    def plan(self, given: LayerInputs) -> LayerPlan:
        merge = MergeRule() if self.integration else None
        align = AlignmentRule(self.alignment_threshold) if self.cross_calibration else None
        return plan_layer(given, merge, align)

    def _signals(self, observation: Observation, labels: ModalityMap, gamma: Tensor | float) -> dict[str, Tensor]:
        """The scores that the options ask for, by name, each ``[B, K, N]``.

        Args:
            gamma: exponent of the redistribution.
        """
        signals = {}
        if self.observes_attention:
            signals["attention"] = heavy_hitter_score(observation, gamma)
        if self.signal == "key_diversity":
            signals["key_diversity"] = _key_diversity(observation, labels)
        return signals

    def _measured_shares(self, signals: dict[str, Tensor], labels: ModalityMap) -> Tensor:
        if self.focusing:
            return focus(signals["attention"], labels.by_modality)
        counts = labels.counts().float()  # known on the CPU, where budgets are made
        return counts / counts.sum(-1, keepdim=True).clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class CalibratedAccKV(AccKV):
    """AccKV with a learned residual on every hand-set number; weights of zero change nothing."""

    weights: CalibratedWeights

    name: ClassVar[str] = "acckv-calibrated"
    learns_heads: ClassVar[bool] = True

    def head(self, index: int) -> CalibratedAccKV:
        return replace(self, weights=self.weights.head(index))

    def layer_shares(
        self, scores: Sequence[LayerScore | None], labels: ModalityMap, total: Tensor, ratio: float
    ) -> Tensor:
        return self.weights.layer_shares(ratio, self.layer_floor)

    def modality_shares(self, layer: int, measured: Tensor, ratio: float) -> Tensor:
        return self.weights.modality_shares(layer, measured, ratio)

    def head_shares(self, layer: int, shares: Tensor, ratio: float) -> Tensor:
        return self.weights.head_shares(layer, shares, ratio)

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        weights = self.weights.layer(layer, observation.keys.device)
        signals = self._all_signals(weights, observation, labels)
        mix = weights.signal_weights(tuple(signals), self.signal, self.share_heads)
        score = standardised_sum([self.shared(signal) for signal in signals.values()], mix, labels)
        saliency = self.weights.saliency_score(layer, observation.keys, observation.values, labels)
        # One selection for all heads sees all heads: a sum, so that the scorer is linear in the whole (key, value).
        saliency = saliency.sum(dim=1, keepdim=True) if self.share_heads else saliency
        # Never less than unit deviation: training would else meet the gates' temperature by scores that grow flat.
        score = standardise(torch.addcmul(score, saliency, weights.saliency_weight), labels, widest=1.0)
        if self.n_neighbours:
            held = redundancy(score, observation.values, labels, self.n_neighbours)
            price = (weights.redundancy @ labels.masks)[:, None]
            score = standardise(torch.addcmul(score, price, held, value=-1), labels, widest=1.0)
        return LayerScore(score, self._measured_shares(signals, labels))

    def plan(self, given: LayerInputs) -> LayerPlan:
        weights = self.weights.layer(given.layer, given.observation.keys.device)
        merge = MergeRule(weights.merge_bias, weights.merge_gain) if self.integration else None
        threshold: Tensor | float = self.alignment_threshold
        if self.cross_calibration:
            threshold = threshold + weights.alignment_threshold
        # Cosines span 2, standardised scores about 6: a third of the temperature is as soft for them.
        softness = (given.temperature or 0.0) / 3
        align = AlignmentRule(threshold, weights.alignment_weight, self.cross_calibration, softness)
        return plan_layer(given, merge, align)

    def _all_signals(self, weights: LayerWeights, observation: Observation, labels: ModalityMap) -> dict[str, Tensor]:
        """The scores that the learned mix reads, by name, each ``[B, K, N]``."""
        signals = self._signals(observation, labels, float(self.redistribution) + weights.redistribution)
        if "key_diversity" not in signals:
            signals["key_diversity"] = _key_diversity(observation, labels)
        if weights.probe_queries.shape[1]:
            signals["probe"] = _probe_attention(weights.scaled_probes(observation.scaling), observation)
        return signals


def _key_diversity(observation: Observation, labels: ModalityMap) -> Tensor:
    return key_diversity(observation.keys, observation.key_scale, labels.real if labels.is_padded else None)


def _probe_attention(queries: Tensor, observation: Observation) -> Tensor:
    """Attention of learned queries ``[Hq, P, D]``, scaled, to every entry, as from a probe prompt."""
    keys = observation.keys
    groups = queries.shape[0] // keys.shape[1]
    by_head = queries.reshape(keys.shape[1], -1, keys.shape[-1]).to(keys.dtype)
    logits = by_head @ keys.transpose(-1, -2)
    if not bool(observation.real.all()):
        hidden = ~observation.real[:, None, None].to(logits.device)
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
    return logits.softmax(-1, dtype=torch.float32).sum(2) / groups
