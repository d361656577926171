"""The adapter of a model family: its decoder, its media tokens, its positions, the cache layers it writes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, get_layer_types_and_kwargs

from acckv.errors import InputError
from acckv.method.modality import Modality, ModalityMap
from acckv.models.batching import gather_columns
from acckv.models.lora_targets import is_linear, match_names


@dataclass(frozen=True)
class AttentionLayer:
    """One attention module of the decoder and the cache layer it reads.

    Attributes:
        module: calls the attention function.
        cache_index: of the cache layer whose entries it reads.
        slot: index of that cache layer among the compressed ones; None where it is left alone (sliding windows).
        owner: whether it writes these entries; others only read them (layers that share keys and values).
    """

    module: nn.Module
    cache_index: int
    slot: int | None
    owner: bool


class ModelAdapter:
    """One model family. The defaults fit a composite model of transformers: towers, a decoder, placeholder tokens.

    Attributes:
        feature_inputs: the forward's arguments that bring media.
        attention_implementations: those whose masks the session can cut to a compressed layer; it takes the first that
            the decoder has in place of any other.
    """

    # generate may run the encoders by itself and hand on what they made.
    feature_inputs: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "pixel_values_videos",
        "input_features",
        "mm_encoder_outputs",
    )
    attention_implementations: ClassVar[tuple[str, ...]] = ("sdpa", "eager")

    def __init__(self, model: PreTrainedModel) -> None:
        self.model: Any = model

    # ------------------------------------------------------------ the decoder

    @property
    def backbone(self) -> Any:
        """The model without its language-model head: takes what the model takes."""
        return self.model.model

    @property
    def decoder(self) -> Any:
        """The text model: takes embeddings and the cache."""
        return self.backbone.language_model

    @property
    def decoder_attention(self) -> list[nn.Module]:
        """Every attention module of the decoder, in order of layer."""
        return [layer.self_attn for layer in self.decoder.layers]

    @cached_property
    def attention_layers(self) -> list[AttentionLayer]:
        """The cache layer that each attention module of the decoder reads; only full attention is compressed.

        A layer that transformers gives a dummy cache shares the entries of the last layer of its type that has some.
        """
        config = self.decoder.config
        types, _ = get_layer_types_and_kwargs(config)
        kinds = getattr(config, "layer_types", None) or types
        sources: dict[str, tuple[int, int | None]] = {}
        layers, slots = [], 0
        for index, (module, cache_type, kind) in enumerate(zip(self.decoder_attention, types, kinds, strict=True)):
            owner = cache_type != "dummy"
            if owner:
                slot = slots if cache_type == "full_attention" else None
                slots += slot is not None
                sources[kind] = (index, slot)
            source, slot = sources[kind]
            layers.append(AttentionLayer(module, source, slot, owner))
        return layers

    @cached_property
    def attention_modules(self) -> list[nn.Module]:
        """The attention modules whose entries are compressed, in order of layer."""
        return [layer.module for layer in self.attention_layers if layer.owner and layer.slot is not None]

    @property
    def has_windows(self) -> bool:
        """Whether some layers see a sliding window only; distances in it are counted in cache columns."""
        return any(layer.slot is None for layer in self.attention_layers)

    @property
    def device(self) -> torch.device:
        """The device of the embeddings; layers may be elsewhere, and with accelerate's hooks their weights too."""
        embeddings = self.model.get_input_embeddings()
        offloaded = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
        return embeddings.weight.device if offloaded is None else torch.device(offloaded)

    @property
    def attention_implementation(self) -> str:
        return self.decoder.config._attn_implementation

    def check(self) -> None:
        """Refuse what the session cannot serve.

        Raises:
            InputError: names what is missing and what to do.
        """
        if not self.attention_modules:
            raise InputError("has no full-attention layer with a cache of its own to compress", field="model")

    @property
    def dimensions(self) -> dict[str, int]:
        """Number, heads and head size of the layers that are compressed: an export must agree with them."""
        first: Any = self.attention_modules[0]
        query_heads = self.decoder.config.num_attention_heads
        return {
            "layers": len(self.attention_modules),
            "query_heads": query_heads,
            "kv_heads": query_heads // first.num_key_value_groups,
            "head_size": first.head_dim,
        }

    def projections(self, names: tuple[str, ...]) -> dict[str, nn.Module]:
        """Linear layers of the decoder by full module name, never a tower's that has the same leaf name.

        Args:
            names: such as 'q_proj' or 'gate_proj'. Experts of a mixture that are one fused tensor have no such layer.

        Raises:
            InputError: the decoder has no linear layer of a name.
        """
        own = {id(module) for layer in self.decoder.layers for module in layer.modules()}
        modules = self.model.named_modules()
        return match_names(names, {name: each for name, each in modules if id(each) in own and is_linear(each)})

    # ------------------------------------------------------------- the tokens

    def brings_media(self, inputs: dict[str, Any]) -> bool:
        """Whether the model's inputs have features among them; generate hands on an empty mapping where it has none."""
        given = (inputs.get(name) for name in self.feature_inputs)
        return any(value is not None and not (isinstance(value, dict) and not value) for value in given)

    def placed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Model inputs where the model takes them; a user's may come as a processor made them.

        Raises:
            InputError: a name of an option is among them that neither a session nor the model knows.
        """
        known = inspect.signature(self.model.forward).parameters
        for name, value in inputs.items():
            if isinstance(value, bool | int | float | str) and name not in known:
                raise InputError(f"is neither an option here nor an input of {type(self.model).__name__}", field=name)
        device = self.device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}

    def label(self, input_ids: Tensor, attention_mask: Tensor | None) -> ModalityMap:
        """The modality of every token of ``[batch, tokens]`` placeholders, by the ids that the configuration names.

        Args:
            attention_mask: ``[batch, tokens]``, 0 where padded; of a longer mask the last columns count.
        """
        labels = torch.zeros_like(input_ids)
        # In this order, so that a token that stands for both pictures and video is video either way.
        for kind, modality in (("image", Modality.VIDEO), ("video", Modality.VIDEO), ("audio", Modality.AUDIO)):
            for name in (f"{kind}_token_id", f"{kind}_token_index"):
                token = getattr(self.model.config, name, None)
                if isinstance(token, int):
                    labels = labels.masked_fill(input_ids == token, modality)
        if attention_mask is not None:
            labels = labels.masked_fill(attention_mask[:, -input_ids.shape[1] :] == 0, Modality.PADDING)
        return ModalityMap(labels)

    @property
    def closing_tokens(self) -> tuple[int, ...]:
        """Ids of the special tokens that close media."""
        return ()

    def context_length(self, labels: ModalityMap, input_ids: Tensor | None) -> Tensor:
        """int64 ``[batch]``, on the CPU: index after the media and the special tokens that close it."""
        end = labels.media_end()
        if input_ids is None or not self.closing_tokens:
            return end
        input_ids, length = input_ids.cpu(), input_ids.shape[1]
        closing = torch.tensor(self.closing_tokens, dtype=input_ids.dtype)
        for _ in range(2):  # sound inside a video closes twice
            following = input_ids.gather(1, end.clamp(max=length - 1)[:, None])[:, 0]
            end = end + ((end > 0) & (end < length) & torch.isin(following, closing)).long()
        return end

    def text_positions(self, positions: Tensor) -> Tensor:
        """Position ids as the decoder takes them, for text at `positions` (int64 ``[batch, tokens]``)."""
        return positions

    def prompt_positions(self, inputs: dict[str, Any], real: Tensor, start: Tensor) -> Tensor:
        """Position ids of a prompt that goes on at `start`.

        Args:
            inputs: as for the model; real: bool ``[batch, tokens]``, false where padded; start: int64 ``[batch, 1]``.
        """
        return self.text_positions(start + (real.long().cumsum(-1) - 1).clamp_min(0))

    def rotation(self, position_ids: Tensor, layer: AttentionLayer) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines, float32 ``[batch, tokens, width]``, that a layer reads at positions, by the model's own
        function; None where the model has no rotary embedding.

        Args:
            position_ids: as the decoder takes them.
        """
        rotary, kind = self.rotary_kind(layer)
        if rotary is None:
            return None
        options = {} if kind is None else {"layer_type": kind}
        return rotary(torch.zeros((), device=position_ids.device), position_ids, **options)

    def rotary_kind(self, layer: AttentionLayer) -> tuple[nn.Module | None, str | None]:
        """The model's rotary embedding that a layer reads, and the layer type that it asks for, if it does."""
        rotary = getattr(self.decoder, "rotary_emb", None) or getattr(layer.module, "rotary_emb", None)
        if rotary is None or "layer_type" not in inspect.signature(rotary.forward).parameters:
            return rotary, None
        return rotary, self.decoder.config.layer_types[layer.cache_index]

    # ------------------------------------------------- the decoder's arguments

    def embed(self, input_ids: Tensor) -> dict[str, Tensor]:
        """The decoder's arguments of plain text that have a vector a token, each ``[batch, tokens, ...]``."""
        return {"inputs_embeds": self.model.get_input_embeddings()(input_ids)}

    def cut(self, arguments: dict[str, Any], columns: Tensor) -> dict[str, Any]:
        """The decoder's arguments for a column window of its tokens (see :mod:`acckv.models.batching`).

        Args:
            arguments: with inputs_embeds ``[batch, tokens, hidden]`` and position_ids ``[..., batch, tokens]``.
        """
        inside = {"inputs_embeds": gather_columns(arguments["inputs_embeds"], columns, 1)}
        return {**arguments, **inside, "position_ids": gather_columns(arguments["position_ids"], columns, -1)}

    def by_token(self, arguments: dict[str, Any]) -> dict[str, Tensor]:
        """The decoder's arguments a token besides embeddings and positions, each ``[batch, tokens, ...]``.

        Such tensors can be cut, padded and batched without knowing the family.
        """
        return {}

    def from_tokens(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """The decoder's arguments out of what :meth:`by_token` gave."""
        return dict(tensors)

    def append_text(self, arguments: dict[str, Any], input_ids: Tensor, positions: Tensor) -> dict[str, Any]:
        """The decoder's arguments with text after them.

        Args:
            positions: int64 ``[batch, tokens]`` of the text.
        """
        text = {name: torch.cat([arguments[name], value], dim=1) for name, value in self.embed(input_ids).items()}
        before, after = arguments["position_ids"], self.text_positions(positions)
        if before.ndim == 3 and after.ndim == 3 and before.shape[0] == after.shape[0] + 1:
            after = torch.cat([after[:1], after])  # transformers puts plain text positions before the three of M-RoPE
        positions = torch.cat([before, after.expand(*before.shape[:-1], -1)], dim=-1)
        return {**arguments, **text, "position_ids": positions}

    def mask(self, real: Tensor, arguments: dict[str, Any], cache: Cache, token_types: Tensor | None) -> Any:
        """The decoder's attention mask for tokens that follow a cache.

        Args:
            real: bool ``[batch, seen + tokens]``, false where padded.
            arguments: the decoder's, cut.
            token_types: ``[batch, seen + tokens]`` kinds of token as the processor gives them, or None.
        """
        return real.long()

    def packed_mask(self, mask: Tensor, positions: Tensor, layers: list[Any]) -> Any:
        """The model's attention mask of tokens that follow a prefill, several of which may share a position.

        Args:
            mask: additive ``[batch, 1, tokens, seen + tokens]``; positions: int64 ``[batch, tokens]``;
            layers: of the prefill's cache.
        """
        if self.has_windows:
            raise InputError(
                "packs turns with a 4-D mask, which this family's sliding-window layers cannot follow; give 2-D masks",
                field="attention_mask",
            )
        return mask
