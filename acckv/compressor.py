"""KVCompressor: the options, the learned weights and the pipeline, saved and loaded as one small folder."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from acckv.config import CompressionConfig, LoraScope, check_ratio
from acckv.data.calibration_record import CalibrationRecord
from acckv.errors import InputError
from acckv.method.budgets import allocate, share_out, split_layer, total_budget
from acckv.method.modality import ModalityMap
from acckv.method.plan import AlignmentRule, LayerPlan, LayerScore, LogGates, MergeRule, hard, plan_layer, soft
from acckv.method.scoring import Observation
from acckv.method.weights import CalibratedWeights, LayerWeights
from acckv.policies import build_policy
from acckv.runtime.lora import LoraWeights

if TYPE_CHECKING:
    from acckv.runtime.session import Session


class KVCompressor(nn.Module):
    """Compress the audio and video entries of an AV-LLM's KV cache.

    ``with compressor(model): model.generate(...)`` is all that inference needs; the model is untouched on exit.

    Args:
        config: the options.
        weights: what calibration learned, or None for the training-free policy of the config.
        lora: the adapter that goes with the weights, or None.
        lora_scope: 'after' adapts only tokens after compression, 'all' the prompt too.
        base: where the weights belong: ``{"name", "layers", "query_heads", "kv_heads", "head_size"}``.
        source: the export it was loaded from, for messages.
        tight: what compresses at ratios below `tight_below`, with weights and an adapter of its own, or None.
        calibration: what the weights were calibrated on, for the export; None where that is not known.

    Raises:
        InputError: there is a `tight`, and the adapters act on the prompt, which is run before its ratio is known.
    """

    def __init__(
        self,
        config: CompressionConfig | None = None,
        weights: CalibratedWeights | None = None,
        lora: LoraWeights | None = None,
        lora_scope: LoraScope = "after",
        base: dict[str, Any] | None = None,
        source: str | None = None,
        tight: KVCompressor | None = None,
        tight_below: float = 0.0,
        calibration: CalibrationRecord | None = None,
    ) -> None:
        super().__init__()
        self.config = config or CompressionConfig()
        self.weights = weights
        self.lora = lora
        self.lora_scope: LoraScope = lora_scope
        self.base = base
        self.source = source
        if tight is not None and lora_scope == "all":
            raise InputError("is 'all', and the tightest ratios have an adapter of their own", field="lora_scope")
        self.tight, self.tight_below = tight, tight_below
        self.calibration = calibration
        self.policy = build_policy(self.config, weights)

    def __call__(self, model: Any, processor: Any = None, **options: Any) -> Session:  # type: ignore[override]
        """A session that compresses `model`'s cache while its context is open.

        Args:
            model: a loaded AV-LLM of a supported family.
            processor: needed only where a probe prompt must be tokenised (`when: context` with observed attention).
        """
        from acckv.runtime.session import Session

        return Session(self, model, processor, **options)

    @property
    def name(self) -> str:
        return "acckv-calibrated" if self.weights is not None else self.config.policy

    def with_ratio(self, ratio: float) -> KVCompressor:
        """The same weights at another ratio."""
        config = dataclasses.replace(self.config, ratio=ratio, budget=None)
        parts = self.weights, self.lora, self.lora_scope, self.base, self.source, self.tight, self.tight_below
        return KVCompressor(config, *parts, self.calibration)

    def is_tight(self, ratio: float) -> bool:
        """Whether a ratio has weights and an adapter of its own."""
        return self.tight is not None and ratio < self.tight_below

    def at(self, ratio: float) -> KVCompressor:
        """What compresses at a ratio."""
        if self.tight is None or not self.is_tight(ratio):
            return self
        return KVCompressor(self.config, self.tight.weights, self.tight.lora)

    def settle(self, below: float) -> None:
        """Keep a copy of the weights as they are now for ratios below `below`, whatever becomes of these."""
        self.tight = KVCompressor(self.config, copy.deepcopy(self.weights)).requires_grad_(False)
        self.tight_below = below

    def head(self, index: int) -> KVCompressor:
        """What a KV head that holds other entries than the rest is compressed with, as if the layer had no other.

        It serves to score and to plan; the budgets of the layers are settled by the whole.
        """
        if self.weights is None:
            return self
        return KVCompressor(self.config, self.weights.head(index))

    def keeps_all(self, ratio: float | None = None) -> bool:
        """Whether nothing would ever be evicted.

        Raises:
            InputError: the ratio is no number from 0 to 1.
        """
        check_ratio(ratio)
        ratio = self.config.ratio if ratio is None else ratio
        return self.config.policy == "full" or (ratio >= 1 and self.config.budget is None)

    def scores(self, observations: list[Observation], labels: ModalityMap) -> list[LayerScore]:
        """Score every layer's entries (METHOD steps 1 and 2)."""
        return self.policy.scores(observations, labels)

    def budgets(
        self, scores: list[LayerScore], labels: ModalityMap, ratio: float | None = None, whole: bool = True
    ) -> Tensor:
        """Entries that each layer keeps.

        Args:
            ratio: replaces the config's ratio and budget.
            whole: exact whole numbers; otherwise the real numbers that training differentiates.

        Returns:
            ``[B, L, 2]`` by modality, ``[B, L, K, 2]`` where each head has its own split, or ``[B, L, 1]`` where the
            policy takes one top-k over both. Whole numbers are on the CPU.
        """
        counts, layers, device = labels.counts(), len(scores), scores[0].score.device
        scores = [score.to(device) for score in scores]
        absolute = self.config.budget if ratio is None else None
        ratio = self.ratio_of(labels, layers, ratio)
        if self.config.policy == "full":
            ratio, absolute = 1.0, None
        total = total_budget(ratio, absolute, layers, counts)
        layer_shares = self.layer_shares(scores, labels, total, ratio)
        if not whole:
            shares = [self.modality_shares(layer, score, ratio) for layer, score in enumerate(scores)]
            measured = [share.to(device) for share in shares if share is not None and share.ndim == 2]
            if measured:
                total, layer_shares, counts = (part.to(device) for part in (total, layer_shares, counts))
                return allocate(total, layer_shares, torch.stack(measured, dim=1), counts)
        by_layer = share_out(total, layer_shares, counts.sum(-1, keepdim=True).expand(-1, layers))
        return torch.stack(
            [self.split(layer, score, by_layer[:, layer], counts, ratio) for layer, score in enumerate(scores)], dim=1
        )

    def ratio_of(self, labels: ModalityMap, layers: int, ratio: float | None = None) -> float:
        """The ratio that is asked for, or what the config's absolute budget comes to.

        Raises:
            InputError: the ratio is no number from 0 to 1.
        """
        check_ratio(ratio)
        if ratio is not None or self.config.budget is None:
            return self.config.ratio if ratio is None else ratio
        counts = labels.counts()
        return self.effective_ratio(total_budget(1.0, self.config.budget, layers, counts), counts, layers)

    @staticmethod
    def effective_ratio(total: Tensor, counts: Tensor, layers: int) -> float:
        """The ratio that an absolute budget comes to; learned budgets depend on it.

        Args:
            total: int64 ``[B]`` entries over all layers; counts: int64 ``[B, 2]`` entries that exist in one.
        """
        return min(float(total.sum()) / max(float(counts.sum()) * layers, 1.0), 1.0)

    def layer_shares(
        self, scores: Sequence[LayerScore | None], labels: ModalityMap, total: Tensor, ratio: float
    ) -> Tensor:
        """Relative budget of each layer ``[L]`` or ``[B, L]``, learned or the policy's.

        Args:
            scores: one a layer; None where the policy needs none (it is not `cross_layer`).
            total: int64 ``[B]``, on the CPU: entries that all layers together keep.
        """
        if self.weights is not None:
            return self.weights.layer_shares(ratio, self.config.layer_floor)
        return self.policy.layer_shares(scores, labels, total)

    def modality_shares(self, layer: int, score: LayerScore, ratio: float) -> Tensor | None:
        """The split of a layer's budget ``[B, 2]`` or ``[B, K, 2]``, as measured and as learned.

        None stands for one top-k over both modalities.
        """
        if score.modality_shares is None or self.weights is None:
            return score.modality_shares
        return self.weights.modality_shares(layer, score.modality_shares, ratio)

    def split(self, layer: int, score: LayerScore, budget: Tensor, counts: Tensor, ratio: float) -> Tensor:
        """A layer's whole budget by modality.

        Args:
            budget: int64 ``[B]``; counts: int64 ``[B, 2]`` entries that exist.

        Returns:
            int64 ``[B, 2]`` or ``[B, K, 2]``, or ``[B, 1]`` where the policy takes one top-k over both; on the CPU.
        """
        shares = self.modality_shares(layer, score, ratio)
        return budget[:, None] if shares is None else split_layer(budget, shares, counts)

    def plan(
        self,
        scores: list[LayerScore],
        observations: list[Observation],
        labels: ModalityMap,
        ratio: float | None = None,
        temperature: float | None = None,
    ) -> list[LayerPlan]:
        """Decide for all layers together, since they share one budget.

        Args:
            scores, observations: one a layer.
            ratio: replaces the config's.
            temperature: None for the hard selection that is shipped, above 0 for its differentiable twin.
        """
        if temperature is None:
            scores = [score.on_host() for score in scores]
        budgets = self.budgets(scores, labels, ratio, whole=temperature is None)
        return [
            self.plan_one(layer, scores[layer], seen, labels, budgets[:, layer], temperature)
            for layer, seen in enumerate(observations)
        ]

    def plan_one(
        self,
        layer: int,
        score: LayerScore,
        observation: Observation,
        labels: ModalityMap,
        budget: Tensor,
        temperature: float | None = None,
    ) -> LayerPlan:
        """Decide for one layer whose budget is settled.

        Args:
            score, labels, budget: on any device; the plan is on that of the layer's keys.
            budget: by modality, as :meth:`split` gives it.
        """
        device = observation.keys.device
        labels = labels.to(device)
        if temperature is None:
            to_gates: LogGates = hard
            score, budget = LayerScore(score.score.to(device), score.on_host().modality_shares), budget.cpu()
        else:
            to_gates, score, budget = soft(temperature), score.to(device), budget.to(device)
        weights = None if self.weights is None else self.weights.layer(layer, device)
        rules = self._merge_rule(weights), self._alignment_rule(weights, temperature or 0.0)
        plan = plan_layer(score, observation, labels, budget, to_gates, *rules)
        if temperature is None:  # every head of a row keeps the same number
            by_row = budget.sum(-1)
            plan = replace(plan, kept=labels.host.text.sum(-1) + (by_row if by_row.ndim == 1 else by_row[:, 0]))
        return self.policy.merge(plan, observation.keys, observation.values, labels)

    def _merge_rule(self, weights: LayerWeights | None) -> MergeRule | None:
        if self.config.policy != "acckv" or not self.config.integration:
            return None
        return MergeRule() if weights is None else MergeRule(weights.merge_bias, weights.merge_gain)

    def _alignment_rule(self, weights: LayerWeights | None, temperature: float) -> AlignmentRule | None:
        if self.config.policy != "acckv":
            return None
        threshold, drop = self.config.alignment_threshold, self.config.cross_calibration
        if weights is None:
            return AlignmentRule(threshold) if drop else None
        # Cosines span 2, standardised scores about 6: a third of the temperature is as soft for them.
        learned = threshold + weights.alignment_threshold if drop else threshold
        return AlignmentRule(learned, weights.alignment_weight, drop, softness=temperature / 3)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors, adapter/ and the model card; see :mod:`acckv.export`."""
        from acckv.export import save

        save(self, Path(folder))

    @classmethod
    def from_pretrained(cls, name: str | Path, **options: Any) -> KVCompressor:
        """Load an export from a folder or hub id; keyword arguments override its options (such as `ratio`).

        Raises:
            InputError: a file is missing, truncated or of an unknown format version.
        """
        from acckv.export import load

        return load(name, options)
