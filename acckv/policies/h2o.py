"""H2O (arXiv 2306.14048): heavy hitters of accumulated attention."""

from __future__ import annotations

from dataclasses import dataclass

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation, heavy_hitter_score
from acckv.policies.base import Policy
from acckv.policies.registry import register_policy


@register_policy("h2o")
@dataclass(frozen=True)
class H2O(Policy):
    """The entries that received most attention from all queries of the prompt.

    Deviations from arXiv 2306.14048: the cache is compressed once, after the prompt, and not at every decoding step;
    the paper's recent tokens are text here, which is kept anyway.
    """

    queries = "all"

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        return LayerScore(self.shared(heavy_hitter_score(observation)), None)
