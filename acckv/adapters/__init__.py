"""Model families, and the one way to load a checkpoint of any of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    Gemma4ForConditionalGeneration,
    Gemma4UnifiedForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen3OmniMoeThinkerForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from acckv.adapters.base import AttentionLayer, ModelAdapter
from acckv.adapters.gemma4 import Gemma4Adapter, Gemma4UnifiedAdapter
from acckv.adapters.generic import GenericAdapter
from acckv.adapters.processors import TextProcessor
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

__all__ = [
    "ADAPTERS",
    "AttentionLayer",
    "GenericAdapter",
    "ModelAdapter",
    "TextProcessor",
    "find_adapter",
    "load_model",
    "load_processor",
]


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
    """Load an AV-LLM and its processor, or a plain decoder and its tokenizer as a :class:`TextProcessor`.

    Args:
        name: 'tiny' for the packaged AV-LLM, else a folder or a hub id.
        dtype: float32, bfloat16 or float16.

    Raises:
        InputError: unknown dtype, unreadable checkpoint, or a family without adapter.
    """
    if dtype not in DTYPES:
        raise InputError(f"{dtype!r} is not one of {', '.join(DTYPES)}", field="dtype")
    name = _checkpoint(name)
    with _readable(name):
        kind = _family(name)
        towers = TOWER_ATTENTION.get(kind, {})
        attention = (
            {"": attn_implementation, "text_config": attn_implementation, **towers} if towers else attn_implementation
        )
        loader: Any = MODEL_CLASSES.get(kind, AutoModelForCausalLM)
        model: Any = loader.from_pretrained(name, dtype=DTYPES[dtype], attn_implementation=attention)
    processor = load_processor(name, dtype)
    if isinstance(processor, TextProcessor):
        find_adapter(model)
        processor = replace(processor, embed=model.get_input_embeddings())
    return model.to(device).eval(), processor


def load_processor(name: str | Path, dtype: str = "float32") -> Any:
    """The processor of an AV-LLM alone; of a plain decoder a :class:`TextProcessor` that cannot embed.

    Args:
        name, dtype: as for :func:`load_model`.

    Raises:
        InputError: unreadable checkpoint, or a family without adapter.
    """
    name = _checkpoint(name)
    with _readable(name):
        if _family(name) in MODEL_CLASSES:
            return AutoProcessor.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        width = AutoConfig.from_pretrained(name).get_text_config().hidden_size
    if tokenizer.pad_token is None:  # what stands where padding is masked does not matter
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError("has neither a padding nor an end token", source=name, field="tokenizer")
    return TextProcessor(tokenizer, width, DTYPES[dtype])


def _checkpoint(name: str | Path) -> str | Path:
    from acckv.tiny import TINY_MODEL

    return TINY_MODEL if name == "tiny" else name


def _family(name: str | Path) -> str:
    """The model type of a checkpoint that can be served."""
    kind = AutoConfig.from_pretrained(name).model_type
    if kind not in MODEL_CLASSES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        known = ", ".join(MODEL_CLASSES)
        raise InputError(f"model_type {kind!r} is not one of {known}, and no causal language model", source=name)
    return kind


@contextmanager
def _readable(name: str | Path) -> Iterator[None]:
    """What transformers says of a checkpoint that it cannot read, in one line."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot be loaded: {str(error).splitlines()[0]}", source=name) from error
