"""KeyDiff (arXiv 2504.15364): keys unlike the mean key."""

from __future__ import annotations

from dataclasses import dataclass

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation, key_diversity
from acckv.policies.base import Policy
from acckv.policies.registry import register_policy


@register_policy("keydiff")
@dataclass(frozen=True)
class KeyDiff(Policy):
    """The entries whose keys are least similar to the mean key of their head (arXiv 2504.15364). Needs no attention."""

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        real = labels.real if labels.is_padded else None
        return LayerScore(self.shared(key_diversity(observation.keys, observation.key_scale, real)), None)
