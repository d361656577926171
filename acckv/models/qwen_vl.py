"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures and video without sound, three-dimensional rotary positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from acckv.models.base import ModelAdapter
from acckv.models.deepstack import Deepstack
from acckv.models.family import Family, register_family


class QwenVLAdapter(ModelAdapter):
    """``Qwen2VLForConditionalGeneration`` and ``Qwen2_5_VLForConditionalGeneration``."""

    @property
    def closing_tokens(self) -> tuple[int, ...]:
        return (self.model.config.vision_end_token_id,)

    def text_positions(self, positions: Tensor) -> Tensor:
        return positions[None].expand(3, -1, -1)

    def prompt_positions(self, inputs: dict[str, Any], real: Tensor, start: Tensor) -> Tensor:
        grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        if all(grid is None for grid in grids.values()):
            return super().prompt_positions(inputs, real, start)
        ids, config = inputs["input_ids"], self.model.config
        types = torch.zeros_like(ids).masked_fill(ids == config.image_token_id, 1)
        positions, _ = self.backbone.get_rope_index(
            ids,
            mm_token_type_ids=types.masked_fill(ids == config.video_token_id, 2),
            attention_mask=real.long(),
            second_per_grid_ts=inputs.get("second_per_grid_ts"),
            **grids,
        )
        return positions.long() + start


class Qwen3VLAdapter(Deepstack, QwenVLAdapter):
    """``Qwen3VLForConditionalGeneration`` and ``Qwen3VLMoeForConditionalGeneration``."""


register_family(
    Family(title="Qwen2-VL, Qwen2.5-VL", model_types=("qwen2_vl", "qwen2_5_vl"), model_adapter=QwenVLAdapter)
)
register_family(Family(title="Qwen3-VL", model_types=("qwen3_vl", "qwen3_vl_moe"), model_adapter=Qwen3VLAdapter))
