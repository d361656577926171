"""Any decoder of transformers, fed with embeddings and a tensor that says which of them are audio and video.

VideoLLaMA2 and AVicuna are such: towers and a projector of their own in front of a Qwen2 or Llama decoder. A composite
model of transformers, such as LLaVA, is fed as its processor feeds it: its configuration names the placeholder tokens.
"""

from __future__ import annotations

import inspect
import re
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from acckv.errors import InputError
from acckv.method.modality import ModalityMap
from acckv.models.base import ModelAdapter
from acckv.models.batching import gather_columns, is_full_window

#: Arguments of a forward that bring media, by their names in transformers.
MEDIA_INPUTS = re.compile("pixel_values|image|video|audio|speech|input_features|input_values|mm_encoder_outputs")


#: The decoder's tensors that every adapter knows.
KNOWN_INPUTS = ("inputs_embeds", "position_ids", "attention_mask")


class GenericAdapter(ModelAdapter):
    """A causal language model; its media are what `modality_ids` says they are, or else its placeholder tokens.

    Raises:
        InputError: the model lacks something that compression needs; the message names it.
    """

    def __init__(self, model: Any) -> None:
        name = type(model).__name__
        missing = _missing(model)
        if missing is not None:
            raise InputError(f"{name} has no adapter and cannot use the generic one: {missing}", field="model")
        super().__init__(model)

    @property
    def decoder(self) -> Any:
        return self.model.get_decoder()

    @property
    def backbone(self) -> Any:
        return self.model.base_model

    @cached_property
    def feature_inputs(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(name for name in inspect.signature(self.model.forward).parameters if MEDIA_INPUTS.search(name))

    def label(self, input_ids: Tensor, attention_mask: Tensor | None) -> ModalityMap:
        if not input_ids.is_floating_point():
            labels = super().label(input_ids, attention_mask)
            if bool(labels.media.any()):
                return labels
        raise InputError(
            "must be given with the inputs: an integer tensor [batch, tokens], 0 text, 1 video, 2 audio, 3 padding",
            field="modality_ids",
        )

    def prompt_positions(self, inputs: dict[str, Any], real: Tensor, start: Tensor) -> Tensor:
        if self.brings_media(inputs) and hasattr(self.backbone, "get_rope_index"):
            raise InputError(
                f"{type(self.model).__name__} has no adapter, and its media have positions of their own; "
                "compress under model.generate, one clip a conversation",
                field="model",
            )
        return super().prompt_positions(inputs, real, start)

    def cut(self, arguments: dict[str, Any], columns: Tensor) -> dict[str, Any]:
        inside = super().cut(arguments, columns)
        by_token = self.by_token(arguments)
        whole = is_full_window(columns, arguments["inputs_embeds"].shape[1])
        for name, value in arguments.items():
            listed = isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value)
            other = isinstance(value, Tensor) and value.ndim > 1 and name not in (*by_token, *KNOWN_INPUTS)
            if other or (listed and not whole):
                raise InputError(
                    f"hands its decoder {name}, which the generic adapter does not know; "
                    "write an acckv.models.ModelAdapter for it",
                    field="model",
                )
        return {**inside, **{name: gather_columns(value, columns, 1) for name, value in by_token.items()}}

    def by_token(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        shape = arguments["inputs_embeds"].shape[:2]
        return {
            name: value
            for name, value in arguments.items()
            if name not in KNOWN_INPUTS and isinstance(value, Tensor) and value.shape[:2] == shape
        }

    def mask(self, real: Tensor, arguments: dict[str, Any], cache: Cache, token_types: Tensor | None) -> Any:
        _check_causal(arguments.get("attention_mask"))
        return super().mask(real, arguments, cache, token_types)


def _check_causal(mask: Any) -> None:
    """Refuse masks of the model's own in which tokens see later ones; ours are causal.

    Args:
        mask: that the decoder was called with, one a layer type or one for all.
    """
    for given in mask.values() if isinstance(mask, dict) else [mask]:
        if isinstance(given, Tensor) and given.ndim == 4:
            visible = given if given.dtype == torch.bool else given > torch.finfo(given.dtype).min / 2
            real = visible.any(dim=-2, keepdim=True)  # what is padded may see anything
            later = visible.triu(given.shape[-1] - given.shape[-2] + 1)
            if bool((later & real & visible.any(dim=-1, keepdim=True)).any()):
                raise InputError(
                    "lets tokens of its media see later ones, which the generic adapter cannot follow; "
                    "write an acckv.models.ModelAdapter for it",
                    field="model",
                )


def _missing(model: Any) -> str | None:
    """The reason why a model cannot use the generic adapter, with the remedy; None where it can."""
    own = "write an acckv.models.ModelAdapter for it"
    if not isinstance(model, PreTrainedModel):
        return "it is no transformers model; pass the decoder, such as a Qwen2ForCausalLM"
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        return "it is no causal language model; pass the class that generates text"
    if type(model)._sample is not GenerationMixin._sample:  # type: ignore[attr-defined]
        return f"it does not generate tokens of text: it has a loop of its own; {own}"
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if layers is None:
        return f"its decoder has no `layers`; {own}"
    types, _ = get_layer_types_and_kwargs(decoder.config)
    if not set(types) - {"dummy"}:
        return "it has no cache of its own; pass the model whose entries it reads"
    unknown = sorted(set(types) - {"full_attention", "sliding_attention", "dummy"})
    if unknown:
        return f"it has layers of type {', '.join(unknown)}; only attention caches can be compressed"
    if not all(hasattr(layer, "self_attn") for layer in layers):
        return f"its decoder has no `layers[i].self_attn`; {own}"
    if not getattr(type(decoder), "_supports_attention_backend", False):
        return f"its attention does not go through transformers' attention interface; {own}"
    if not all(hasattr(layer.self_attn, "num_key_value_groups") for layer in layers):
        return f"its attention has no `num_key_value_groups`; {own}"
    if any(getattr(layer.self_attn, "is_causal", True) is False for layer in layers):
        return f"its attention is not causal: tokens of a prompt see later ones; {own}"
    return None
