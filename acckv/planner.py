"""From what a prompt's attention showed to what each layer keeps: score, budget, select, merge."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from acckv.config import CompressionConfig, check_ratio
from acckv.method.budgets import allocate, share_out, split_layer, total_budget
from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerPlan, LayerScore
from acckv.method.scoring import Observation
from acckv.policies import Policy


class Planner:
    """One compressor setting as a function of observations; it knows no model, cache, LoRA or file.

    Args:
        config: when is compressed, and how much is kept.
        policy: how entries are scored and budgets are shared, with its learned weights if it has any.
    """

    def __init__(self, config: CompressionConfig, policy: Policy) -> None:
        self.config, self.policy = config, policy

    def head(self, index: int) -> Planner:
        """The planner of a KV head that holds other entries than the rest, as if its layer had no other head.

        It scores and plans; the budgets of the layers are those of the whole.
        """
        return Planner(self.config, self.policy.head(index))

    def keeps_all(self, ratio: float | None = None) -> bool:
        """Whether nothing would ever be evicted.

        Raises:
            InputError: the ratio is no number from 0 to 1.
        """
        check_ratio(ratio)
        ratio = self.config.ratio if ratio is None else ratio
        if self.policy.keeps_all is not None:
            return self.policy.keeps_all
        return ratio >= 1 and self.config.budget is None

    def scores(self, observations: list[Observation], labels: ModalityMap) -> list[LayerScore]:
        """The scores of every layer's entries (docs/method.md, steps 1 and 2)."""
        return self.policy.scores(observations, labels)

    # ------------------------------------------------------------------ budgets

    def ratio_of(self, labels: ModalityMap, layers: int, ratio: float | None = None) -> float:
        """The ratio that is asked for, or the one that the config's absolute budget comes to.

        Raises:
            InputError: the ratio is no number from 0 to 1.
        """
        check_ratio(ratio)
        if ratio is not None or self.config.budget is None:
            return self.config.ratio if ratio is None else ratio
        counts = labels.counts()
        return effective_ratio(total_budget(1.0, self.config.budget, layers, counts), counts, layers)

    def total(self, labels: ModalityMap, layers: int, ratio: float | None = None) -> Tensor:
        """int64 ``[B]``: entries that all layers together keep of a prompt."""
        absolute = self.config.budget if ratio is None else None
        ratio = self.config.ratio if ratio is None else ratio
        if self.policy.keeps_all:
            ratio, absolute = 1.0, None
        return total_budget(ratio, absolute, layers, labels.counts())

    def layer_budgets(
        self,
        scores: Sequence[LayerScore | None],
        labels: ModalityMap,
        total: Tensor,
        available: Tensor,
        ratio: float,
    ) -> Tensor:
        """Entries that each layer keeps of both modalities together.

        Args:
            scores: one a layer; None where the policy needs none (it is not `cross_layer`).
            total: int64 ``[B]``: entries that all layers together keep.
            available: int64 ``[B, L]``: entries that compete in each layer.

        Returns:
            int64 ``[B, L]``, on the CPU, that sums to `total`.
        """
        return share_out(total, self.policy.layer_shares(scores, labels, total, ratio), available)

    def split(self, layer: int, score: LayerScore, budget: Tensor, labels: ModalityMap, ratio: float) -> Tensor:
        """A layer's whole budget by modality, on the CPU.

        Returns:
            int64 ``[B, 2]`` or ``[B, K, 2]``, or ``[B, 1]`` where the policy takes one top-k over both.
        """
        if score.modality_shares is None:
            return budget[:, None]
        shares = self.policy.modality_shares(layer, score.modality_shares, ratio)
        return split_layer(budget, shares, labels.counts())

    def _soft_budgets(self, scores: list[LayerScore], labels: ModalityMap, total: Tensor, ratio: float) -> Tensor:
        """Real numbers ``[B, L, 2]``, which training differentiates."""
        device = scores[0].score.device
        split = [
            self.policy.modality_shares(layer, score.modality_shares, ratio).to(device)
            for layer, score in enumerate(scores)
            if score.modality_shares is not None
        ]
        layer_shares = self.policy.layer_shares(scores, labels, total, ratio)
        return allocate(
            total.to(device), layer_shares.to(device), torch.stack(split, dim=1), labels.counts().to(device)
        )

    # -------------------------------------------------------------------- plans

    def plan(
        self,
        observations: list[Observation],
        labels: ModalityMap,
        ratio: float | None = None,
        temperature: float | None = None,
    ) -> list[LayerPlan]:
        """The plans of all layers together, since they share one budget.

        Args:
            observations: one a layer.
            ratio: replaces the config's.
            temperature: None for the hard selection that is shipped, above 0 for its differentiable twin.

        Raises:
            InputError: the ratio is no number from 0 to 1.
        """
        layers = len(observations)
        total, ratio = self.total(labels, layers, ratio), self.ratio_of(labels, layers, ratio)
        scores = self.scores(observations, labels)
        if temperature is not None:
            split, plans = self._soft_budgets(scores, labels, total, ratio), []
            for layer, seen in enumerate(observations):
                device = seen.keys.device
                score, budget = scores[layer].to(device), split[:, layer].to(device)
                plans.append(self.policy.plan(layer, score, seen, labels.to(device), budget, temperature))
            return plans
        device = scores[0].score.device
        available = labels.counts().sum(-1, keepdim=True).expand(-1, layers)
        budgets = self.layer_budgets([score.to(device) for score in scores], labels, total, available, ratio)
        return [
            self.compress_layer(layer, seen, labels, budgets[:, layer], ratio, scores[layer])
            for layer, seen in enumerate(observations)
        ]

    def compress_layer(
        self,
        layer: int,
        observation: Observation,
        labels: ModalityMap,
        budget: Tensor,
        ratio: float,
        score: LayerScore | None = None,
    ) -> LayerPlan:
        """The plan of one layer whose budget is settled.

        Args:
            labels: on any device; the plan is on that of the layer's keys.
            budget: int64 ``[B]``, as of :meth:`layer_budgets`.
            ratio: which learned splits depend on.
            score: of the layer, where it is known already.
        """
        device = observation.keys.device
        labels = labels.to(device)
        score = (self.policy.score(layer, observation, labels) if score is None else score).on_host()
        split = self.split(layer, score, budget, labels, ratio).cpu()
        score = LayerScore(score.score.to(device), score.modality_shares)
        return self.policy.plan(layer, score, observation, labels, split)


