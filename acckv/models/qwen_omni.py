"""Qwen2.5-Omni and Qwen3-Omni: pictures and sound interleaved in chunks, three-dimensional rotary positions.

A clip with a sound track is interleaved (audio in video); one without is video only, sound without pictures an audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2.functional import resize
from transformers import (
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeProcessor,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

from acckv.errors import InputError
from acckv.models.base import ModelAdapter
from acckv.models.batching import pad_left
from acckv.models.clips import Media
from acckv.models.deepstack import Deepstack
from acckv.models.encoder import ChatEncoder
from acckv.models.family import Family, register_family

MEL = ("input_features", "feature_attention_mask")
_CUTS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


class Qwen25OmniAdapter(ModelAdapter):
    """The thinker, ``Qwen2_5OmniThinkerForConditionalGeneration``.

    Attributes:
        whole_positions: whether the decoder reads positions as whole numbers, though some media give them as floats.
    """

    whole_positions: ClassVar[bool] = True

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
        return (positions.long() if self.whole_positions else positions) + start


class Qwen3OmniMoeAdapter(Deepstack, Qwen25OmniAdapter):
    """The thinker, ``Qwen3OmniMoeThinkerForConditionalGeneration``, with visual features in the first layers again."""

    whole_positions = False


def timing(processor: Any) -> tuple[int, float]:
    """`(position_id_per_seconds, seconds_per_chunk)` of a processor: how sound and pictures are interleaved.

    transformers keeps both as attributes of the processor and does not save them. A processor that differs from the
    defaults (25, 2.0) therefore carries them as extra fields of its feature extractor, which are saved and loaded.
    """
    extractor = processor.feature_extractor
    position_ids = getattr(extractor, "position_id_per_seconds", None) or processor.position_id_per_seconds
    seconds = getattr(extractor, "seconds_per_chunk", None) or processor.seconds_per_chunk
    return position_ids, float(seconds)


def cuts_sound(processor: Any) -> bool:
    """Whether a processor cuts sound that is longer than its feature extractor's window; it is asked, once."""
    if processor not in _CUTS:
        extractor = processor.feature_extractor
        longer = np.zeros(extractor.n_samples + extractor.sampling_rate, np.float32)
        text = f"{processor.audio_bos_token}{processor.audio_token}{processor.audio_eos_token}"
        made = processor(text=[text], audio=[longer], return_tensors="pt")
        _CUTS[processor] = int(made["feature_attention_mask"].sum()) * extractor.hop_length < len(longer)
    return _CUTS[processor]


