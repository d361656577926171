"""A random choice: the baseline that redundant content makes strong."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation
from acckv.policies.base import Policy
from acckv.policies.registry import register_policy


@register_policy("random")
@dataclass(frozen=True)
class Random(Policy):
    """A uniform random subset, drawn by (seed, layer): the same entries at every call."""

    seed: int | None = field(
        default=None, metadata={"help": "Seed of the draw; none is that of the run, or 0.", "low": 0}
    )

    def seeded(self, seed: int) -> Random:
        return replace(self, seed=seed) if self.seed is None else self

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        generator = torch.Generator().manual_seed((self.seed or 0) * 1_000_003 + layer)
        drawn = torch.rand(observation.keys.shape[:3], generator=generator, device="cpu")
        return LayerScore(self.shared(drawn).to(observation.keys.device), None)
