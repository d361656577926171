"""MadaKV (arXiv 2506.15724, as summarised; no code was published): each head keeps more of the modality it prefers."""

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


@register_policy("madakv")
@dataclass(frozen=True)
class MadaKV(Policy):
    """Importance by the attention of the last `window_size` queries (the paper's proxy tokens).

    Preference adaptation: a head's budget is split over the modalities by the importance that each collects in it.
    Compression compensation: a layer asks for as many entries as cover `theta` of each modality's importance, averaged
    over its heads.

    Deviations from arXiv 2506.15724: the two modalities are video and audio, not image and text, since text is always
    kept. The paper pays what a layer asks beyond its budget out of the layers after it, one layer at a time, which at
    small budgets leaves them nothing; here all layers get the same fraction of what they ask for, which keeps the sum
    exact. Theta is not given in what is public.
    """

    window_size: int = field(
        default=32, metadata={"help": "Observed queries at the end of what was prefilled.", "low": 1}
    )
    theta: float = field(
        default=0.9,
        metadata={"help": "Share of a modality's attention that a layer asks for; 0 to 1.", "low": 0, "high": 1},
    )

    queries = "window"
    cross_layer = True

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        importance = self.shared(heavy_hitter_score(observation))
        preference = torch.einsum("bkn,bmn->bkm", importance, labels.by_modality.to(importance.dtype))
        smallest = torch.finfo(preference.dtype).tiny
        return LayerScore(importance, preference / preference.sum(-1, keepdim=True).clamp_min(smallest))

    def layer_shares(
        self, scores: Sequence[LayerScore | None], labels: ModalityMap, total: Tensor, ratio: float
    ) -> Tensor:
        measured = [score.score for score in scores if score is not None]
        return torch.stack([self._demand(score, labels.by_modality) for score in measured], dim=1)

    def _demand(self, importance: Tensor, members: Tensor) -> Tensor:
        """Entries that cover `theta` of each modality's importance, mean over heads: ``[B]``."""
        by_modality = (importance[:, :, None] * members[:, None]).double()
        falling = by_modality.sort(dim=-1, descending=True).values
        before = falling.cumsum(-1) - falling
        needed = (before < self.theta * falling.sum(-1, keepdim=True)) & (falling > 0)
        return needed.sum((-1, -2)).float().mean(-1)
