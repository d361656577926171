"""Running the decoder over a prompt: what is compressed first, watched, then the rest on what was kept."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from acckv.cache.cache import compressed_layers, sliding_layers
from acckv.cache.layer import settle_window
from acckv.errors import InputError
from acckv.method.modality import ModalityMap
from acckv.models.base import ModelAdapter
from acckv.models.batching import (
    DecoderInputs,
    column_window,
    gather_columns,
    gather_labels,
    next_position,
    shift_left_padding,
)
from acckv.runtime.attention import AttentionHook
from acckv.runtime.new_tokens import NewTokens
from acckv.runtime.observation import CheckedListener, LayerListener, Observer, record_past, restore_past
from acckv.runtime.outputs import join_outputs, wants_records

Decoder = Callable[..., Any]
#: Under this name a family's token types travel with its embeddings.
TOKEN_TYPES = "mm_token_type_ids"


def decoder_arguments(adapter: ModelAdapter, tokens: DecoderInputs) -> dict[str, Any]:
    """The decoder's arguments for tokens that were embedded before, without their positions and mask."""
    others = {name: tensor for name, tensor in tokens.others.items() if name != TOKEN_TYPES}
    return {"inputs_embeds": tokens.embeds, **adapter.from_tokens(others)}


@dataclass(frozen=True)
class ProbePrompt:
    """Text that is run after the media and forgotten, whose attention stands for the question's.

    Args:
        processor: or tokenizer; None where the user gave none.
    """

    processor: Any
    text: str

    def ids(self, batch: int, device: torch.device) -> Tensor:
        """int64 ``[batch, tokens]``.

        Raises:
            InputError: there is nothing to tokenise it with, or it has no token.
        """
        if self.processor is None:
            raise InputError(
                "this policy watches a prompt of its own: pass the processor, `compressor(model, processor)`",
                field="processor",
            )
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        ids = tokenizer(self.text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InputError(f"{self.text!r} has no token in this vocabulary", field="processor")
        return torch.tensor(ids, device=device).expand(batch, -1)


@dataclass
class PromptRun:
    """One forward of the decoder over new tokens, in up to two windows.

    Args:
        original: the decoder's own forward.
        arguments: it was called with.
        attention_hook: whose listener watches the context.
    """

    adapter: ModelAdapter
    attention_hook: AttentionHook
    original: Decoder
    cache: Cache
    new_tokens: NewTokens
    arguments: dict[str, Any]

    def __post_init__(self) -> None:
        new_tokens = self.new_tokens
        if self.arguments.get("inputs_embeds") is None:  # a plain decoder that got token ids
            others = {name: value for name, value in self.arguments.items() if name != "input_ids"}
            self.arguments = {**others, **self.adapter.embed(self.arguments["input_ids"])}
        # Where columns are counted, gaps were closed when they came.
        self.past = shift_left_padding(new_tokens.past) if self.adapter.has_windows else new_tokens.past
        if self.arguments.get("position_ids") is None:  # the decoder would count columns
            columns = torch.arange(new_tokens.seen, new_tokens.seen + new_tokens.length, device=new_tokens.past.device)
            positions = self.adapter.text_positions(columns.expand(new_tokens.past.shape[0], -1))
            self.arguments = {**self.arguments, "position_ids": positions}
        stops = torch.maximum(new_tokens.context_lengths, new_tokens.labels.host.real.long().argmax(dim=1))
        self.context = column_window(torch.zeros_like(stops), torch.where(new_tokens.context_lengths > 0, stops, 0))
        # Left-aligned, so that there is no gap between the two in any row.
        self.continuation = column_window(stops, torch.full_like(stops, new_tokens.length), align="left")
        self.context_labels = gather_labels(new_tokens.labels, self.context)
        if self.adapter.has_windows and new_tokens.seen and self.context_labels.is_padded:
            raise InputError(
                "brings clips of different length into a later turn of a batch; with sliding-window layers, "
                "go on with one row at a time",
                field="input_ids",
            )

    @property
    def embedded(self) -> DecoderInputs:
        """The new tokens as they enter the decoder."""
        return self._embedded(self.arguments, self.new_tokens.labels, self.new_tokens.token_types)

    @property
    def embedded_context(self) -> DecoderInputs:
        """The context as it enters the decoder."""
        return self._embedded(self.adapter.cut(self.arguments, self.context), self.context_labels, self._types(None))

    def _embedded(self, arguments: dict[str, Any], labels: ModalityMap, types: Tensor | None) -> DecoderInputs:
        others = self.adapter.by_token(arguments)
        if types is not None:
            others[TOKEN_TYPES] = types[:, self.new_tokens.seen :]
        others = {name: tensor.detach() for name, tensor in others.items()}
        return DecoderInputs(arguments["inputs_embeds"].detach(), arguments["position_ids"], labels, others)

    def observer(self, queries: Tensor, probe_ids: Tensor | None) -> Observer:
        """The observer of the context, whose `queries` (bool ``[batch, tokens]``) are read, and of a probe prompt."""
        return Observer(self.context_labels, queries, self.past, 0 if probe_ids is None else probe_ids.shape[1])

    def run(
        self,
        listener: LayerListener | None,
        probe_ids: Tensor | None,
        prompt_adapters: AbstractContextManager[Any],
    ) -> Any:
        """Front, then rest; the decoder's output with what it tells of every token in the order of the tokens.

        Args:
            listener: watches the context.
            probe_ids: ``[batch, tokens]`` run after the context and forgotten.
            prompt_adapters: open while the context runs.
        """
        keep = self.arguments.get("logits_to_keep", 0)
        lengths = (self.continuation >= 0).sum(-1)
        # Layers that share entries skip queries whose output nobody reads.
        in_continuation = isinstance(keep, int) and 0 < keep <= int(lengths.min())
        needs_context = not in_continuation or wants_records(self.arguments, self.adapter.decoder.config)
        runs, output = [], None
        if self.context.shape[1]:
            with prompt_adapters:
                output = self._run_context(listener, probe_ids, needs_context)
            if needs_context:
                runs.append((self.context, output))
        if self.continuation.shape[1]:
            output = self._run_continuation()
            runs.append((self.continuation, output))
        self._count(self.new_tokens.seen + self.new_tokens.length)
        if output is None:
            raise InputError("brings no token", field="input_ids")
        return join_outputs(runs, output, self.new_tokens.length)

    def _run_context(self, listener: LayerListener | None, probe_ids: Tensor | None, needs_context: bool) -> Any:
        inputs = self._cut(self.context, needs_context)
        real = torch.cat([self.past, self.context_labels.real], dim=1)
        if probe_ids is not None:
            after = next_position(inputs["position_ids"]) + torch.arange(probe_ids.shape[1], device=real.device)
            inputs = self.adapter.append_text(inputs, probe_ids, after)
            real = torch.cat([real, torch.ones_like(probe_ids, dtype=torch.bool)], dim=1)
        inputs["attention_mask"] = self.adapter.mask(real, inputs, self.cache, self._types(probe_ids))
        flags = record_past(self.cache) if probe_ids is not None else {}
        checked = None if listener is None else CheckedListener(self.adapter, self.cache, listener)
        self.attention_hook.listener = checked
        try:
            output = self.original(**inputs)
        finally:
            self.attention_hook.listener = None
            restore_past(self.cache, flags)
        if checked is not None:
            checked.finish()
        return output

    def _run_continuation(self) -> Any:
        valid = self.continuation >= 0
        inputs = self._cut(self.continuation, whole=True)
        gaps = not bool(valid.all())
        real = torch.cat([self.past, self.context_labels.real, valid.to(self.past.device)], dim=1)
        inputs["attention_mask"] = self.adapter.mask(real, inputs, self.cache, None)
        flags = record_past(self.cache) if gaps else {}
        try:
            output = self.original(**inputs)
        finally:
            restore_past(self.cache, flags)
        if gaps:
            self._close_gaps(real)
        return output

    def _close_gaps(self, real: Tensor) -> None:
        """Move each row's tokens together, as if the rows had been padded on the left."""
        for layer in compressed_layers(self.cache):
            layer.compact(real[:, real.shape[1] - (layer.physical - layer.region) :])
        for short in sliding_layers(self.cache):
            held = real[:, real.shape[1] - short.keys.shape[-2] :]  # type: ignore[union-attr]
            settle_window(short, held, self.new_tokens.seen + self.new_tokens.length)

    def _count(self, seen: int) -> None:
        """Windows of different width may have counted other columns than the caller's."""
        for layer in compressed_layers(self.cache):
            layer.seen = seen
        for window_layer in sliding_layers(self.cache):
            window_layer.cumulative_length = seen

    def _cut(self, columns: Tensor, whole: bool) -> dict[str, Any]:
        inputs = self.adapter.cut(self.arguments, columns)
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = 0 if whole else 1
        return inputs

    def _types(self, probe_ids: Tensor | None) -> Tensor | None:
        """Token types of everything up to the end of the context."""
        types = self.new_tokens.token_types
        if types is None:
            return None
        parts = [types[:, : self.new_tokens.seen], gather_columns(types[:, self.new_tokens.seen :], self.context, 1)]
        if probe_ids is not None:
            parts.append(torch.zeros_like(probe_ids, dtype=types.dtype))
        return torch.cat(parts, dim=1)
