"""Qwen2.5-Omni and Qwen3-Omni: a clip with a sound track is interleaved (audio in video).

A clip without one is video only, and sound without pictures is an audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchvision.transforms.v2.functional import resize
from transformers.models.qwen2_vl.video_processing_qwen2_vl import smart_resize

from acckv.data.encoding.base import ChatEncoder
from acckv.data.media import Media
from acckv.errors import InputError


def timing(processor: Any) -> tuple[int, float]:
    """`(position_id_per_seconds, seconds_per_chunk)` of a processor: how sound and pictures are interleaved.

    transformers keeps both as attributes of the processor and does not save them. A processor that differs from the
    defaults (25, 2.0) therefore carries them as extra fields of its feature extractor, which are saved and loaded.
    """
    extractor = processor.feature_extractor
    position_ids = getattr(extractor, "position_id_per_seconds", None) or processor.position_id_per_seconds
    seconds = getattr(extractor, "seconds_per_chunk", None) or processor.seconds_per_chunk
    return position_ids, float(seconds)


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
        if clip.audio is not None and len(clip.audio) > extractor.n_samples:
            limit = extractor.n_samples / extractor.sampling_rate
            seconds = len(clip.audio) / clip.sampling_rate
            raise InputError(f"{seconds:g} s of sound, the processor takes {limit:g} s; cut the clip", source=clip.path)

    def process(self, clips: Sequence[Media], texts: list[str]) -> dict[str, Any]:
        kind = clips[0].kind
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
            for name in ("input_features", "feature_attention_mask"):
                inputs[name] = inputs[name][..., :longest]
        inputs["use_audio_in_video"] = kind == "audio-video"
        return inputs

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
