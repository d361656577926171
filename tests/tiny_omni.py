"""A random-weight Qwen2.5-Omni of the real class, small enough to run in milliseconds, with matching inputs."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

VIDEO, AUDIO, VISION_BOS, VISION_EOS, AUDIO_BOS, AUDIO_EOS = 102, 100, 105, 106, 103, 104
VIDEO_TOKENS, AUDIO_TOKENS = 8, 10


def build(layers: int = 3, attention: str = "sdpa") -> Qwen2_5OmniThinkerForConditionalGeneration:
    """4 query heads, 2 KV heads, head size 16; the same weights at every call."""
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": 128,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
            "initializer_range": 0.1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        audio_config={
            "num_mel_bins": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "d_model": 32,
            "n_window": 10,
            "output_dim": 64,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [0],
            "out_hidden_size": 64,
        },
        audio_token_index=AUDIO,
        image_token_index=101,
        video_token_index=VIDEO,
        audio_start_token_id=AUDIO_BOS,
        audio_end_token_id=AUDIO_EOS,
        vision_start_token_id=VISION_BOS,
        vision_end_token_id=VISION_EOS,
        user_token_id=107,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    model = Qwen2_5OmniThinkerForConditionalGeneration._from_config(config, attn_implementation=attention)
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None  # answers of a fixed length
    return model.eval()


def context(seed: int = 1, interleaved: bool = True, intro: tuple[int, ...] = (2, 10, 11)) -> dict[str, Any]:
    """One clip up to the end-of-media tokens."""
    generator = torch.Generator().manual_seed(seed)
    video, audio = [VIDEO] * VIDEO_TOKENS, [AUDIO] * AUDIO_TOKENS
    if interleaved:
        body = [VISION_BOS, AUDIO_BOS, *video, *audio, AUDIO_EOS, VISION_EOS]
    else:
        body = [VISION_BOS, *video, VISION_EOS, AUDIO_BOS, *audio, AUDIO_EOS]
    ids = torch.tensor([[*intro, *body]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(2 * 4 * 4, 3 * 2 * 4 * 4, generator=generator),
        "video_grid_thw": torch.tensor([[2, 4, 4]]),
        "input_features": torch.randn(1, 16, 40, generator=generator),
        "feature_attention_mask": torch.ones(1, 40, dtype=torch.long),
        "video_second_per_grid": torch.tensor([1.0]),
        "use_audio_in_video": interleaved,
    }


def prompt(question: tuple[int, ...] = (20, 21, 22), **options: Any) -> dict[str, Any]:
    """One clip with a question."""
    inputs = context(**options)
    ids = torch.cat([inputs["input_ids"], torch.tensor([question])], dim=1)
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Tokenizer:
    """Stands for a processor where only a probe prompt must be tokenised."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [30 + len(word) for word in text.split()]}
