"""KeyDiff (arXiv 2504.15364): keys unlike the mean key."""

from __future__ import annotations

from acckv.modality import ModalityMap
from acckv.pipeline import LayerScore
from acckv.policies.base import Policy
from acckv.scoring import Observation, key_diversity


class KeyDiff(Policy):
    """Keep the entries whose keys are least similar to the mean key of their head. Needs no attention."""

    name = "keydiff"

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        real = labels.real if labels.is_padded else None
        return LayerScore(self.shared(key_diversity(observation.keys, observation.key_scale, real)), None)
