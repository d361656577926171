"""The tiny Qwen2.5-Omni of `tests.families` and its clip, of eight video and ten audio tokens in one segment."""

from __future__ import annotations

from typing import Any

from tests.families import Qwen25OmniInterleaved, Tokenizer

__all__ = ["AUDIO_TOKENS", "VIDEO_TOKENS", "Tokenizer", "build", "context", "prompt"]

VIDEO_TOKENS, AUDIO_TOKENS = 8, 10


def build(layers: int = 3, attention: str = "sdpa") -> Any:
    """4 query heads, 2 KV heads, head size 16; the same weights at every call."""
    family = Qwen25OmniInterleaved()
    family.layers = layers
    return family.build(attention)


def prompt(question: tuple[int, ...] = (20, 21, 22), **options: Any) -> dict[str, Any]:
    """One clip with a question."""
    return Qwen25OmniInterleaved().clip(None, question, sounds=AUDIO_TOKENS, **options)


def context(seed: int = 0, **options: Any) -> dict[str, Any]:
    """One clip up to the end-of-media tokens."""
    return prompt((), seed=seed, **options)
