"""No compression: the full cache."""

from __future__ import annotations

import torch

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation
from acckv.policies.base import Policy


class Full(Policy):
    """Keep everything, at any ratio."""

    name = "full"
    keeps_all = True

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        batch, _, entries = observation.keys.shape[:3]
        return LayerScore(torch.zeros(batch, 1, entries, device=observation.keys.device), None)
