"""What acckv must know of a model family: where the decoder is, and which tokens are media."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from acckv.errors import InputError
from acckv.modality import ModalityMap


class ModelAdapter(ABC):
    """One model family.

    Attributes:
        model_types: values of ``config.model_type`` that it serves.
        feature_inputs: the forward's arguments that bring media.
        projections: names of the attention projections that LoRA may adapt.
    """

    model_types: ClassVar[tuple[str, ...]]
    # generate may run the encoders by itself and hand on what they made.
    feature_inputs: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "pixel_values_videos",
        "input_features",
        "mm_encoder_outputs",
    )
    projections: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj", "o_proj")

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    @property
    @abstractmethod
    def decoder(self) -> Any:
        """The text model: takes embeddings and the cache."""

    @property
    @abstractmethod
    def attention_modules(self) -> list[Any]:
        """The decoder's attention modules that own a KV cache, in order of layer."""

    @abstractmethod
    def label(self, input_ids: Tensor, attention_mask: Tensor | None) -> ModalityMap:
        """The modality of every token of ``[batch, tokens]`` placeholders."""

    @abstractmethod
    def context_length(self, labels: ModalityMap, input_ids: Tensor) -> Tensor:
        """int64 ``[batch]``: index after the media and the special tokens that close it."""

    @abstractmethod
    def text_positions(self, positions: Tensor) -> Tensor:
        """Position ids as the decoder takes them, for text at `positions` (int64 ``[batch, tokens]``)."""

    def rotation(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 ``[batch, tokens, head size]``, that the decoder rotates by at these positions.

        Args:
            position_ids: as the decoder takes them.
        """
        return self.decoder.rotary_emb(torch.zeros((), device=position_ids.device), position_ids)  # type: ignore[operator]

    @property
    def attention_implementation(self) -> str:
        return self.decoder.config._attn_implementation

    @property
    def dimensions(self) -> dict[str, int]:
        """What an export must agree with: layers, heads and head size of the decoder."""
        first = self.attention_modules[0]
        config = self.decoder.config
        return {
            "layers": len(self.attention_modules),
            "query_heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_size": first.head_dim,
        }

    def projection_names(self, names: tuple[str, ...]) -> list[str]:
        """Full module names of the decoder's projections, never a tower's that has the same leaf name.

        Raises:
            InputError: a name is no projection of this family.
        """
        for name in names:
            if name not in self.projections:
                raise InputError(f"{name!r} is not one of {', '.join(self.projections)}", field="lora_targets")
        wanted = {id(getattr(module, name)) for module in self.attention_modules for name in names}
        return [name for name, module in self.model.named_modules() if id(module) in wanted]
