"""Clips and questions into model inputs, by the encoder of the processor's family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from acckv.errors import InputError
from acckv.models.encoder import Encoder
from acckv.models.family import find_encoder


def encode(
    processor: Any,
    clips: Sequence[Any],
    questions: Sequence[str] | None = None,
    system_prompt: str | Sequence[str | None] | None = None,
) -> dict[str, Any]:
    """Model inputs of a batch of clips, each with its question.

    Args:
        processor: as `acckv.models.load_model` gives it.
        clips: :class:`acckv.models.clips.Media`, all of one `kind`; for a plain decoder
            :class:`acckv.models.clips.PrecomputedClip`.
        questions: one question a clip. None: each prompt ends with the end-of-media tokens (see `encode_context`).
        system_prompt: text before the media: one for all clips, or one a clip. None is that of the chat template.

    Returns:
        what `model(**inputs)` and `model.generate(**inputs)` take, rows padded on the left; `modality_ids` of a plain
        decoder are read by a session.

    Raises:
        InputError: a batch of clips of several kinds, a clip that the processor cannot take, a processor without an
            encoder, or a system prompt for a chat template that has no place for it before the media.
        ValueError: no clip, or not one question or system prompt a clip.
    """
    if not clips:
        raise ValueError("encode needs at least one clip")
    if questions is not None and len(questions) != len(clips):
        raise ValueError(f"{len(clips)} clips need {len(clips)} questions, got {len(questions)}")
    given = [system_prompt] * len(clips) if system_prompt is None or isinstance(system_prompt, str) else system_prompt
    if len(given) != len(clips):
        raise ValueError(f"{len(clips)} clips need {len(clips)} system prompts, got {len(given)}")
    return _encoder(processor, clips).encode(clips, questions, given)


def encode_context(processor: Any, clip: Any, system_prompt: str | None = None) -> dict[str, Any]:
    """Model inputs of one clip up to and including its end-of-media tokens: no question, batch of one.

    Its tokens are exactly the first ones of `encode` for every question; the rest are `question_suffix`.
    """
    return encode(processor, [clip], None, system_prompt)


def encode_media(processor: Any, clip: Any) -> dict[str, Any]:
    """Model inputs of the media of one clip and of their begin and end tokens alone, batch of one.

    There is no system prompt among them. They go on after a conversation or after the clip before:
    :meth:`acckv.runtime.session.Session.extend`.
    """
    return _encoder(processor, [clip]).encode_media(clip)


def question_suffix(processor: Any, question: str) -> Tensor:
    """Token ids after the media (of any kind), from the question to the start of the answer: int64 [tokens].

    They are the same for every system prompt, which stands before the media.
    """
    return _encoder(processor).question_suffix(question)


def _encoder(processor: Any, clips: Sequence[Any] = ()) -> Encoder:
    encoder = find_encoder(processor)
    for clip in clips:
        if not isinstance(clip, encoder.clip_type):
            kinds = f"{encoder.clip_type.__name__}, not {type(clip).__name__}"
            raise InputError(f"a {type(processor).__name__} takes clips as {kinds}", source=clip.path)
    return encoder
