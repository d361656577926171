"""H2O (arXiv 2306.14048): heavy hitters of accumulated attention."""

from __future__ import annotations

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation, heavy_hitter_score
from acckv.policies.base import Policy


class H2O(Policy):
    """Keep the entries that received most attention from all rows of the prompt."""

    name = "h2o"
    rows = "all"

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        return LayerScore(self.shared(heavy_hitter_score(observation)), None)
