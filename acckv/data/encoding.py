"""Clips and questions into model inputs, for processors of the Qwen2.5-Omni kind.

The prompt is the processor's own chat template: one user message with the video, then the question. A clip with a
sound track is interleaved (audio in video); a clip without one is video only, and sound without pictures is an audio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

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


def encode(processor: Any, clips: Sequence[Media], questions: Sequence[str] | None = None) -> dict[str, Any]:
    """Model inputs of a batch of clips, each with its question.

    Args:
        processor: a Qwen2.5-Omni processor.
        clips: the clips, all of one `kind` (the model marks a whole batch as interleaved or not).
        questions: one question a clip. None: each prompt ends with the end-of-media tokens (see `encode_context`).

    Returns:
        `input_ids` and `attention_mask` [batch, tokens] (left padded), the pixel and mel features of the processor,
        and `use_audio_in_video`, ready for `model(**inputs)` and `model.generate(**inputs)`.

    Raises:
        InputError: a mixed batch, or sound that is longer than the feature extractor takes.
        ValueError: no clip, or not one question a clip.
    """
    if not clips:
        raise ValueError("encode needs at least one clip")
    if questions is not None and len(questions) != len(clips):
        raise ValueError(f"{len(clips)} clips need {len(clips)} questions, got {len(questions)}")
    medium = _medium(clips[0])
    for clip in clips:
        if clip.kind != clips[0].kind:
            missing = "a sound track" if _medium(clip) == medium else "pictures"
            raise InputError(f"clips with and without {missing} cannot share a batch", source=clip.path)
        _check_length(processor, clip)
    if questions is None:
        texts = [_media_prompt(processor, medium)] * len(clips)
    else:
        texts = [_prompt(processor, question, medium) for question in questions]
    return _encode(processor, clips, texts)


def encode_context(processor: Any, clip: Media) -> dict[str, Any]:
    """Model inputs of one clip up to and including its end-of-media tokens: no question, batch of one.

    Its tokens are exactly the first tokens of `encode(processor, [clip], [question])` for every question; the rest
    are `question_suffix(processor, question)`.
    """
    return encode(processor, [clip], None)


def encode_media(processor: Any, clip: Media) -> dict[str, Any]:
    """Model inputs of the media of one clip and of their begin and end tokens alone, batch of one.

    They go on after a conversation or after the clip before: :meth:`acckv.session.Session.extend`.
    """
    _check_length(processor, clip)
    medium = _medium(clip)
    text = _media_prompt(processor, medium)
    begin = processor.vision_bos_token if medium == "video" else processor.audio_bos_token
    return _encode(processor, [clip], [text[text.index(begin) :]])


def question_suffix(processor: Any, question: str) -> Tensor:
    """Token ids after the media (of any kind), from the question to the start of the answer: int64 [tokens]."""
    text = _prompt(processor, question, "video")
    suffix = text[len(_media_prompt(processor, "video", text)) :]
    return torch.tensor(processor.tokenizer(suffix, add_special_tokens=False)["input_ids"], dtype=torch.long)


def _encode(processor: Any, clips: Sequence[Media], texts: list[str]) -> dict[str, Any]:
    """Model inputs of prompts with one video or audio each."""
    kind = clips[0].kind
    arguments: dict[str, Any] = {}
    if kind != "audio":
        arguments |= {"videos": [clip.frames for clip in clips], "fps": clips[0].fps, "do_sample_frames": False}
    if kind != "video":
        options = {"sampling_rate": clips[0].sampling_rate, "max_length": _padded_samples(processor, clips)}
        arguments |= {"audio": [clip.audio.numpy() for clip in clips], "audio_kwargs": options}
    if kind == "audio-video":
        position_ids, seconds = timing(processor)
        arguments |= {
            "audio_from_video_indices": list(range(len(clips))),
            "load_audio_from_video": True,
            "position_id_per_seconds": position_ids,
            "seconds_per_chunk": seconds,
        }
    batch = processor(
        text=texts,
        padding=True,
        padding_side="left",
        return_tensors="pt",
        **arguments,
    )
    inputs: dict[str, Any] = dict(batch)
    if kind != "video":
        longest = int(inputs["feature_attention_mask"].sum(-1).max())
        for name in ("input_features", "feature_attention_mask"):
            inputs[name] = inputs[name][..., :longest]
    inputs["use_audio_in_video"] = kind == "audio-video"
    return inputs


def _medium(clip: Media) -> str:
    """What the chat template calls the clip."""
    return "audio" if clip.kind == "audio" else "video"


def _prompt(processor: Any, question: str, medium: str) -> str:
    content = [{"type": medium, medium: "clip"}, {"type": "text", "text": question}]
    conversation = [{"role": "user", "content": content}]
    return processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)


def _media_prompt(processor: Any, medium: str, text: str | None = None) -> str:
    """The part of a prompt that ends with the (only) end-of-media token."""
    text = _prompt(processor, "", medium) if text is None else text
    token = processor.vision_eos_token if medium == "video" else processor.audio_eos_token
    end = text.find(token)
    if end < 0:
        raise InputError(f"the chat template has no {token} after {medium}", field="chat_template")
    return text[: end + len(token)]


def _padded_samples(processor: Any, clips: Sequence[Media]) -> int:
    """Samples to pad sound to: the longest clip and one window of silence, instead of the extractor's maximum.

    The window keeps the last mel frame what it is with full padding; all frames that the mask shows are the same.
    """
    extractor = processor.feature_extractor
    hops = -(-(max(len(clip.audio) for clip in clips) + extractor.n_fft) // extractor.hop_length)
    return hops * extractor.hop_length


def _check_length(processor: Any, clip: Media) -> None:
    extractor = processor.feature_extractor
    if clip.audio is None:
        return
    if clip.sampling_rate != extractor.sampling_rate:
        message = f"sound was read at {clip.sampling_rate} Hz, the processor needs {extractor.sampling_rate}"
        raise InputError(message, source=clip.path)
    if len(clip.audio) > extractor.n_samples:
        limit = extractor.n_samples / extractor.sampling_rate
        seconds = len(clip.audio) / clip.sampling_rate
        raise InputError(f"{seconds:g} s of sound, the processor takes {limit:g} s; cut the clip", source=clip.path)
