"""Key norm (arXiv 2406.11430): keys of small norm are the ones that attention looks at."""

from __future__ import annotations

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation
from acckv.policies.base import Policy


class KNorm(Policy):
    """Keep the entries whose keys have the smallest L2 norm. Needs no attention.

    The paper leaves the first two layers alone in part of its experiments; here every layer is compressed, as in
    kvpress, so that the budget is the same as that of the other methods in each of them.
    """

    name = "knorm"

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        return LayerScore(self.shared(-observation.keys.float().norm(dim=-1)), None)
