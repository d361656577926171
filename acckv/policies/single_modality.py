"""Controls of an evaluation: caches from which one modality is gone altogether."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from acckv.errors import InputError
from acckv.method.modality import COMPRESSED, Modality, ModalityMap
from acckv.method.plan import LayerInputs, LayerPlan, LayerScore
from acckv.method.scoring import Observation
from acckv.policies.base import Policy


@dataclass(frozen=True)
class EvictedModality(Policy):
    """Every entry of one modality evicted and all others kept, in every layer, whatever the ratio.

    What is then still answered right needs only the other modality (or no media at all).

    Args:
        modality: VIDEO or AUDIO.

    Raises:
        InputError: a modality that is never compressed.
    """

    modality: Modality

    name = "evicted_modality"
    keeps_all = False
    ranks_by_head = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.modality not in COMPRESSED:
            raise InputError(f"{self.modality.name.lower()} is neither video nor audio", field="modality")

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        return LayerScore((labels.labels != self.modality).float()[:, None], None)

    def plan(self, given: LayerInputs) -> LayerPlan:
        """The plan that keeps text and the other modality; the budget counts for nothing."""
        labels, keys, values = given.labels, given.observation.keys, given.observation.values
        gates = torch.zeros(labels.labels.shape, device=labels.labels.device)
        gates = gates.masked_fill((labels.labels == self.modality) | ~labels.real, -torch.inf)[:, None]
        return LayerPlan(gates, keys[:, :, :0], values[:, :, :0], gates.new_zeros(*keys.shape[:2], 0))
