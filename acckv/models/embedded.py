"""The tiny AV-LLM that ships with the package, for tests and demonstrations without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

TINY_MODEL: Path = Path(__file__).resolve().parent.parent / "assets" / "tiny_av_llm"
"""Folder of the packaged checkpoint (model and processor)."""


def load_tiny(
    path: str | Path = TINY_MODEL, **model_options: Any
) -> tuple[Qwen2_5OmniThinkerForConditionalGeneration, Qwen2_5OmniProcessor]:
    """Model (in evaluation mode) and processor of the tiny AV-LLM.

    Args:
        path: a checkpoint folder; the packaged one by default.
        model_options: passed on to `from_pretrained` of the model, e.g. `attn_implementation="eager"`.
    """
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(path, **model_options)
    return model.eval(), Qwen2_5OmniProcessor.from_pretrained(path)
