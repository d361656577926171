"""FastV (arXiv 2403.06764): after layer K, only the entries that layer K's last token attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation, heavy_hitter_score
from acckv.policies.base import Policy
from acckv.policies.registry import register_policy


@register_policy("fastv")
@dataclass(frozen=True)
class FastV(Policy):
    """One ranking for all layers and heads: attention of the last token in layer K, `agg_layer`.

    The paper speaks of the attention from all tokens, its code takes the last token's; this follows the code.

    Deviations from arXiv 2403.06764: FastV prunes the hidden states while the prompt runs, here the cache is evicted
    afterwards. In FastV the first K layers keep everything, whatever that costs; here all methods hold the same number
    of entries, so the first K layers keep everything as long as that is at most half of the total, and share that half
    evenly where it is not. The other layers share the rest evenly.
    """

    agg_layer: int = field(
        default=2,
        metadata={"help": "First layers that are not pruned (K); the last of them ranks the entries.", "low": 1},
    )

    queries = "window"
    cross_layer = True
    ranks_by_head = False

    def scores(self, observations: list[Observation], labels: ModalityMap) -> list[LayerScore]:
        layer = min(self.agg_layer, len(observations)) - 1
        seen = observations[layer]
        return [self.score(layer, seen, labels.to(seen.keys.device))] * len(observations)

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        last = torch.zeros_like(observation.query_valid)
        last[:, -1:] = True
        return LayerScore(heavy_hitter_score(observation.select(last)).mean(dim=1, keepdim=True), None)

    def layer_shares(
        self, scores: Sequence[LayerScore | None], labels: ModalityMap, total: Tensor, ratio: float
    ) -> Tensor:
        layers, dense = len(scores), min(self.agg_layer, len(scores))
        below = torch.minimum(labels.counts().sum(-1).float(), total.float() / (2 * dense))[:, None]
        above = (total.float()[:, None] - dense * below) / max(layers - dense, 1)
        return torch.where(torch.arange(layers, device=total.device) < dense, below, above)
