"""Controls of an evaluation: caches from which one modality is gone altogether."""

from __future__ import annotations

import torch

from acckv.config import CompressionConfig, When
from acckv.errors import InputError
from acckv.method.modality import COMPRESSED, Modality, ModalityMap
from acckv.method.plan import LayerPlan, LayerScore
from acckv.method.scoring import Observation
from acckv.policies.base import Policy


class EvictedModality(Policy):
    """Evict every entry of one modality and keep all others, in every layer, whatever the ratio.

    What is then still answered right needs only the other modality (or no media at all).

    Args:
        modality: VIDEO or AUDIO.
        when: as of a `CompressionConfig`.

    Raises:
        InputError: a modality that is never compressed.
    """

    keeps_all = False

    def __init__(self, modality: Modality, when: When = "context") -> None:
        if modality not in COMPRESSED:
            raise InputError(f"{modality.name.lower()} is neither video nor audio", field="modality")
        super().__init__(CompressionConfig(policy="random", when=when, ratio=0.0))
        self.modality = modality

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"control_{self.modality.name.lower()}_evicted"

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        batch, _, entries = observation.keys.shape[:3]
        return LayerScore(torch.zeros(batch, 1, entries, device=observation.keys.device), None)

    def fixed_plan(self, observation: Observation, labels: ModalityMap) -> LayerPlan:
        gates = torch.zeros(labels.labels.shape, device=labels.labels.device)
        gates = gates.masked_fill((labels.labels == self.modality) | ~labels.real, -torch.inf)[:, None]
        keys, values = observation.keys, observation.values
        return LayerPlan(gates, keys[:, :, :0], values[:, :, :0], gates.new_zeros(*keys.shape[:2], 0))
