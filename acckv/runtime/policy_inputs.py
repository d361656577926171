"""Inputs of some policies besides observed queries: the rotary embedding, or the context fed in again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acckv.cache.cache import CompressedCache
from acckv.method.modality import ModalityMap
from acckv.method.rotary import RotaryLayout, Rotation
from acckv.method.scoring import Observation
from acckv.models.base import AttentionLayer, ModelAdapter
from acckv.models.batching import DecoderInputs, next_position, rope_positions
from acckv.planner import Planner
from acckv.runtime.attention import AttentionHook
from acckv.runtime.context_reconstruction import Record, moved_positions, reconstruction_attention, repeat_prompt
from acckv.runtime.prefill_run import ProbePrompt, decoder_arguments
from acckv.runtime.rotary_probe import find_layouts, spread


class PolicyInputs:
    """Completes observations for the policy of a planner, with the session's model.

    Args:
        attention_hook: through which the decoder's attention is watched; processor: tokenises the repeat prompt.
    """

    def __init__(self, planner: Planner, adapter: ModelAdapter, attention_hook: AttentionHook, processor: Any) -> None:
        self.policy, self.adapter, self.attention_hook = planner.policy, adapter, attention_hook
        self.prompt = ProbePrompt(processor, repeat_prompt(processor, self.policy.repeat_in_chat))
        self.layouts: list[RotaryLayout] = []

    def prepare(self) -> None:
        """Find how each layer turns its queries, where the policy takes that off; the session is open.

        Raises:
            InputError: it cannot be taken off.
        """
        if self.policy.n_future_positions:
            self.layouts = find_layouts(self.adapter, self.attention_hook)

    def rotations(self, position_ids: Tensor) -> list[Rotation | None]:
        """By compressed layer, the rotary embedding of a prompt and of what comes after it, where the policy takes it
        off.

        Args:
            position_ids: of the prompt, as the decoder got them.
        """
        layers = [layer for layer in self.adapter.attention_layers if layer.owner and layer.slot is not None]
        if not self.policy.n_future_positions:
            return [None] * len(layers)
        start = next_position(position_ids)
        later = self.adapter.text_positions(start + torch.arange(self.policy.n_future_positions, device=start.device))
        found: dict[Any, Rotation] = {}
        kinds = [(layout, self.adapter.rotary_kind(layer)) for layer, layout in zip(layers, self.layouts, strict=True)]
        for layer, (layout, kind) in zip(layers, kinds, strict=True):
            if (layout, kind) not in found:  # most models have one for all layers
                cos, sin = self._spread(layout, layer, rope_positions(position_ids))
                ahead_cos, ahead_sin = self._spread(layout, layer, later)
                found[layout, kind] = Rotation(cos, sin, ahead_cos.mean(dim=1), ahead_sin.mean(dim=1), layout)
        return [found[kind] for kind in kinds]

    def _spread(self, layout: RotaryLayout, layer: AttentionLayer, positions: Tensor) -> tuple[Tensor, Tensor]:
        like = torch.zeros(*positions.shape[-2:], layout.head_size, device=positions.device)
        return spread(layout, self.adapter.rotation(positions, layer), like)

    @torch.no_grad()
    def reconstruction(self, layers: list[Any], embedded: DecoderInputs) -> list[Tensor]:
        """By compressed layer ``[B, K, N]``, the most attention that each entry gets while the context is repeated.

        Args:
            layers: of the context's full cache, which stay as they are.
        """
        return reconstruction_attention(embedded, layers, self._repeat_prompt(embedded), self.feed)

    def repetition(self, embedded: DecoderInputs, columns: Tensor) -> tuple[DecoderInputs, int]:
        """The repeat prompt and a column window of a context, at the positions after it; and the prompt's length."""
        prompt = self._repeat_prompt(embedded)
        positions = moved_positions(embedded.position_ids, columns, prompt.next_position)
        return prompt.followed_by(embedded.gather(columns, positions)), prompt.embeds.shape[1]

    def _repeat_prompt(self, embedded: DecoderInputs) -> DecoderInputs:
        """The repeat prompt at the positions after a context."""
        batch, device = embedded.embeds.shape[0], embedded.embeds.device
        ids = self.prompt.ids(batch, device)
        text = self.adapter.embed(ids)
        positions = self.adapter.text_positions(embedded.next_position + torch.arange(ids.shape[1], device=device))
        return DecoderInputs(text.pop("inputs_embeds"), positions, ModalityMap(torch.zeros_like(ids)), text)

    def feed(self, cache: CompressedCache, tokens: DecoderInputs, real: Tensor, record: Record) -> None:
        """Run tokens behind what a cache holds, watched by `record` and compressed by nothing.

        Args:
            real: bool ``[B, tokens of the cache + new]``.
        """

        def listen(layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
            if layer.owner and layer.slot is not None:
                record(layer.slot, query, key, value, scaling)

        before, self.attention_hook.listener = self.attention_hook.listener, listen
        try:
            self.adapter.decoder(
                **decoder_arguments(self.adapter, tokens),
                position_ids=tokens.position_ids,
                attention_mask=real.long(),
                cache=cache,
                use_cache=True,
            )
        finally:
            self.attention_hook.listener = before

    def complete(
        self, observations: list[Observation], layers: list[Any], embedded: DecoderInputs, reconstruction: list[Tensor]
    ) -> list[Observation]:
        """The observations of a prefill with what the policy reads besides.

        Args:
            reconstruction: filled if it is empty and the policy asks for it.
        """
        if self.policy.queries == "reconstruction":
            if not reconstruction:
                reconstruction += self.reconstruction(layers, embedded)
            return [replace(seen, reconstruction=peak) for seen, peak in zip(observations, reconstruction, strict=True)]
        rotations = self.rotations(embedded.position_ids)
        return [
            replace(seen, rotation=rotation and rotation.to(seen.keys.device))
            for seen, rotation in zip(observations, rotations, strict=True)
        ]


def behind(rotation: Rotation | None, entries: int) -> Rotation | None:
    """A prompt's rotation as seen from a layer that held `entries` before it; those have none that is known."""
    if rotation is None or entries == 0:
        return rotation
    cos, sin = (F.pad(part, (0, 0, entries, 0)) for part in (rotation.cos, rotation.sin))
    return replace(rotation, cos=cos, sin=sin)
