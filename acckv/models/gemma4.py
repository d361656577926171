"""Gemma 4 and Gemma 4 Unified: sliding and full attention in turn, layers that share keys and values.

Only full-attention layers with entries of their own are compressed, and budgets count those: a sliding window is short
already, and a layer that shares reads what its source keeps. A prompt has time-stamped pictures, then the sound as
segments of its own.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    Gemma4ForConditionalGeneration,
    Gemma4Processor,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedProcessor,
)
from transformers.cache_utils import Cache
from transformers.video_utils import VideoMetadata

from acckv.models.base import ModelAdapter
from acckv.models.batching import gather_columns
from acckv.models.clips import Media
from acckv.models.encoder import ChatEncoder
from acckv.models.family import Family, register_family


class Gemma4Adapter(ModelAdapter):
    """``Gemma4ForConditionalGeneration``.

    Attributes:
        vision_masks: the function of the model's module that makes masks in which the frames of a video see each other
            whole, here in sliding layers.
    """

    vision_masks: ClassVar[str] = "create_masks_for_vision_model"

    @property
    def closing_tokens(self) -> tuple[int, ...]:
        config = self.model.config
        return (config.eoi_token_id, config.eoa_token_index)

    def embed(self, input_ids: Tensor) -> dict[str, Tensor]:
        embedded = super().embed(input_ids)
        if getattr(self.decoder, "hidden_size_per_layer_input", 0):
            embedded["per_layer_inputs"] = self.decoder.get_per_layer_inputs(input_ids)
        return embedded

    def cut(self, arguments: dict[str, Any], columns: Tensor) -> dict[str, Any]:
        inside = super().cut(arguments, columns)
        if arguments.get("per_layer_inputs") is not None:
            inside["per_layer_inputs"] = gather_columns(arguments["per_layer_inputs"], columns, 1)
        return inside

    def by_token(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        inputs = arguments.get("per_layer_inputs")
        return {} if inputs is None else {"per_layer_inputs": inputs}

    def mask(self, real: Tensor, arguments: dict[str, Any], cache: Cache, token_types: Tensor | None) -> Any:
        config = self.decoder.config
        if config.use_bidirectional_attention != "vision" or token_types is None:
            return real.long()
        module = sys.modules[type(self.model).__module__]
        return getattr(module, self.vision_masks)(
            block_sequence_ids=module.get_block_sequence_ids_for_mask(token_types, device=token_types.device),
            config=config,
            inputs_embeds=arguments["inputs_embeds"],
            attention_mask=real,
            cache=cache,
            position_ids=arguments["position_ids"],
        )

    def packed_mask(self, mask: Tensor, positions: Tensor, layers: list[Any]) -> dict[str, Tensor]:
        """One mask a layer type; distances in a window are between positions, since packed questions share them."""
        windows = [layer for layer in layers if getattr(layer, "is_sliding", False)]
        if not windows:
            return {"full_attention": mask}
        cached, tokens = windows[0].keys.shape[-2], positions.shape[1]
        # Positions of this family count tokens, and each question starts at the end of the prefill.
        before = positions.amin(dim=1, keepdim=True) - cached + torch.arange(cached, device=positions.device)
        keys = torch.cat([before, positions], dim=1)
        outside = positions[:, None, :, None] - keys[:, None, None, :] >= windows[0].sliding_window
        sliding = mask[..., mask.shape[-1] - cached - tokens :].masked_fill(outside, torch.finfo(mask.dtype).min)
        return {"full_attention": mask, "sliding_attention": sliding}


class Gemma4UnifiedAdapter(Gemma4Adapter):
    """``Gemma4UnifiedForConditionalGeneration``: patches and samples straight into the decoder, without towers."""

    vision_masks = "create_masks_for_generate"  # as its forward: frames see each other whole in full layers too


class Gemma4Encoder(ChatEncoder):
    """Gives `input_ids`, `attention_mask`, `mm_token_type_ids`, and the features of pictures and sound.

    Of a clip with more pictures than the video processor's `num_frames` an even choice is taken, the processor's own.
    Sound that is longer than one segment may be (`audio_seq_length` tokens, 30 s) becomes several segments of equal
    length, so that none is cut off.
    """

    processor_types = (Gemma4Processor, Gemma4UnifiedProcessor)

    def content(self, clip: Media | None) -> list[dict[str, str]]:
        pictures = [{"type": "video"}] if _has_pictures(clip) else []
        return [*pictures, *({"type": "audio"} for _ in self._segments(clip))]

    def markers(self, clip: Media | None) -> list[str]:
        pictures = [self.processor.video_token] if _has_pictures(clip) else []
        return [*pictures, *(self.processor.audio_token for _ in self._segments(clip))]

    def process(self, clips: Sequence[Media], texts: list[str]) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if _has_pictures(clips[0]):
            pictures = [clip.frames for clip in clips if clip.frames is not None]
            metadata = [self._shown(len(frames), clip.fps) for frames, clip in zip(pictures, clips, strict=True)]
            videos = [frames[shown.frames_indices] for frames, shown in zip(pictures, metadata, strict=True)]
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

    def _shown(self, count: int, fps: float) -> VideoMetadata:
        """The pictures that are shown of a clip of so many, with their times."""
        metadata = VideoMetadata(total_num_frames=count, fps=fps)
        metadata.frames_indices = list(range(count))
        shown = self.processor.video_processor.num_frames
        if count > shown:
            warnings.warn(
                f"the model's processor shows {shown} pictures of a clip; of more an even choice is taken "
                f"(max_frames={shown} reads no more)",
                stacklevel=2,
            )
            metadata.frames_indices = self.processor.video_processor.sample_frames(metadata).tolist()
        return metadata


def _has_pictures(clip: Media | None) -> bool:
    return clip is None or clip.frames is not None


register_family(
    Family(
        title="Gemma 4",
        model_types=("gemma4",),
        model_adapter=Gemma4Adapter,
        model_class=Gemma4ForConditionalGeneration,
        encoder=Gemma4Encoder,
        part_attention={"audio_config": "eager"},
    )
)
register_family(
    Family(
        title="Gemma 4 Unified",
        model_types=("gemma4_unified",),
        model_adapter=Gemma4UnifiedAdapter,
        model_class=Gemma4UnifiedForConditionalGeneration,
        encoder=Gemma4Encoder,
    )
)
