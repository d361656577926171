"""Any decoder of transformers, fed with embeddings and a tensor that says which of them are audio and video.

VideoLLaMA2 and AVicuna are such: towers and a projector of their own in front of a Qwen2 or Llama decoder.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from acckv.adapters.base import ModelAdapter
from acckv.errors import InputError
from acckv.modality import ModalityMap


class GenericAdapter(ModelAdapter):
    """A causal language model; its media are whatever `modality_ids` says they are.

    Raises:
        InputError: the model lacks something that compression needs; the message names it.
    """

    feature_inputs = ()

    def __init__(self, model: Any) -> None:
        name = type(model).__name__
        for missing, remedy in _missing(model):
            raise InputError(
                f"{name} has no adapter and cannot use the generic one: {missing}; {remedy}", field="model"
            )
        super().__init__(model)

    @property
    def decoder(self) -> Any:
        return self.model.get_decoder()

    @property
    def backbone(self) -> Any:
        return self.decoder

    def label(self, input_ids: Tensor, attention_mask: Tensor | None) -> ModalityMap:
        raise InputError(
            "must be given with the inputs: an integer tensor [batch, tokens], 0 text, 1 video, 2 audio, 3 padding",
            field="modality_ids",
        )


def _missing(model: Any) -> list[tuple[str, str]]:
    """What keeps a model from the generic adapter, as (what is missing, what to do)."""
    if not isinstance(model, PreTrainedModel):
        return [("it is no transformers model", "pass the decoder, such as a Qwen2ForCausalLM")]
    if not model.can_generate() or getattr(model.config, "is_encoder_decoder", False):
        return [("it is no causal language model", "pass the class that generates text")]
    decoder = model.get_decoder()
    layers = getattr(decoder, "layers", None)
    if layers is None or not all(hasattr(layer, "self_attn") for layer in layers):
        return [("its decoder has no `layers[i].self_attn`", "write an acckv.adapters.ModelAdapter for it")]
    if not getattr(type(decoder), "_supports_attention_backend", False):
        return [("it does not call transformers' attention functions", "write an acckv.adapters.ModelAdapter for it")]
    if not all(hasattr(layer.self_attn, "num_key_value_groups") for layer in layers):
        return [("its attention has no `num_key_value_groups`", "write an acckv.adapters.ModelAdapter for it")]
    types, _ = get_layer_types_and_kwargs(decoder.config)
    unknown = sorted(set(types) - {"full_attention", "sliding_attention", "dummy"})
    if unknown:
        return [(f"it has layers of type {', '.join(unknown)}", "only attention caches can be compressed")]
    return []