def effective_ratio(total: Tensor, counts: Tensor, layers: int) -> float:
    """The ratio that an absolute budget comes to; learned budgets depend on it.

    Args:
        total: int64 ``[B]`` entries over all layers; counts: int64 ``[B, 2]`` entries that exist in one.
    """
    return min(float(total.sum()) / max(float(counts.sum()) * layers, 1.0), 1.0)


class Planners:
    """The planners of a compressor: the default one, and that of the lowest ratios where those have their own.

    Args:
        below: ratios below it are planned by `low_ratio`.
    """

    def __init__(self, default: Planner, low_ratio: Planner | None = None, below: float = 0.0) -> None:
        self.default, self.low_ratio, self.below = default, low_ratio, below

    @property
    def config(self) -> CompressionConfig:
        return self.default.config

    @property
    def policy(self) -> Policy:
        return self.default.policy

    def keeps_all(self, ratio: float | None = None) -> bool:
        """Whether nothing would ever be evicted.

        Raises:
            InputError: the ratio is no number from 0 to 1.
        """
        return self.default.keeps_all(ratio)

    def is_low(self, ratio: float) -> bool:
        """Whether a ratio has a planner of its own."""
        return self.low_ratio is not None and ratio < self.below

    def at(self, ratio: float) -> Planner:
        """The planner for `ratio`: the low-ratio one below `below`, else the default."""
        return self.low_ratio if self.low_ratio is not None and self.is_low(ratio) else self.default
