"""No compression: the full cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation
from acckv.policies.base import Policy
from acckv.policies.registry import register_policy


@register_policy("full")
@dataclass(frozen=True)
class Full(Policy):
    """Every entry stays, at any ratio."""

    keeps_all = True
    ranks_by_head = False

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        batch, _, entries = observation.keys.shape[:3]
        return LayerScore(torch.zeros(batch, 1, entries, device=observation.keys.device), None)
