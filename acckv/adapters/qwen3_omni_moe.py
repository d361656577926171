"""Qwen3-Omni-MoE: as Qwen2.5-Omni, and visual features are added to the first layers again (deepstack)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from acckv.adapters.qwen2_5_omni import Qwen25OmniAdapter
from acckv.ragged import take


class Qwen3OmniMoeAdapter(Qwen25OmniAdapter):
    """The thinker, ``Qwen3OmniMoeThinkerForConditionalGeneration``."""

    model_types = ("qwen3_omni_moe_thinker",)

    def cut(self, arguments: dict[str, Any], columns: Tensor) -> dict[str, Any]:
        inside = super().cut(arguments, columns)
        visual = arguments.get("visual_pos_masks")
        if visual is None:
            return inside
        kept = take(visual, columns, 1)
        if not bool(kept.any()):
            return {**inside, "visual_pos_masks": None, "deepstack_visual_embeds": None}
        # The features come one a visual token, row after row: number them, then take those of the window.
        number = (visual.flatten().cumsum(0) - 1).view_as(visual)
        rows = take(number, columns, 1)[kept]
        features = [layer[rows.to(layer.device)] for layer in arguments["deepstack_visual_embeds"]]
        return {**inside, "visual_pos_masks": kept, "deepstack_visual_embeds": features}

    def append_text(self, arguments: dict[str, Any], input_ids: Tensor, positions: Tensor) -> dict[str, Any]:
        longer = super().append_text(arguments, input_ids, positions)
        visual = longer.get("visual_pos_masks")
        if visual is not None:
            longer["visual_pos_masks"] = torch.cat([visual, torch.zeros_like(input_ids, dtype=torch.bool)], dim=1)
        return longer
