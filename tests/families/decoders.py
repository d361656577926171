"""Plain decoders that are fed with embeddings, as VideoLLaMA2 and AVicuna feed theirs."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.families.base import FRAME_TOKENS, ROPE, TEXT, Clip, Family


class VideoLlama2(Family):
    """A Qwen2 decoder fed with [text, video, audio, text] embeddings, as VideoLLaMA2 feeds its own."""

    name = "videollama2"
    padding = {"inputs_embeds": 0, "attention_mask": 0, "modality_ids": 3}  # noqa: RUF012

    def text(self, model: Any, tokens: tuple[int, ...]) -> dict[str, Any]:
        ids = torch.tensor([tokens])
        with torch.no_grad():
            embeds = model.get_input_embeddings()(ids)
        return {
            "inputs_embeds": embeds,
            "attention_mask": torch.ones_like(ids),
            "modality_ids": torch.zeros_like(ids),
        }

    @property
    def model_class(self) -> Any:
        return transformers.Qwen2ForCausalLM

    def config(self) -> Any:
        return transformers.Qwen2Config(**TEXT, rope_parameters=ROPE)

    def media_ids(self, frames: int, sounds: int) -> list[int]:
        return [1] * (FRAME_TOKENS * frames) + [2] * sounds

    def inputs(self, model: Any, clip: Clip) -> dict[str, Any]:
        media = self.media_ids(clip.frames, clip.sounds)
        features = 0.1 * torch.randn(1, len(media), 64, generator=clip.generator()).to(model.dtype)
        embed = model.get_input_embeddings()
        with torch.no_grad():
            before = embed(torch.tensor([clip.intro], dtype=torch.long))
            after = embed(torch.tensor([clip.question], dtype=torch.long))
        kinds = torch.tensor([[0] * len(clip.intro) + media + [0] * len(clip.question)])
        embeds = torch.cat([before, features, after], dim=1)
        return {"inputs_embeds": embeds, "attention_mask": torch.ones_like(kinds), "modality_ids": kinds}


class AVicuna(VideoLlama2):
    """A Llama decoder fed with a segment of video and sound by turns, as AVicuna feeds its own."""

    name = "avicuna"

    @property
    def model_class(self) -> Any:
        return transformers.LlamaForCausalLM

    def config(self) -> Any:
        return transformers.LlamaConfig(**TEXT, rope_parameters=ROPE)

    def media_ids(self, frames: int, sounds: int) -> list[int]:
        video, audio = FRAME_TOKENS * frames, sounds
        turns = sorted([(place / video, 1) for place in range(video)] + [(place / audio, 2) for place in range(audio)])
        return [kind for _, kind in turns]
