"""Qwen2.5-Omni and Qwen3-Omni: a clip with a sound track is interleaved (audio in video).

A clip without one is video only, and sound without pictures is an audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2.functional import resize
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

from acckv.data.encoding.base import ChatEncoder
from acckv.data.media import Media
from acckv.errors import InputError
from acckv.models.batching import pad_left

MEL = ("input_features", "feature_attention_mask")
_CUTS: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()


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
            frames = [self._whole_patches(clip.frames) for clip in clips]
            arguments |= {"videos": frames, "fps": clips[0].fps, "do_sample_frames": False}
        if kind != "video":
            options = {"sampling_rate": clips[0].sampling_rate, "max_length": self._padded_samples(clips)}
            arguments |= {"audio": [clip.audio.numpy() for clip in clips], "audio_kwargs": options}
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

    def _joined(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of inputs that were made one by one: prompts padded on the left, mel features on the right."""
        joined: dict[str, Any] = {}
        ids, joined["attention_mask"] = pad_left(
            [row["input_ids"][0] for row in rows], self.processor.tokenizer.pad_token_id
        )
        joined["input_ids"] = ids
        for name in rows[0].keys() - joined.keys():
            values = [row[name] for row in rows]
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

    def _padded_samples(self, clips: Sequence[Media]) -> int:
        """Samples to pad sound to: the longest clip and one window of silence, instead of the extractor's maximum.

        The window keeps the last mel frame what it is with full padding; all frames that the mask shows are the same.
        """
        extractor = self.processor.feature_extractor
        hops = -(-(max(len(clip.audio) for clip in clips) + extractor.n_fft) // extractor.hop_length)
        return hops * extractor.hop_length


def _medium(clip: Media | None) -> str:
    """What the chat template calls a clip."""
    return "audio" if clip is not None and clip.kind == "audio" else "video"
