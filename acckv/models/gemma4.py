"""Gemma 4: sliding and full attention in turn, layers that share keys and values, audio after the video.

Only full-attention layers with entries of their own are compressed, and budgets count those: a sliding window is short
already, and a layer that shares reads what its source keeps.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import create_masks_for_generate

from acckv.models.base import ModelAdapter
from acckv.models.batching import gather_columns


class Gemma4Adapter(ModelAdapter):
    """``Gemma4ForConditionalGeneration``."""

    model_types = ("gemma4",)

    @property
    def closing_tokens(self) -> tuple[int, ...]:
        config = self.model.config
        return (config.eoi_token_id, config.eoa_token_index)

    def embed(self, input_ids: Tensor) -> dict[str, Tensor]:
        embedded = super().embed(input_ids)
        if getattr(self.decoder, "hidden_size_per_layer_input", 0):
            embedded["per_layer_inputs"] = self.decoder.get_per_layer_inputs(input_ids)
        return embedded

    def cut(self, arguments: dict[str, Any], columns: Tensor) -> dict[str, Any]:
        inside = super().cut(arguments, columns)
        if arguments.get("per_layer_inputs") is not None:
            inside["per_layer_inputs"] = gather_columns(arguments["per_layer_inputs"], columns, 1)
        return inside

    def by_token(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        inputs = arguments.get("per_layer_inputs")
        return {} if inputs is None else {"per_layer_inputs": inputs}

    def mask(self, real: Tensor, arguments: dict[str, Any], cache: Cache, token_types: Tensor | None) -> Any:
        config = self.decoder.config
        if config.use_bidirectional_attention != "vision" or token_types is None:
            return real.long()
        return self._vision_masks(
            token_types,
            config=config,
            inputs_embeds=arguments["inputs_embeds"],
            attention_mask=real,
            cache=cache,
            position_ids=arguments["position_ids"],
        )

    def packed_mask(self, mask: Tensor, positions: Tensor, layers: list[Any]) -> dict[str, Tensor]:
        """One mask a layer type; distances in a window are between positions, since packed questions share them."""
        windows = [layer for layer in layers if getattr(layer, "is_sliding", False)]
        if not windows:
            return {"full_attention": mask}
        cached, tokens = windows[0].keys.shape[-2], positions.shape[1]
        # Positions of this family count tokens, and each question starts at the end of the prefill.
        before = positions.amin(dim=1, keepdim=True) - cached + torch.arange(cached, device=positions.device)
        keys = torch.cat([before, positions], dim=1)
        sliding = window_mask(mask[..., mask.shape[-1] - cached - tokens :], positions, keys, windows[0].sliding_window)
        return {"full_attention": mask, "sliding_attention": sliding}

    def _vision_masks(self, token_types: Tensor, **arguments: Any) -> dict[str, Tensor | None]:
        """The frames of a video see each other whole, in sliding layers."""
        module = sys.modules[type(self.model).__module__]
        blocks = module.get_block_sequence_ids_for_mask(token_types, device=token_types.device)
        return module.create_masks_for_vision_model(block_sequence_ids=blocks, **arguments)


class Gemma4UnifiedAdapter(Gemma4Adapter):
    """``Gemma4UnifiedForConditionalGeneration``: patches and samples straight into the decoder, without towers."""

    model_types = ("gemma4_unified",)

    def _vision_masks(self, token_types: Tensor, **arguments: Any) -> dict[str, Tensor | None]:
        """As its forward makes them: frames see each other whole in full layers too."""
        module = sys.modules[type(self.model).__module__]
        blocks = module.get_block_sequence_ids_for_mask(token_types, device=token_types.device)
        return create_masks_for_generate(block_sequence_ids=blocks, **arguments)


def window_mask(mask: Tensor, query_positions: Tensor, key_positions: Tensor, window: int) -> Tensor:
    """An additive mask with everything outside a sliding window hidden too.

    Args:
        mask: ``[batch, 1, queries, keys]``; positions: int64 ``[batch, queries]`` and ``[batch, keys]``.
    """
    distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
    return mask.masked_fill(distance >= window, torch.finfo(mask.dtype).min)
