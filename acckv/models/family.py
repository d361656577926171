"""Model families by `config.model_type`, open to other packages, and the way from a model to its family."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from acckv.errors import InputError
from acckv.io.registry import Registry
from acckv.models.base import ModelAdapter
from acckv.models.encoder import Encoder
from acckv.models.generic import GenericAdapter
from acckv.models.plain_decoder import EmbeddingsEncoder


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model family: all that acckv must know of it.

    Attributes:
        title: for lists.
        model_types: values of `config.model_type`, of its checkpoints and of the model that generates text.
        model_adapter: of a loaded model: where its decoder is, which tokens are media.
        model_class: generates text; None where :func:`acckv.models.load_model` cannot load it.
        encoder: of clips and questions; None where only the user's own model inputs are served.
        part_attention: part of the config, such as "audio_config", -> its attention implementation, for parts that
            cannot run the one that is asked for.
    """

    title: str
    model_types: tuple[str, ...]
    model_adapter: type[ModelAdapter]
    model_class: type[PreTrainedModel] | None = None
    encoder: type[Encoder] | None = None
    part_attention: Mapping[str, str] = field(default_factory=dict)


FAMILIES: Registry[Family] = Registry("family", "acckv.families")
"""By model type. Another package's entry point has the name of a model type; see docs/extending.md."""

GENERIC = Family(title="plain decoders", model_types=(), model_adapter=GenericAdapter, encoder=EmbeddingsEncoder)
"""Any causal language model of transformers that is not of another family."""


def register_family(family: Family) -> Family:
    """Make a family known by its model types.

    Raises:
        InputError: another module has registered one of them.
    """
    for model_type in family.model_types:
        FAMILIES.register(model_type, family, family.model_adapter.__module__)
    return family


def find_adapter(model: Any, family: Family | None = None) -> ModelAdapter:
    """The adapter of a loaded model, wrapped by peft or not.

    Args:
        family: of the model; None is the one of its model type, else the generic one.

    Raises:
        InputError: nothing fits; the message says what is missing and which model types are supported.
    """
    model = _unwrapped(model)
    if family is None:
        family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""), GENERIC)
    try:
        adapter = family.model_adapter(model)
    except InputError as error:
        if family is not GENERIC:
            raise
        known = ", ".join(FAMILIES)
        raise InputError(f"{error}; supported model types: {known}, and decoders given modality_ids") from error
    adapter.check()
    return adapter


def _unwrapped(model: Any) -> Any:
    """The model that generates text: inside a peft wrapper, whose adapters go on acting, or inside a full Omni model.

    Raises:
        InputError: the wrapper adds entries to the cache that no token stands for.
    """
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            kind = model.active_peft_config.peft_type.value
            raise InputError(f"{kind} adds entries to the cache that no modality names; unload it first", field="model")
        return _unwrapped(model.get_base_model())
    thinker = getattr(model, "thinker", None)
    return model if thinker is None else thinker


def find_encoder(processor: Any) -> Encoder:
    """The encoder of a processor: that of the nearest of its classes that a family's encoder works with.

    Raises:
        InputError: there is none, or two families disagree.
    """
    encoders = list(dict.fromkeys(family.encoder for family in (*FAMILIES.values(), GENERIC) if family.encoder))
    for kind in type(processor).__mro__:
        fitting = [encoder for encoder in encoders if kind in encoder.processor_types]
        if len(fitting) > 1:
            names = " and ".join(encoder.__qualname__ for encoder in fitting)
            raise InputError(f"{kind.__name__} has two encoders, {names}; give one a subclass", field="processor")
        if fitting:
            return fitting[0](processor)
    known = ", ".join(kind.__name__ for encoder in encoders for kind in encoder.processor_types)
    message = f"clips cannot be encoded for a {type(processor).__name__}, only for {known}"
    raise InputError(message, field="processor")
