"""A model family of one's own: LLaVA-OneVision, which watches pictures and hears nothing.

python examples/my_family.py runs/llava        # a checkpoint with random weights, to try it
python evaluate.py --plugins examples/my_family.py --model runs/llava --policies keydiff --data.clips 4
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

from acckv.errors import InputError
from acckv.models import ChatEncoder, Family, Media, ModelAdapter, load_processor, register_family


class LlavaAdapter(ModelAdapter):
    """Where the defaults fit: `model.model` is the backbone, `model.model.language_model` the decoder."""


class LlavaEncoder(ChatEncoder):
    """Clips and questions into `input_ids`, `attention_mask` and `pixel_values_videos`; sound is left out."""

    processor_types = (LlavaOnevisionProcessor,)

    def content(self, clip: Media | None) -> list[dict[str, str]]:
        return [{"type": "video"}]

    def markers(self, clip: Media | None) -> list[str]:
        return [self.processor.video_token]

    def check(self, clip: Media) -> None:
        if clip.frames is None:
            raise InputError("is sound alone, and the model has no ears", source=clip.path)
        if clip.audio is not None:
            warnings.warn("the model has no ears: the sound of clips is left out", stacklevel=2)

    def process(self, clips: Sequence[Media], texts: list[str]) -> dict[str, Any]:
        videos = [clip.frames for clip in clips if clip.frames is not None]
        if len({len(frames) for frames in videos}) > 1:
            raise InputError("has other pictures than the clips beside it; set batch_size 1", source=clips[0].path)
        options = {"do_sample_frames": False, "padding": True, "padding_side": "left", "return_tensors": "pt"}
        return dict(self.processor(text=texts, videos=videos, **options))


register_family(
    Family(
        title="LLaVA-OneVision",
        model_types=("llava_onevision",),
        model_adapter=LlavaAdapter,
        model_class=LlavaOnevisionForConditionalGeneration,
        encoder=LlavaEncoder,
    )
)


def write_checkpoint(folder: str) -> None:
    """A small model with random weights and its processor, which has the words of acckv's generated clips."""
    packaged = load_processor("tiny")
    tokenizer = packaged.tokenizer
    tower = {"image_size": 56, "patch_size": 14, "num_hidden_layers": 2}
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **tower, **size},
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "eos_token_id": tokenizer.eos_token_id,
            **size,
        },
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
    )
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration._from_config(config)
    model.save_pretrained(folder)
    pixels = {"height": 56, "width": 56}
    LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=pixels),
        tokenizer,
        LlavaOnevisionVideoProcessor(size=pixels),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=packaged.chat_template,
    ).save_pretrained(folder)


if __name__ == "__main__":
    write_checkpoint(sys.argv[1])
