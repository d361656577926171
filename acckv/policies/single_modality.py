"""Controls of an evaluation: caches from which one modality is gone altogether."""

from __future__ import annotations

from typing import Any

import torch

from acckv.compressor import KVCompressor
from acckv.config import CompressionConfig, When
from acckv.errors import InputError
from acckv.method.modality import COMPRESSED, Modality, ModalityMap
from acckv.method.plan import LayerPlan, LayerScore
from acckv.method.scoring import Observation


class EvictedModality(KVCompressor):
    """Evict every entry of one modality and keep all others, in every layer, whatever the ratio.

    What is then still answered right needs only the other modality (or no media at all).

    Args:
        modality: VIDEO or AUDIO.
        when: as of a `CompressionConfig`.

    Raises:
        InputError: a modality that is never compressed.
    """

    def __init__(self, modality: Modality, when: When = "context") -> None:
        if modality not in COMPRESSED:
            raise InputError(f"{modality.name.lower()} is neither video nor audio", field="modality")
        super().__init__(CompressionConfig(policy="full", when=when))
        self.modality = modality

    @property
    def name(self) -> str:
        return f"control_{self.modality.name.lower()}_evicted"

    def keeps_all(self, ratio: float | None = None) -> bool:
        return False

    def with_ratio(self, ratio: float) -> KVCompressor:
        raise InputError("keeps one modality whole and has no ratio", field="ratio")

    def plan_one(
        self, layer: int, score: LayerScore, observation: Observation, labels: ModalityMap, *args: Any
    ) -> LayerPlan:
        """Keep text and the other modality; the budget counts for nothing."""
        gates = torch.zeros(labels.labels.shape, device=labels.labels.device)
        gates = gates.masked_fill((labels.labels == self.modality) | ~labels.real, -torch.inf)[:, None]
        keys, values = observation.keys, observation.values
        return LayerPlan(gates, keys[:, :, :0], values[:, :, :0], gates.new_zeros(*keys.shape[:2], 0))
