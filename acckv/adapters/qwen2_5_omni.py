"""Qwen2.5-Omni (3B, 7B): audio and video interleaved in chunks, three-dimensional rotary positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from acckv.adapters.base import ModelAdapter
from acckv.modality import ModalityMap, label_tokens


class Qwen25OmniAdapter(ModelAdapter):
    """The thinker, ``Qwen2_5OmniThinkerForConditionalGeneration``."""

    model_types = ("qwen2_5_omni_thinker",)

    @property
    def decoder(self) -> Any:
        return self.model.model.language_model

    @property
    def attention_modules(self) -> list[Any]:
        return [layer.self_attn for layer in self.decoder.layers]

    def label(self, input_ids: Tensor, attention_mask: Tensor | None) -> ModalityMap:
        config = self.model.config
        return label_tokens(
            input_ids, config.video_token_id, config.audio_token_id, attention_mask, config.image_token_id
        )

    def context_length(self, labels: ModalityMap, input_ids: Tensor) -> Tensor:
        config = self.model.config
        closing = torch.tensor(
            [config.audio_end_token_id, config.vision_end_token_id], device=input_ids.device, dtype=input_ids.dtype
        )
        end = labels.media_end()
        length = input_ids.shape[1]
        for _ in range(2):  # <|audio_eos|><|vision_eos|>
            following = input_ids.gather(1, end.clamp(max=length - 1)[:, None])[:, 0]
            end = end + ((end > 0) & (end < length) & torch.isin(following, closing)).long()
        return end

    def text_positions(self, positions: Tensor) -> Tensor:
        return positions[None].expand(3, -1, -1)
