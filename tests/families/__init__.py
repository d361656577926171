"""Tiny random-weight models of every family's real classes, with clips of any length as their processors would give.

All have token ids below 128, and text ids from 10 to 59. A clip has 4 video tokens a frame and `sounds` audio tokens.
"""

from __future__ import annotations

from typing import Any

from tests.families.base import (
    AUDIO,
    AUDIO_BOS,
    AUDIO_EOS,
    FRAME_TOKENS,
    IMAGE,
    MROPE,
    QUESTION,
    TEXT,
    VIDEO,
    VISION,
    VISION_BOS,
    VISION_EOS,
    Clip,
    Family,
    Tokenizer,
)
from tests.families.decoders import AVicuna, VideoLlama2
from tests.families.gemma4 import Gemma4, Gemma4Large, Gemma4Unified
from tests.families.qwen_omni import Qwen3OmniMoe, Qwen25Omni, Qwen25OmniInterleaved

__all__ = [
    "AUDIO",
    "AUDIO_BOS",
    "AUDIO_EOS",
    "FAMILIES",
    "FRAME_TOKENS",
    "IMAGE",
    "MROPE",
    "QUESTION",
    "TEXT",
    "VIDEO",
    "VISION",
    "VISION_BOS",
    "VISION_EOS",
    "Built",
    "Clip",
    "Family",
    "Qwen25Omni",
    "Qwen25OmniInterleaved",
    "Tokenizer",
]

#: A family and a model of it.
Built = tuple[Family, Any]
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