class QwenOmniEncoder(ChatEncoder):
    """Gives `input_ids`, `attention_mask`, pixel and mel features, and `use_audio_in_video` (of the whole batch)."""

    processor_types = (Qwen2_5OmniProcessor, Qwen3OmniMoeProcessor)

    def content(self, clip: Media | None) -> list[dict[str, str]]:
        medium = _medium(clip)
        return [{"type": medium, medium: "clip"}]

    def markers(self, clip: Media | None) -> list[str]:
        processor = self.processor
        if _medium(clip) == "audio":
            return [processor.audio_bos_token, processor.audio_eos_token]
        return [processor.vision_bos_token, processor.vision_eos_token]

    def check(self, clip: Media) -> None:
        super().check(clip)
        extractor = self.processor.feature_extractor
        if clip.audio is None or len(clip.audio) <= extractor.n_samples or not cuts_sound(self.processor):
            return
        limit = extractor.n_samples / extractor.sampling_rate
        seconds = len(clip.audio) / clip.sampling_rate
        message = f"{seconds:g} s of sound, of which the model's processor takes {limit:g} s"
        remedy = f"give start and end, or max_seconds={limit:g} with cut_long to take the beginning"
        raise InputError(f"{message}; {remedy}", source=clip.path, field="max_seconds")

    def process(self, clips: Sequence[Media], texts: list[str]) -> dict[str, Any]:
        kind = clips[0].kind
        if kind != "audio" and len({clip.fps for clip in clips}) > 1:  # the processor takes one rate for all
            return self._joined([self.process([clip], [text]) for clip, text in zip(clips, texts, strict=True)])
        arguments: dict[str, Any] = {}
        if kind != "audio":
            frames = [self._whole_patches(clip.frames) for clip in clips if clip.frames is not None]
            arguments |= {"videos": frames, "fps": clips[0].fps, "do_sample_frames": False}
        if kind != "video":
            sounds = [clip.audio for clip in clips if clip.audio is not None]
            options = {"sampling_rate": clips[0].sampling_rate, "max_length": self._padded_samples(sounds)}
            arguments |= {"audio": [sound.numpy() for sound in sounds], "audio_kwargs": options}
        if kind == "audio-video":
            position_ids, seconds = timing(self.processor)
            arguments |= {
                "audio_from_video_indices": list(range(len(clips))),
                "load_audio_from_video": True,
                "position_id_per_seconds": position_ids,
                "seconds_per_chunk": seconds,
            }
        batch = self.processor(text=texts, padding=True, padding_side="left", return_tensors="pt", **arguments)
        inputs: dict[str, Any] = dict(batch)
        if kind != "video":
            longest = int(inputs["feature_attention_mask"].sum(-1).max())
            for name in MEL:
                inputs[name] = inputs[name][..., :longest]
        inputs["use_audio_in_video"] = kind == "audio-video"
        return inputs

    def _joined(self, prompts: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of inputs that were made one by one: prompts padded on the left, mel features on the right."""
        ids, mask = pad_left([prompt["input_ids"][0] for prompt in prompts], self.processor.tokenizer.pad_token_id)
        joined: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        for name in prompts[0].keys() - joined.keys():
            values = [prompt[name] for prompt in prompts]
            if isinstance(values[0], bool):
                joined[name] = values[0]
                continue
            values = [torch.as_tensor(value) for value in values]
            if name in MEL:
                longest = max(value.shape[-1] for value in values)
                values = [pad(value, (0, longest - value.shape[-1])) for value in values]
            joined[name] = torch.cat(values)
        return joined

    def _whole_patches(self, frames: Tensor) -> Tensor:
        """Pictures of a size that a processor which does not resize (the embedded model's) can take."""
        video = self.processor.video_processor
        if video.do_resize:
            return frames
        height, width = frames.shape[-2:]
        bounds = {"min_pixels": video.size["shortest_edge"], "max_pixels": video.size["longest_edge"]}
        size = smart_resize(height, width, video.patch_size * video.merge_size, **bounds)
        return frames if size == (height, width) else resize(frames, list(size), antialias=True)

    def _padded_samples(self, sounds: Sequence[Tensor]) -> int:
        """Samples to pad sounds ``[samples]`` to: the longest and a window of silence, not the extractor's maximum.

        The window keeps the last mel frame what it is with full padding; all frames that the mask shows are the same.
        """
        extractor = self.processor.feature_extractor
        hops = -(-(max(len(sound) for sound in sounds) + extractor.n_fft) // extractor.hop_length)
        return hops * extractor.hop_length


def _medium(clip: Media | None) -> str:
    """The chat template's name for a clip."""
    return "audio" if clip is not None and clip.kind == "audio" else "video"


register_family(
    Family(
        title="Qwen2.5-Omni",
        model_types=("qwen2_5_omni", "qwen2_5_omni_thinker"),
        model_adapter=Qwen25OmniAdapter,
        model_class=Qwen2_5OmniThinkerForConditionalGeneration,
        encoder=QwenOmniEncoder,
    )
)
register_family(
    Family(
        title="Qwen3-Omni",
        model_types=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
        model_adapter=Qwen3OmniMoeAdapter,
        model_class=Qwen3OmniMoeThinkerForConditionalGeneration,
        encoder=QwenOmniEncoder,
    )
)
