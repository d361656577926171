"""Greedy answers to questions about the clips of a compressed cache: the one way from a cache to texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acckv.cache.cache import CompressedCache
from acckv.data.encoding import question_suffix
from acckv.models.batching import pad_left
from acckv.runtime.session import Prefill, Session


@dataclass(frozen=True)
class Generated:
    """The text of an answer; `cut` says whether the limit of tokens ended it."""

    text: str
    cut: bool


@dataclass(frozen=True)
class PaddedQuestions:
    """Questions about each clip of a batch, tokenised for one generate call.

    Attributes:
        input_ids, attention_mask: int64 ``[clips * most, tokens]``, left padded; a clip's questions side by side.
        counts: questions of each clip; a clip with fewer than the most is filled up with a repeated one.
    """

    input_ids: Tensor
    attention_mask: Tensor
    counts: list[int]

    @classmethod
    def pack(cls, processor: Any, questions: Sequence[Sequence[str]]) -> PaddedQuestions:
        """The questions of each clip, at least one in all."""
        counts = [len(own) for own in questions]
        filler = next(question for own in questions for question in own)
        padded = [question for own in questions for question in [*own, *[filler] * (max(counts) - len(own))]]
        ids, mask = pad_left([question_suffix(processor, text) for text in padded], processor.tokenizer.pad_token_id)
        return cls(ids, mask, counts)


def answer_questions(
    session: Session,
    processor: Any,
    cache: CompressedCache,
    questions: PaddedQuestions | Sequence[Sequence[str]],
    max_new_tokens: int,
    **options: Any,
) -> list[list[Generated]]:
    """Answers to the questions about each clip of a cache, which is not consumed.

    Args:
        questions: by clip (a row of the cache).
        options: of ``model.generate``, in place of greedy search.
    """
    packed = questions if isinstance(questions, PaddedQuestions) else PaddedQuestions.pack(processor, questions)
    generation = _greedy(processor, max_new_tokens) | options
    new = session.answer(cache, packed.input_ids, packed.attention_mask, **generation)
    texts = decode(session.model, processor, new, max_new_tokens)
    most = len(texts) // len(packed.counts)
    return [texts[most * clip : most * clip + count] for clip, count in enumerate(packed.counts)]


def answer_prompts(
    session: Session, processor: Any, prefill: Prefill, cache: CompressedCache, max_new_tokens: int
) -> list[Generated]:
    """The answer to each prompt that holds its question.

    The first token comes from the prefill, before any compression, as in ``model.generate``; the rest from the cache.
    """
    if prefill.logits is None:
        raise ValueError("a prefill that started from embeddings has no logits")
    new = first = prefill.logits.argmax(-1, keepdim=True)
    if max_new_tokens > 1:
        rest = session.answer(cache, first, **_greedy(processor, max_new_tokens - 1))
        new = torch.cat([first, rest], dim=1)
    return decode(session.model, processor, new, max_new_tokens)


def decode(model: Any, processor: Any, tokens: Tensor, max_new_tokens: int) -> list[Generated]:
    """Generated tokens ``[answers, new]`` as texts, each up to its first end-of-answer token."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    found = []
    for row in tokens.tolist():
        stop = next((position for position, token in enumerate(row) if token in ends), len(row))
        text = processor.tokenizer.decode(row[:stop], skip_special_tokens=True).strip()
        found.append(Generated(text, stop >= max_new_tokens))
    return found


def _greedy(processor: Any, max_new_tokens: int) -> dict[str, Any]:
    """Options of ``model.generate`` for greedy search."""
    pad = processor.tokenizer.pad_token_id
    return {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": pad}
