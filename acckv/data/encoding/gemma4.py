"""Gemma 4 and Gemma 4 Unified: time-stamped pictures, then the sound as segments of its own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers.video_utils import VideoMetadata

from acckv.data.encoding.base import ChatEncoder
from acckv.data.media import Media


class Gemma4Encoder(ChatEncoder):
    """Gives `input_ids`, `attention_mask`, `mm_token_type_ids`, and the features of pictures and sound.

    Of a clip with more pictures than the video processor's `num_frames` an even choice is taken, the processor's own.
    Sound that is longer than one segment may be (`audio_seq_length` tokens, 30 s) becomes several segments of equal
    length, so that none is cut off.
    """

    def content(self, clip: Media | None) -> list[dict[str, str]]:
        pictures = [{"type": "video"}] if _has_pictures(clip) else []
        return [*pictures, *({"type": "audio"} for _ in self._segments(clip))]

    def markers(self, clip: Media | None) -> list[str]:
        pictures = [self.processor.video_token] if _has_pictures(clip) else []
        return [*pictures, *(self.processor.audio_token for _ in self._segments(clip))]

    def process(self, clips: Sequence[Media], texts: list[str]) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if _has_pictures(clips[0]):
            metadata = [self._chosen(clip) for clip in clips]
            videos = [clip.frames[chosen.frames_indices] for clip, chosen in zip(clips, metadata, strict=True)]
            arguments |= {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        sound = [segment.numpy() for clip in clips for segment in self._segments(clip)]
        if sound:
            arguments |= {"audio": sound, "audio_kwargs": {"truncation": False}}
        batch = self.processor(
            text=texts,
            add_special_tokens=False,  # the template writes them
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **arguments,
        )
        return {name: value for name, value in batch.items() if isinstance(value, Tensor)}

    def _segments(self, clip: Media | None) -> Sequence[Tensor]:
        """The sound in pieces that the audio encoder takes, each [samples]."""
        if clip is None or clip.audio is None:
            return ()
        milliseconds = self.processor.audio_seq_length * self.processor.audio_ms_per_token
        longest = milliseconds * clip.sampling_rate // 1000
        return clip.audio.tensor_split(-(-len(clip.audio) // longest))

    def _chosen(self, clip: Media) -> VideoMetadata:
        """Which of the clip's pictures are shown, and when they are."""
        metadata = VideoMetadata(total_num_frames=len(clip.frames), fps=clip.fps)
        metadata.frames_indices = list(range(len(clip.frames)))
        shown = self.processor.video_processor.num_frames
        if len(clip.frames) > shown:
            warnings.warn(
                f"the model's processor shows {shown} pictures of a clip; of more an even choice is taken "
                f"(max_frames={shown} reads no more)",
                stacklevel=2,
            )
            metadata.frames_indices = self.processor.video_processor.sample_frames(metadata).tolist()
        return metadata


def _has_pictures(clip: Media | None) -> bool:
    return clip is None or clip.frames is not None
