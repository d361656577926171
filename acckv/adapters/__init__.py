"""Model families, and the one way to load a checkpoint of any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoProcessor, PreTrainedModel, Qwen2_5OmniThinkerForConditionalGeneration

from acckv.adapters.base import ModelAdapter
from acckv.adapters.qwen2_5_omni import Qwen25OmniAdapter
from acckv.errors import InputError

ADAPTERS: tuple[type[ModelAdapter], ...] = (Qwen25OmniAdapter,)
#: config.model_type -> the class that generates text.
MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "qwen2_5_omni": Qwen2_5OmniThinkerForConditionalGeneration,
    "qwen2_5_omni_thinker": Qwen2_5OmniThinkerForConditionalGeneration,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

__all__ = ["ADAPTERS", "ModelAdapter", "find_adapter", "load_model"]


def find_adapter(model: Any) -> ModelAdapter:
    """The adapter of a loaded model.

    Raises:
        InputError: no family fits; the message says which do and what was given.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for adapter in ADAPTERS:
        if kind in adapter.model_types:
            return adapter(model)
    known = ", ".join(name for adapter in ADAPTERS for name in adapter.model_types)
    raise InputError(
        f"{type(model).__name__} (model_type {kind!r}) has no adapter; supported model types: {known}", field="model"
    )


def load_model(
    name: str | Path, dtype: str = "float32", device: str = "cpu", attn_implementation: str = "sdpa"
) -> tuple[PreTrainedModel, Any]:
    """Load an AV-LLM and its processor.

    Args:
        name: 'tiny' for the packaged AV-LLM, else a folder or a hub id.
        dtype: float32, bfloat16 or float16.

    Raises:
        InputError: unknown dtype, unreadable checkpoint, or a family without adapter.
    """
    if dtype not in DTYPES:
        raise InputError(f"{dtype!r} is not one of {', '.join(DTYPES)}", field="dtype")
    if name == "tiny":
        from acckv.tiny import TINY_MODEL

        name = TINY_MODEL
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind not in MODEL_CLASSES:
            raise InputError(f"model_type {kind!r} is not one of {', '.join(MODEL_CLASSES)}", source=name)
        model = MODEL_CLASSES[kind].from_pretrained(name, dtype=DTYPES[dtype], attn_implementation=attn_implementation)
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot be loaded: {str(error).splitlines()[0]}", source=name) from error
    return cast(Any, model).to(device).eval(), processor
