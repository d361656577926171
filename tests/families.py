"""Tiny random-weight models of every family's real classes, with clips of any length as their processors would give.

All have token ids below 128, and text ids from 10 to 59. A clip has 4 video tokens a frame and `sounds` audio tokens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

AUDIO, IMAGE, VIDEO = 100, 101, 102
AUDIO_BOS, AUDIO_EOS, VISION_BOS, VISION_EOS = 103, 104, 105, 106
FRAME_TOKENS = 4
QUESTION = (20, 21, 22)


class Tokenizer:
    """Stands for a processor where only a probe prompt must be tokenised."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [30 + len(word) for word in text.split()]}


class Family(ABC):
    """One family: how to build its tiny model, and the inputs of a clip.

    Attributes:
        name: of the family; padding: input name -> value that fills rows on the left.
        plain: input name -> its value where there is text.
        joined: inputs whose rows are joined along their first axis in a batch; others are padded on the right.
        layers: how many the budget counts.
    """

    name: str
    layers = 3
    padding: dict[str, int] = {"input_ids": 0, "attention_mask": 0}  # noqa: RUF012
    plain: dict[str, int] = {"input_ids": 0, "attention_mask": 1}  # noqa: RUF012
    joined: tuple[str, ...] = ("pixel_values_videos", "video_grid_thw", "video_second_per_grid")

    @abstractmethod
    def config(self) -> Any:
        """The tiny configuration."""

    @property
    @abstractmethod
    def model_class(self) -> Any:
        """The class that generates text."""

    def build(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
        """The same weights at every call."""
        torch.manual_seed(0)
        model = self.model_class._from_config(self.config(), attn_implementation=self.attention(attention))
        model.generation_config.eos_token_id = None
        return model.to(dtype).eval()

    def attention(self, name: str) -> Any:
        return name

    @abstractmethod
    def clip(
        self,
        model: Any,
        question: tuple[int, ...] = QUESTION,
        seed: int = 0,
        frames: int = 2,
        sounds: int = 6,
        intro: tuple[int, ...] = (2, 10, 11),
    ) -> dict[str, Any]:
        """Model inputs of one row: intro, media, question."""

    def context(self, model: Any, **options: Any) -> dict[str, Any]:
        """A clip without a question."""
        return self.clip(model, (), **options)

    def text(self, model: Any, tokens: tuple[int, ...]) -> dict[str, Any]:
        """A turn of text."""
        ids = torch.tensor([tokens])
        return {
            name: ids if name == "input_ids" else torch.full_like(ids, int(fill)) for name, fill in self.plain.items()
        }

    def positions(self, model: Any, inputs: dict[str, Any]) -> Tensor | None:
        """Position ids of a whole prompt, by the model's own function; None where they count tokens."""
        return None

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows of different length as one left-padded batch."""
        batch: dict[str, Any] = {}
        for name, value in rows[0].items():
            values = [row[name] for row in rows]
            if not isinstance(value, Tensor):
                batch[name] = value
            elif name in self.padding:
                width = max(item.shape[1] for item in values)
                tail = (0, 0) * (value.ndim - 2)
                fill = self.padding[name]
                batch[name] = torch.cat([F.pad(v, (*tail, width - v.shape[1], 0), value=fill) for v in values])
            elif name in self.joined:
                batch[name] = torch.cat(values)
            else:
                batch[name] = self.pad_features(values)
        return batch

    def join(self, turns: list[dict[str, Any]]) -> dict[str, Any]:
        """The turns of one row as the inputs of one prompt."""
        whole: dict[str, Any] = {}
        for name in {name: None for turn in turns for name in turn}:
            values = [turn[name] for turn in turns if name in turn]
            if not isinstance(values[0], Tensor):
                whole[name] = values[0]
            elif name in self.padding or name in self.joined:
                whole[name] = torch.cat(values, dim=int(name in self.padding))
            else:
                whole[name] = self.pad_features(values)
        return whole

    def pad_features(self, values: list[Tensor]) -> Tensor:
        """Stack ``[1, ..., length]`` sound features, padded on the right."""
        width = max(value.shape[-1] for value in values)
        return torch.cat([F.pad(value, (0, width - value.shape[-1])) for value in values])


TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.1,
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
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
        return transformers.Qwen2_5OmniThinkerConfig(
            text_config={**TEXT, "rope_parameters": rope},
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

    def clip(
        self,
        model: Any,
        question: tuple[int, ...] = QUESTION,
        seed: int = 0,
        frames: int = 2,
        sounds: int = 6,
        intro: tuple[int, ...] = (2, 10, 11),
    ) -> dict[str, Any]:
        draw = torch.Generator().manual_seed(seed + 1)
        mel = self.mel_frames(sounds)
        video, audio = [VIDEO] * (FRAME_TOKENS * frames), [AUDIO] * sounds
        if self.interleaved:
            body = [VISION_BOS, AUDIO_BOS, *video, *audio, AUDIO_EOS, VISION_EOS]
        else:
            body = [VISION_BOS, *video, VISION_EOS, AUDIO_BOS, *audio, AUDIO_EOS]
        ids = torch.tensor([[*intro, *body, *question]])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values_videos": torch.randn(16 * frames, 3 * 2 * 4 * 4, generator=draw).to(model.dtype),
            "video_grid_thw": torch.tensor([[frames, 4, 4]]),
            "input_features": torch.randn(1, 16, mel, generator=draw).to(model.dtype),
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
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
        experts = {"head_dim": 16, "moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
        return transformers.Qwen3OmniMoeThinkerConfig(
            text_config={**TEXT, **experts, "rope_parameters": rope},
            audio_config={
                "num_mel_bins": 16,
                "encoder_layers": 1,
                "encoder_attention_heads": 2,
                "encoder_ffn_dim": 32,
                "d_model": 32,
                "n_window": 50,
                "n_window_infer": 100,
                "conv_chunksize": 50,
                "downsample_hidden_size": 8,
                "output_dim": 64,
            },
            vision_config={
                "depth": 2,
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_heads": 2,
                "patch_size": 4,
                "out_hidden_size": 64,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
            audio_token_id=AUDIO,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            **QWEN_TOKENS,
        )

    def mel_frames(self, sounds: int) -> int:
        return 100 * (sounds // 13) + 8 * (sounds % 13)


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

    def clip(
        self,
        model: Any,
        question: tuple[int, ...] = QUESTION,
        seed: int = 0,
        frames: int = 2,
        sounds: int = 6,
        intro: tuple[int, ...] = (2, 10, 11),
    ) -> dict[str, Any]:
        features = self.features(frames, sounds, torch.Generator().manual_seed(seed + 1))
        video = [VISION_BOS, *[VIDEO] * FRAME_TOKENS, VISION_EOS] * frames
        ids = torch.tensor([[*intro, *video, AUDIO_BOS, *[AUDIO] * sounds, AUDIO_EOS, *question]])
        types = torch.zeros_like(ids)
        types[ids == VIDEO], types[ids == AUDIO] = 2, 3
        floats = {name: value.to(model.dtype) for name, value in features.items() if value.is_floating_point()}
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": types,
            "num_frames_per_video": torch.tensor([frames]),
            **features,
            **floats,
        }

    def join(self, turns: list[dict[str, Any]]) -> dict[str, Any]:
        """The turns of one row as the inputs of one prompt."""
        whole: dict[str, Any] = {}
        for name in {name: None for turn in turns for name in turn}:
            values = [turn[name] for turn in turns if name in turn]
            if not isinstance(values[0], Tensor):
                whole[name] = values[0]
            elif name in self.padding or name in self.joined:
                whole[name] = torch.cat(values, dim=int(name in self.padding))
            else:
                whole[name] = self.pad_features(values)
        return whole

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
        return transformers.Qwen2Config(**TEXT, rope_parameters={"rope_type": "default", "rope_theta": 1e4})

    def media_ids(self, frames: int, sounds: int) -> list[int]:
        return [1] * (FRAME_TOKENS * frames) + [2] * sounds

    def clip(
        self,
        model: Any,
        question: tuple[int, ...] = QUESTION,
        seed: int = 0,
        frames: int = 2,
        sounds: int = 6,
        intro: tuple[int, ...] = (2, 10, 11),
    ) -> dict[str, Any]:
        media = self.media_ids(frames, sounds)
        draw = torch.Generator().manual_seed(seed + 1)
        features = 0.1 * torch.randn(1, len(media), 64, generator=draw).to(model.dtype)
        embed = model.get_input_embeddings()
        with torch.no_grad():
            before = embed(torch.tensor([intro], dtype=torch.long))
            after = embed(torch.tensor([question], dtype=torch.long))
        kinds = torch.tensor([[0] * len(intro) + media + [0] * len(question)])
        embeds = torch.cat([before, features, after], dim=1)
        return {"inputs_embeds": embeds, "attention_mask": torch.ones_like(kinds), "modality_ids": kinds}


class AVicuna(VideoLlama2):
    """A Llama decoder fed with a segment of video and sound by turns, as AVicuna feeds its own."""

    name = "avicuna"

    @property
    def model_class(self) -> Any:
        return transformers.LlamaForCausalLM

    def config(self) -> Any:
        return transformers.LlamaConfig(**TEXT, rope_parameters={"rope_type": "default", "rope_theta": 1e4})

    def media_ids(self, frames: int, sounds: int) -> list[int]:
        video, audio = FRAME_TOKENS * frames, sounds
        turns = sorted([(place / video, 1) for place in range(video)] + [(place / audio, 2) for place in range(audio)])
        return [kind for _, kind in turns]


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Qwen25Omni(),
        Qwen25OmniInterleaved(),
        Qwen3OmniMoe(),
        Gemma4(),
        Gemma4Large(),
        Gemma4Unified(),
        VideoLlama2(),
        AVicuna(),
    )
}
