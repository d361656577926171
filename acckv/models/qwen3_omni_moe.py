"""Qwen3-Omni-MoE: as Qwen2.5-Omni, and visual features are added to the first layers again (deepstack)."""

from __future__ import annotations

from torch import Tensor

from acckv.models.deepstack import Deepstack
from acckv.models.qwen2_5_omni import Qwen25OmniAdapter


class Qwen3OmniMoeAdapter(Deepstack, Qwen25OmniAdapter):
    """The thinker, ``Qwen3OmniMoeThinkerForConditionalGeneration``."""

    model_types = ("qwen3_omni_moe_thinker",)

    def as_read(self, positions: Tensor) -> Tensor:
        """As they are: frames that are no whole number of positions apart stay so."""
        return positions
