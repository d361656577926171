"""Key norm (arXiv 2406.11430): keys of small norm are the ones that attention looks at."""

from __future__ import annotations

from dataclasses import dataclass

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation
from acckv.policies.base import Policy
from acckv.policies.registry import register_policy


@register_policy("knorm")
@dataclass(frozen=True)
class KNorm(Policy):
    """The entries whose keys have the smallest L2 norm. Needs no attention.

    Deviation from arXiv 2406.11430: the paper leaves the first two layers alone in part of its experiments; here every
    layer is compressed, as in kvpress, so that the budget is the same as that of the other methods in each of them.
    """

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        return LayerScore(self.shared(-observation.keys.float().norm(dim=-1)), None)
