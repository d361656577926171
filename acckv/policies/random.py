"""A random choice: the baseline that redundant content makes strong."""

from __future__ import annotations

import torch

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation
from acckv.policies.base import Policy


class Random(Policy):
    """Keep a uniform random subset, drawn by (seed, layer): the same entries at every call."""

    name = "random"

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + layer)
        shape = observation.keys.shape[:3]
        return LayerScore(
            self.shared(torch.rand(shape, generator=generator, device="cpu")).to(observation.keys.device), None
        )
