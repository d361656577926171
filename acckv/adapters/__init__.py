"""Model families, and the one way to load a checkpoint of any of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoProcessor,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)

from acckv.adapters.base import AttentionLayer, ModelAdapter
from acckv.adapters.gemma4 import Gemma4Adapter, Gemma4UnifiedAdapter
from acckv.adapters.generic import GenericAdapter
from acckv.adapters.qwen2_5_omni import Qwen25OmniAdapter
from acckv.adapters.qwen3_omni_moe import Qwen3OmniMoeAdapter
from acckv.errors import InputError

ADAPTERS: tuple[type[ModelAdapter], ...] = (
    Qwen25OmniAdapter,
    Qwen3OmniMoeAdapter,
    Gemma4Adapter,
    Gemma4UnifiedAdapter,
)
#: config.model_type -> the class that generates text.
MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {
    "qwen2_5_omni": Qwen2_5OmniThinkerForConditionalGeneration,
    "qwen2_5_omni_thinker": Qwen2_5OmniThinkerForConditionalGeneration,
    "qwen3_omni_moe": Qwen3OmniMoeThinkerForConditionalGeneration,
    "qwen3_omni_moe_thinker": Qwen3OmniMoeThinkerForConditionalGeneration,
    "gemma4": Gemma4ForConditionalGeneration,
    "gemma4_unified": Gemma4UnifiedForConditionalGeneration,
}
#: config.model_type -> attention of parts that cannot run the one that is asked for.
TOWER_ATTENTION: dict[str, dict[str, str]] = {"gemma4": {"audio_config": "eager"}}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

__all__ = ["ADAPTERS", "AttentionLayer", "GenericAdapter", "ModelAdapter", "find_adapter", "load_model"]


def find_adapter(model: Any) -> ModelAdapter:
    """The adapter of a loaded model: its family's, else the generic one.

    Raises:
        InputError: nothing fits; the message says what is missing and which model types are supported.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    for family in ADAPTERS:
        if kind in family.model_types:
            adapter = family(model)
            break
    else:
        try:
            adapter = GenericAdapter(model)
        except InputError as error:
            known = ", ".join(name for family in ADAPTERS for name in family.model_types)
            raise InputError(f"{error}; supported model types: {known}, and decoders given modality_ids") from error
    adapter.check()
    return adapter


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
        towers = TOWER_ATTENTION.get(kind, {})
        attention = (
            {"": attn_implementation, "text_config": attn_implementation, **towers} if towers else attn_implementation
        )
        model: Any = MODEL_CLASSES[kind].from_pretrained(name, dtype=DTYPES[dtype], attn_implementation=attention)
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot be loaded: {str(error).splitlines()[0]}", source=name) from error
    return model.to(device).eval(), processor
