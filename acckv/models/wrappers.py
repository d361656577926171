"""The model that generates text, inside what a user may hold in its place: a peft wrapper, a full Omni model."""

from __future__ import annotations

from typing import Any

from peft import PeftModel

from acckv.errors import InputError


def unwrapped(model: Any) -> Any:
    """The model that generates text: inside a peft wrapper, whose adapters go on acting, or inside a full Omni model.

    Raises:
        InputError: the wrapper adds entries to the cache that no token stands for.
    """
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            kind = model.active_peft_config.peft_type.value
            raise InputError(f"{kind} adds entries to the cache that no modality names; unload it first", field="model")
        return unwrapped(model.get_base_model())
    thinker = getattr(model, "thinker", None)
    return model if thinker is None else thinker
