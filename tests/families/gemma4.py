"""Gemma 4 in three kinds: with layers that slide and share, without sharing, and without towers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from tests.families.base import (
    AUDIO,
    AUDIO_BOS,
    AUDIO_EOS,
    FRAME_TOKENS,
    IMAGE,
    TEXT,
    VIDEO,
    VISION_BOS,
    VISION_EOS,
    Clip,
    Family,
)


class Gemma4(Family):
    """Sliding and full layers in turn; the last two share the entries of the layers before them."""

    name = "gemma4"
    layers = 2
    padding = {**Family.padding, "mm_token_type_ids": 0}  # noqa: RUF012
    plain = {**Family.plain, "mm_token_type_ids": 0}  # noqa: RUF012
    joined = ("pixel_values_videos", "video_position_ids", "num_frames_per_video")
    shared = 2
    bidirectional: str | None = None

    @property
    def model_class(self) -> Any:
        return transformers.Gemma4ForConditionalGeneration

    def decoder_config(self) -> dict[str, Any]:
        return {
            **TEXT,
            "num_hidden_layers": 6,
            "head_dim": 16,
            "global_head_dim": 32,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": self.shared,
            "use_bidirectional_attention": self.bidirectional,
        }

    def tokens(self) -> dict[str, Any]:
        return {
            "image_token_id": IMAGE,
            "video_token_id": VIDEO,
            "audio_token_id": AUDIO,
            "boi_token_id": VISION_BOS,
            "eoi_token_id": VISION_EOS,
            "boa_token_id": AUDIO_BOS,
            "eoa_token_index": AUDIO_EOS,
            "initializer_range": 0.1,
        }

    def config(self) -> Any:
        tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        return transformers.Gemma4Config(
            text_config={
                **self.decoder_config(),
                "vocab_size_per_layer_input": 128,
                "hidden_size_per_layer_input": 8,
            },
            vision_config={
                **tower,
                "intermediate_size": 32,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "patch_size": 4,
                "pooling_kernel_size": 2,
                "position_embedding_size": 16,
            },
            audio_config={**tower, "subsampling_conv_channels": [8, 4], "output_proj_dims": 32},
            **self.tokens(),
        )

    def build(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
        """With query norms of 0.25: with 1 and no scaling, attention saturates and multiplies rounding errors."""
        model = super().build(attention, dtype)
        for layer in model.model.language_model.layers:
            layer.self_attn.q_norm.weight.data.fill_(0.25)
        return model

    def attention(self, name: str) -> Any:
        return {"text_config": name, "vision_config": "sdpa", "audio_config": "eager", "": name}

    def features(self, frames: int, sounds: int, draw: torch.Generator) -> dict[str, Tensor]:
        """Patches of 4 x 4 that are pooled to 4 tokens a frame; 4 spectrogram frames a sound token."""
        grid = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="xy"), -1)
        return {
            "pixel_values_videos": torch.rand(frames, 16, 3 * 4 * 4, generator=draw),
            "video_position_ids": grid.reshape(1, 16, 2).repeat(frames, 1, 1),
            "input_features": torch.randn(1, 4 * sounds, 8, generator=draw),
            "input_features_mask": torch.ones(1, 4 * sounds, dtype=torch.bool),
        }

    def inputs(self, model: Any, clip: Clip) -> dict[str, Any]:
        features = self.features(clip.frames, clip.sounds, clip.generator())
        video = [VISION_BOS, *[VIDEO] * FRAME_TOKENS, VISION_EOS] * clip.frames
        ids = torch.tensor([[*clip.intro, *video, AUDIO_BOS, *[AUDIO] * clip.sounds, AUDIO_EOS, *clip.question]])
        types = torch.zeros_like(ids)
        types[ids == VIDEO], types[ids == AUDIO] = 2, 3
        floats = {name: value.to(model.dtype) for name, value in features.items() if value.is_floating_point()}
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": types,
            "num_frames_per_video": torch.tensor([clip.frames]),
            **features,
            **floats,
        }

    def pad_features(self, values: list[Tensor]) -> Tensor:
        width = max(value.shape[1] for value in values)
        tails = (0, 0) * (values[0].ndim - 2)
        return torch.cat([F.pad(value, (*tails, 0, width - value.shape[1])) for value in values])


class Gemma4Large(Gemma4):
    """As the large ones: no layer shares, and a frame's tokens see each other whole in sliding layers."""

    name = "gemma4_vision_bidirectional"
    layers = 3
    shared = 0
    bidirectional = "vision"


class Gemma4Unified(Gemma4Large):
    """Patches and samples straight into the decoder."""

    name = "gemma4_unified"

    @property
    def model_class(self) -> Any:
        return transformers.Gemma4UnifiedForConditionalGeneration

    def config(self) -> Any:
        return transformers.Gemma4UnifiedConfig(
            text_config=self.decoder_config(),
            vision_config={
                "patch_size": 2,
                "pooling_kernel_size": 2,
                "mm_embed_dim": 32,
                "mm_posemb_size": 16,
                "output_proj_dims": 32,
            },
            audio_config={"audio_embed_dim": 16},
            **self.tokens(),
        )

    def features(self, frames: int, sounds: int, draw: torch.Generator) -> dict[str, Tensor]:
        grid = torch.stack(torch.meshgrid(torch.arange(2), torch.arange(2), indexing="xy"), -1)
        return {
            "pixel_values_videos": torch.rand(frames, 4, 3 * 4 * 4, generator=draw),
            "video_position_ids": grid.reshape(1, 4, 2).repeat(frames, 1, 1),
            "input_features": torch.randn(1, sounds, 16, generator=draw),
            "input_features_mask": torch.ones(1, sounds, dtype=torch.bool),
        }
