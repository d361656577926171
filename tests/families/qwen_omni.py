"""Qwen2.5-Omni and Qwen3-Omni, whose processors lay video and audio side by side or in one segment."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from tests.families.base import (
    AUDIO,
    AUDIO_BOS,
    AUDIO_EOS,
    FRAME_TOKENS,
    IMAGE,
    MROPE,
    TEXT,
    VIDEO,
    VISION,
    VISION_BOS,
    VISION_EOS,
    Clip,
    Family,
)

HEARING = {
    "num_mel_bins": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "output_dim": 64,
}
QWEN_TOKENS: dict[str, Any] = {
    "audio_start_token_id": AUDIO_BOS,
    "audio_end_token_id": AUDIO_EOS,
    "vision_start_token_id": VISION_BOS,
    "vision_end_token_id": VISION_EOS,
    "user_token_id": 107,
    "initializer_range": 0.1,
}


class Qwen25Omni(Family):
    """Video, then audio; with `interleaved` both in one segment, as the processor lays audio in video."""

    name = "qwen2_5_omni"
    interleaved = False

    @property
    def model_class(self) -> Any:
        return transformers.Qwen2_5OmniThinkerForConditionalGeneration

    def config(self) -> Any:
        return transformers.Qwen2_5OmniThinkerConfig(
            text_config={**TEXT, "num_hidden_layers": self.layers, "rope_parameters": MROPE},
            audio_config={**HEARING, "n_window": 10},
            vision_config={**VISION, "depth": 1, "window_size": 16, "fullatt_block_indexes": [0]},
            audio_token_index=AUDIO,
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            **QWEN_TOKENS,
        )

    def positions(self, model: Any, inputs: dict[str, Any]) -> Tensor | None:
        return model.get_rope_index(
            inputs["input_ids"],
            video_grid_thw=inputs["video_grid_thw"],
            attention_mask=inputs["attention_mask"],
            use_audio_in_video=inputs["use_audio_in_video"],
            audio_seqlens=inputs["feature_attention_mask"].sum(-1),
            second_per_grids=inputs["video_second_per_grid"],
        )[0]

    def mel_frames(self, sounds: int) -> int:
        """Spectrogram frames that give so many tokens."""
        return 4 * sounds

    def inputs(self, model: Any, clip: Clip) -> dict[str, Any]:
        draw, mel = clip.generator(), self.mel_frames(clip.sounds)
        dtype = torch.float32 if model is None else model.dtype
        video, audio = [VIDEO] * (FRAME_TOKENS * clip.frames), [AUDIO] * clip.sounds
        if self.interleaved:
            body = [VISION_BOS, AUDIO_BOS, *video, *audio, AUDIO_EOS, VISION_EOS]
        else:
            body = [VISION_BOS, *video, VISION_EOS, AUDIO_BOS, *audio, AUDIO_EOS]
        ids = torch.tensor([[*clip.intro, *body, *clip.question]])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values_videos": torch.randn(16 * clip.frames, 3 * 2 * 4 * 4, generator=draw).to(dtype),
            "video_grid_thw": torch.tensor([[clip.frames, 4, 4]]),
            "input_features": torch.randn(1, 16, mel, generator=draw).to(dtype),
            "feature_attention_mask": torch.ones(1, mel, dtype=torch.long),
            "video_second_per_grid": torch.tensor([1.0]),
            "use_audio_in_video": self.interleaved,
        }


class Qwen25OmniInterleaved(Qwen25Omni):
    name = "qwen2_5_omni_interleaved"
    interleaved = True


class Qwen3OmniMoe(Qwen25Omni):
    name = "qwen3_omni_moe"

    @property
    def model_class(self) -> Any:
        return transformers.Qwen3OmniMoeThinkerForConditionalGeneration

    def config(self) -> Any:
        rope = {**MROPE, "mrope_interleaved": True}
        experts = {"head_dim": 16, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
        return transformers.Qwen3OmniMoeThinkerConfig(
            text_config={**TEXT, **experts, "rope_parameters": rope},
            audio_config={
                **HEARING,
                "n_window": 50,
                "n_window_infer": 100,
                "conv_chunksize": 50,
                "downsample_hidden_size": 8,
            },
            vision_config={**VISION, "depth": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
            audio_token_id=AUDIO,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **QWEN_TOKENS,
        )

    def mel_frames(self, sounds: int) -> int:
        return 100 * (sounds // 13) + 8 * (sounds % 13)
