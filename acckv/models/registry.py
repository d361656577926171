"""The model families that are known, and which of them a loaded model belongs to."""

from __future__ import annotations

from typing import Any

from acckv.errors import InputError
from acckv.models.base import ModelAdapter
from acckv.models.gemma4 import Gemma4Adapter, Gemma4UnifiedAdapter
from acckv.models.generic import GenericAdapter
from acckv.models.qwen2_5_omni import Qwen25OmniAdapter
from acckv.models.qwen3_omni_moe import Qwen3OmniMoeAdapter
from acckv.models.qwen_vl import Qwen3VLAdapter, QwenVLAdapter
from acckv.models.wrappers import unwrapped

ADAPTERS: tuple[type[ModelAdapter], ...] = (
    Qwen25OmniAdapter,
    Qwen3OmniMoeAdapter,
    Gemma4Adapter,
    Gemma4UnifiedAdapter,
    QwenVLAdapter,
    Qwen3VLAdapter,
)


def find_adapter(model: Any) -> ModelAdapter:
    """The adapter of a loaded model, wrapped by peft or not: its family's, else the generic one.

    Raises:
        InputError: nothing fits; the message says what is missing and which model types are supported.
    """
    model = unwrapped(model)
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
