"""Qwen2.5-Omni (3B, 7B): audio and video interleaved in chunks, three-dimensional rotary positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from acckv.models.base import ModelAdapter


class Qwen25OmniAdapter(ModelAdapter):
    """The thinker, ``Qwen2_5OmniThinkerForConditionalGeneration``."""

    model_types = ("qwen2_5_omni_thinker",)

    @property
    def closing_tokens(self) -> tuple[int, ...]:
        config = self.model.config
        return (config.audio_end_token_id, config.vision_end_token_id)

    def text_positions(self, positions: Tensor) -> Tensor:
        return positions[None].expand(3, -1, -1)

    def prompt_positions(self, inputs: dict[str, Any], real: Tensor, start: Tensor) -> Tensor:
        lengths = inputs.get("audio_feature_lengths")
        if inputs.get("feature_attention_mask") is not None:
            lengths = inputs["feature_attention_mask"].sum(dim=-1)
        positions, _ = self.model.get_rope_index(
            inputs["input_ids"],
            inputs.get("image_grid_thw"),
            inputs.get("video_grid_thw"),
            real.long(),
            inputs.get("use_audio_in_video") or False,
            lengths,
            inputs.get("video_second_per_grid"),
        )
        return self.as_read(positions) + start

    def as_read(self, positions: Tensor) -> Tensor:
        """Positions of get_rope_index as the decoder reads them: whole, though given as floats with some media."""
        return positions.long()
