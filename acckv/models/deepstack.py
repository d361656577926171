"""Deepstack: visual features that are added to the first layers again, one vector a visual token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from acckv.models.base import ModelAdapter
from acckv.models.batching import gather_columns


class Deepstack(ModelAdapter):
    """To be put before the family's own base class."""

    def cut(self, arguments: dict[str, Any], columns: Tensor) -> dict[str, Any]:
        inside = super().cut(arguments, columns)
        visual = arguments.get("visual_pos_masks")
        if visual is None:
            return inside
        kept = gather_columns(visual, columns, 1)
        if not bool(kept.any()):
            return {**inside, "visual_pos_masks": None, "deepstack_visual_embeds": None}
        # The features are one a visual token, batch row after batch row: number them, then take the window's.
        number = (visual.flatten().cumsum(0) - 1).view_as(visual)
        inside_window = gather_columns(number, columns, 1)[kept]
        features = [layer[inside_window.to(layer.device)] for layer in arguments["deepstack_visual_embeds"]]
        return {**inside, "visual_pos_masks": kept, "deepstack_visual_embeds": features}

    def by_token(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """The features of deepstack, ``[batch, tokens, layers, hidden]``, zero where there is no picture."""
        visual = arguments.get("visual_pos_masks")
        if visual is None:
            return {}
        features = torch.stack(list(arguments["deepstack_visual_embeds"]), dim=1)
        spread = features.new_zeros(*visual.shape, *features.shape[1:])
        spread[visual] = features
        return {"visual_pos_masks": visual, "deepstack": spread}

    def from_tokens(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        visual = tensors.get("visual_pos_masks")
        if visual is None or not bool(visual.any()):
            return {}
        return {"visual_pos_masks": visual, "deepstack_visual_embeds": list(tensors["deepstack"][visual].unbind(1))}

    def append_text(self, arguments: dict[str, Any], input_ids: Tensor, positions: Tensor) -> dict[str, Any]:
        longer = super().append_text(arguments, input_ids, positions)
        visual = longer.get("visual_pos_masks")
        if visual is not None:
            longer["visual_pos_masks"] = torch.cat([visual, torch.zeros_like(input_ids, dtype=torch.bool)], dim=1)
        return longer
