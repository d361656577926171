"""A session: the scope in which a model's cache is compressed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from acckv import lora
from acckv.adapters import find_adapter
from acckv.attention import region_mask, shadow_attention
from acckv.cache import CompressedCache, CompressedLayer, adopt, branch_layers, compressed_layers
from acckv.compressor import KVCompressor
from acckv.errors import InputError
from acckv.modality import Modality, ModalityMap
from acckv.pipeline import LayerPlan
from acckv.policies.base import Rows
from acckv.ragged import (
    DecoderInputs,
    decoder_inputs,
    next_position,
    rope_positions,
    scatter_back,
    take,
    watched_rows,
    window,
)
from acckv.repetition import REPEAT_PROMPT, Record, watch_repetition
from acckv.rotary import Rotation
from acckv.scoring import Observation


@dataclass(frozen=True)
class Prefill:
    """A full-cache prefill and what was observed in it: compressed as often and as strongly as one likes.

    Attributes:
        cache: the full cache, one CompressedLayer a layer, not compressed yet.
        labels: modality of every entry.
        observations: by layer, rows of the prompt.
        probes: by layer, rows of the probe prompt, or None where none was run.
        next_position: ``[B, 1]``, where text after the prompt goes on.
        adapted: whether LoRA acted on the prompt (scope 'all').
        embedded: what went into the decoder; another prefill can start from it.
        logits: of the last token, ``[B, vocabulary]``, before compression; None where it started from embeddings.
        repetition: by layer, what a repetition of the context attends to; empty until a policy first asks for it.
    """

    cache: Cache
    labels: ModalityMap
    observations: list[Observation]
    probes: list[Observation] | None
    next_position: Tensor
    adapted: bool
    embedded: DecoderInputs
    logits: Tensor | None
    repetition: list[Tensor] = field(default_factory=list)


class Session:
    """Open with ``with compressor(model) as session``; the model is as before on exit.

    Inside, ``model.generate`` and plain forwards with a cache compress on their own. :meth:`compress` and
    :meth:`answer` are for several questions about one clip.

    Args:
        compressor: what to do; model: of a supported family; processor: tokenises the probe prompt, if one is needed.
        probe_prompt: text run once after the media and forgotten, whose attention stands for the question's.
    """

    def __init__(
        self,
        compressor: KVCompressor,
        model: Any,
        processor: Any = None,
        probe_prompt: str = "describe the clip",
    ) -> None:
        self.compressor = compressor
        self.adapter = find_adapter(model)
        self.model = model
        self.processor = processor
        self.probe_prompt = probe_prompt
        self.last_cache: CompressedCache | None = None
        self.attached: lora.AttachedLora | None = None
        self._stack = ExitStack()
        self._labels: ModalityMap | None = None
        self._context_length: Tensor | None = None
        self._record: Record | None = None
        self._plans: list[LayerPlan] | None = None
        self._passive = False
        self._cache: Cache | None = None
        self._captured: dict[str, Any] | None = None
        if compressor.base is not None:
            self._check_base(compressor.base)

    # ------------------------------------------------------------------ scope

    def _check_base(self, base: dict[str, Any]) -> None:
        """A calibrated compressor fits one architecture."""
        for name, size in self.adapter.dimensions.items():
            if base.get(name) != size:
                raise InputError(
                    f"was calibrated for {base.get('name')} with {name} {base.get(name)}; this model has {size}",
                    source=self.compressor.source,
                    field=name,
                )

    def __enter__(self) -> Session:
        adapter = self.adapter
        with ExitStack() as stack:
            if self.compressor.lora is not None:
                fresh = self.compressor.lora.tensors or None
                self.attached = lora.AttachedLora(adapter, self.compressor.lora.config, fresh)
                stack.callback(self.attached.remove)
            stack.enter_context(
                shadow_attention(adapter.attention_modules, adapter.attention_implementation, self._attend)
            )
            handle = self.model.register_forward_pre_hook(self._before_model, with_kwargs=True)
            stack.callback(handle.remove)
            stack.enter_context(self._shadow_decoder())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._labels = self._context_length = self.attached = None

    def _shadow_decoder(self) -> ExitStack:
        """Run the decoder through `_decode` by an instance attribute that hides the class's forward."""
        decoder = self.adapter.decoder
        own = vars(decoder).get("forward")
        original = decoder.forward
        decoder.forward = lambda *args, **kwargs: self._decode(original, *args, **kwargs)
        stack = ExitStack()
        stack.callback(lambda: setattr(decoder, "forward", own) if own is not None else delattr(decoder, "forward"))
        return stack

    # ------------------------------------------------------- several questions

    def prefill(
        self, embedded: DecoderInputs | None = None, rows: Rows = "all", gradients: bool = False, **inputs: Any
    ) -> Prefill:
        """Run the model over `inputs` with the full cache, observing; nothing is compressed.

        Args:
            embedded: of an earlier prefill, instead of `inputs`: the encoders need not run again.
            rows: rows to record; 'all' serves every policy (the probe prompt's too, where a processor was given).
            gradients: keep the graph, to train LoRA of scope 'all'.
            inputs: as for the model, media included; with `when: context` up to the end of the media.
        """
        self._require_open()
        with torch.set_grad_enabled(gradients):
            return self._prefill(inputs if embedded is None else embedded, rows)

    @torch.no_grad()
    def compress(self, prefill: Prefill | None = None, ratio: float | None = None, **inputs: Any) -> CompressedCache:
        """The compressed cache of a prefill, or of model `inputs` that are prefilled first.

        Args:
            ratio: kept share, replaces the config's.
        """
        self._require_open()
        if prefill is None:
            prefill = self._prefill(inputs, rows=self.compressor.policy.rows)
        if prefill.adapted != self.adapts_prompt:
            raise InputError("was made with other LoRA weights; run this session's own prefill", field="prefill")
        cache = CompressedCache(branch_layers(prefill.cache.layers), prefill.labels, prefill.next_position)
        if not self.compressor.keeps_all(ratio):
            for layer, plan in zip(compressed_layers(cache), self.plan(prefill, ratio), strict=True):
                layer.commit(plan, prefill.labels)
        self.last_cache = cache
        return cache

    def plan(self, prefill: Prefill, ratio: float | None = None, temperature: float | None = None) -> list[LayerPlan]:
        """What :meth:`compress` would keep; with a temperature, the differentiable twin of it."""
        observations = self._watched(prefill)
        scores = self.compressor.scores(observations, prefill.labels)
        return self.compressor.plan(scores, observations, prefill.labels, ratio, temperature)

    @torch.no_grad()
    def answer(
        self, cache: CompressedCache, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Continue a compressed context with a question, by ``model.generate``; the cache is not consumed.

        Args:
            input_ids: ``[rows, length]`` of the question and what opens the answer, padded on the left; `rows` is a
                multiple n of the cache's batch, with the n questions about one clip side by side.
            attention_mask: 0 where padded.
            options: of generate.

        Returns:
            the new tokens ``[rows, new]``.
        """
        self._require_open()
        batch = cache.labels.labels.shape[0]
        if input_ids.shape[0] % batch:
            raise InputError(f"{input_ids.shape[0]} rows do not divide over {batch} clips", field="input_ids")
        branch = cache.branch(input_ids.shape[0] // batch)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        # generate slices what the cache has seen off the front; what stands there does not matter.
        context = input_ids.new_zeros(input_ids.shape[0], branch.get_seq_length())
        ids = torch.cat([context, input_ids], dim=1)
        mask = torch.cat([branch.labels.real.to(attention_mask.dtype), attention_mask], dim=1)
        positions = self.adapter.text_positions(branch.next_position + (attention_mask.cumsum(-1) - 1).clamp_min(0))
        positions = torch.nn.functional.pad(positions, (context.shape[1], 0))
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=branch, **options
        )
        out = out if isinstance(out, Tensor) else out.sequences
        return out[:, ids.shape[1] :]

    # ------------------------------------------------------------- simulation

    def simulate(self, prefill: Prefill, plans: list[LayerPlan] | None, **inputs: Any) -> Tensor:
        """Logits of tokens that follow a prefill, reading it through gates instead of an evicted cache.

        It equals physical eviction where the gates are hard, and passes gradients where they are soft. The prefill is
        not consumed.

        Args:
            plans: None reads the full cache (the teacher).
            inputs: input_ids, attention_mask (4-D additive, or 2-D) and position_ids of the new tokens.

        Returns:
            ``[B, tokens, vocabulary]``.
        """
        self._require_open()
        cache = DynamicCache(config=self.adapter.decoder.config)
        cache.layers[:] = branch_layers(prefill.cache.layers)
        self._plans, self._passive = plans, True
        try:
            return self.model(past_key_values=cache, use_cache=True, **inputs).logits
        finally:
            self._plans, self._passive = None, False

    # ------------------------------------------------------------------ inside

    def _require_open(self) -> None:
        if not vars(self.adapter.decoder).get("forward"):
            raise InputError("is closed; use it inside `with compressor(model) as session`", field="session")

    def _before_model(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Label the tokens of this forward while their ids are still known."""
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        self._labels = None
        # A generated token may happen to be a placeholder: media are there only where their features are.
        has_media = any(kwargs.get(name) is not None for name in self.adapter.feature_inputs)
        if isinstance(input_ids, Tensor) and has_media:
            mask = kwargs.get("attention_mask")
            mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
            self._labels = self.adapter.label(input_ids, mask)
            self._context_length = self.adapter.context_length(self._labels, input_ids)

    def _decode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The decoder's forward: compresses when media go by, otherwise as it was."""
        before, self._cache = self._cache, kwargs.get("past_key_values")
        if self._captured is not None:
            self._captured.update(kwargs)
        try:
            if self._compresses():
                return self._decode_media(original, args, kwargs)
            return original(*args, **kwargs)
        finally:
            self._cache = before

    def _compresses(self) -> bool:
        """Whether the tokens of this forward are a prompt with media that must be compressed."""
        if self._passive or self._cache is None or self._labels is None or not bool(self._labels.media.any()):
            return False
        return self.attached is not None or not self.compressor.keeps_all()

    def _decode_media(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache, labels = self._cache, self._labels
        if cache is None or labels is None or args:
            raise InputError("call the decoder with keyword arguments and a cache", field="model")
        if cache.get_seq_length() > 0:
            raise InputError(
                "brings media into a conversation whose cache is already in use; compress each clip in a first turn",
                field="input_ids",
            )
        adopt(cache, len(self.adapter.attention_modules))
        self.last_cache = CompressedCache(cache.layers, labels, DecoderInputs.of(kwargs, labels).next_position)
        if self.compressor.config.when == "context":
            return self._decode_context(original, cache, labels, kwargs)
        observations: list[Observation] = []
        with self._prompt_adapters():
            output = self._observed(observations, labels, self.compressor.policy.rows, original, kwargs)
            observations = self._completed(observations, original, cache, DecoderInputs.of(kwargs, labels), [])
        self._commit(cache, labels, observations)
        return output

    def _decode_context(self, original: Any, cache: Cache, labels: ModalityMap, kwargs: dict[str, Any]) -> Any:
        """`when: context`: each row's media first, compression, then the rest of its prompt on what was kept."""
        length = labels.labels.shape[1]
        starts = labels.real.long().argmax(dim=1)
        ends = torch.maximum(starts, labels.media_end() if self._context_length is None else self._context_length)
        front, rest = window(starts, ends), window(ends, torch.full_like(ends, length))
        front_labels = ModalityMap(take(labels.labels, front, 1, fill=Modality.PADDING))
        rows = self.compressor.policy.rows
        observations: list[Observation] = []
        with self._prompt_adapters():
            inputs = decoder_inputs(kwargs, front, front_labels.real)
            first = self._observed(observations, front_labels, rows, original, inputs)
            if rows == "text":
                after = next_position(inputs["position_ids"])
                observations = self._run_probe(original, cache, front_labels, observations, after)
            observations = self._completed(observations, original, cache, DecoderInputs.of(inputs, front_labels), [])
        self._commit(cache, front_labels, observations)
        mask = torch.cat([front_labels.real, rest >= 0], dim=1)
        output = original(**decoder_inputs(kwargs, rest, mask)) if rest.shape[1] else first
        for layer in compressed_layers(cache):
            if not bool(mask[:, front.shape[1] :].all()):
                layer.compact(mask[:, mask.shape[1] - (layer.physical - layer.region) :])
            layer.seen = length
        parts = [(front, first.last_hidden_state)]
        if rest.shape[1]:
            parts.append((rest, output.last_hidden_state))
        output.last_hidden_state = scatter_back(parts, length)
        return output

    @property
    def adapts_prompt(self) -> bool:
        """Whether LoRA acts on the prompt too, so that a prefill of the base model is of no use here."""
        return self.attached is not None and self.compressor.lora_scope == "all"

    def _prompt_adapters(self) -> Any:
        """LoRA of scope 'after' is off while the prompt runs."""
        if self.attached is not None and not self.adapts_prompt:
            return lora.disabled(self.adapter)
        return nullcontext()

    def _prefill(self, inputs: dict[str, Any] | DecoderInputs, rows: Rows) -> Prefill:
        adapter = self.adapter
        cache = DynamicCache(config=adapter.decoder.config)
        adopt(cache, len(adapter.attention_modules))
        logits: Tensor | None = None
        observations: list[Observation] = []
        probes = None
        self._passive = True
        try:
            with self._prompt_adapters():
                if isinstance(inputs, DecoderInputs):
                    embedded = inputs
                    self._observed(observations, embedded.labels, rows, adapter.decoder, embedded.arguments(cache))
                else:
                    labels = adapter.label(inputs["input_ids"], inputs.get("attention_mask"))
                    inputs = {**inputs, "past_key_values": cache, "use_cache": True}
                    captured: dict[str, Any] = {}
                    self._captured = captured
                    logits = self._observed(observations, labels, rows, self.model, inputs).logits[:, -1]
                    embedded = DecoderInputs.of(captured, labels)
                after = next_position(embedded.position_ids)
                wants_probe = rows == "text" or (rows == "all" and self.processor is not None)
                if wants_probe and self.compressor.config.when == "context":
                    probes = self._run_probe(adapter.decoder, cache, embedded.labels, observations, after)
        finally:
            self._passive, self._captured = False, None
        return Prefill(cache, embedded.labels, observations, probes, after, self.adapts_prompt, embedded, logits)

    def _watched(self, prefill: Prefill) -> list[Observation]:
        """The rows that the policy reads, out of all that were recorded."""
        rows, labels = self.compressor.policy.rows, prefill.labels
        if rows == "text" and self.compressor.config.when == "context":
            if prefill.probes is None:
                raise InputError(_PROBE_REMEDY, field="processor")
            return prefill.probes
        mask = watched_rows(labels, rows, self.compressor.config.window)
        # Recorded rows end where the prompt ends.
        seen = [part.rows(mask[:, mask.shape[1] - part.row_valid.shape[1] :]) for part in prefill.observations]
        with self._prompt_adapters():
            return self._completed(seen, self.adapter.decoder, prefill.cache, prefill.embedded, prefill.repetition)

    @torch.no_grad()
    def _completed(
        self,
        observations: list[Observation],
        decoder: Any,
        cache: Cache,
        embedded: DecoderInputs,
        repetition: list[Tensor],
    ) -> list[Observation]:
        """The observations with what the policy reads besides rows of the prompt.

        Args:
            repetition: filled if it is empty and the policy asks for it.
        """
        policy, start = self.compressor.policy, next_position(embedded.position_ids)
        if policy.rows == "repetition":
            if not repetition:
                prompt = self.model.get_input_embeddings()(self._token_ids(REPEAT_PROMPT, embedded.labels))
                feed = partial(self._feed, decoder)
                positions = self.adapter.text_positions
                repetition += watch_repetition(embedded, cache.layers, prompt, positions, start, feed)
            return [replace(seen, repetition=peak) for seen, peak in zip(observations, repetition, strict=True)]
        if policy.rotated:
            steps = torch.arange(self.compressor.config.horizon, device=start.device)
            ahead = self.adapter.rotation(self.adapter.text_positions(start + steps))
            here = self.adapter.rotation(rope_positions(embedded.position_ids))
            rotation = Rotation(*here, *(part.mean(dim=1) for part in ahead))
            return [replace(seen, rotation=rotation) for seen in observations]
        return observations

    def _commit(self, cache: Cache, labels: ModalityMap, observations: list[Observation]) -> None:
        if self.compressor.keeps_all():
            return
        scores = self.compressor.scores(observations, labels)
        plans = self.compressor.plan(scores, observations, labels)
        for layer, plan in zip(compressed_layers(cache), plans, strict=True):
            layer.commit(plan, labels)

    def _observed(
        self, into: list[Observation], labels: ModalityMap, rows: Rows, call: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Run `call` and record each layer's observation of the rows that are wanted."""
        mask = watched_rows(labels, rows, self.compressor.config.window)
        positions = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)

        def record(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
            seen = Observation(query, key, value, positions, torch.ones_like(mask), labels.real, scaling)
            into.append(seen.rows(mask))

        self._record = record
        try:
            return call(**kwargs)
        finally:
            self._record = None

    def _run_probe(
        self, decoder: Any, cache: Cache, labels: ModalityMap, observations: list[Observation], start: Tensor
    ) -> list[Observation]:
        """Attention of the probe prompt to the whole context; its own entries are taken back afterwards.

        Args:
            start: position of the first probe token ``[B, 1]``.
        """
        ids = self._token_ids(self.probe_prompt, labels)
        length = ids.shape[1]
        steps = torch.arange(length, device=ids.device)
        row_positions = (labels.labels.shape[1] + steps).expand_as(ids)
        valid = torch.ones_like(ids, dtype=torch.bool)
        probes: list[Observation] = []

        def record(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
            front = observations[layer]
            probes.append(Observation(query, front.keys, front.values, row_positions, valid, labels.real, scaling))

        embeds = self.model.get_input_embeddings()(ids)
        positions = self.adapter.text_positions(start + steps)
        self._feed(decoder, cache, embeds, positions, torch.cat([labels.real, valid], dim=1), record)
        cache.crop(-length)
        return probes

    def _feed(
        self, decoder: Any, cache: Cache, embeds: Tensor, position_ids: Tensor, real: Tensor, record: Record
    ) -> None:
        """Run tokens behind what a cache holds, watched by `record` and compressed by nothing.

        Args:
            real: bool ``[B, tokens of the cache + new]``.
        """
        before, self._passive, self._record = self._passive, True, record
        try:
            decoder(
                inputs_embeds=embeds,
                attention_mask=real.long(),
                position_ids=position_ids,
                past_key_values=cache,
                use_cache=True,
            )
        finally:
            self._passive, self._record = before, None

    def _token_ids(self, text: str, labels: ModalityMap) -> Tensor:
        if self.processor is None:
            raise InputError(_PROBE_REMEDY, field="processor")
        tokenizer = getattr(self.processor, "tokenizer", self.processor)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InputError(f"{text!r} has no token in this vocabulary", field="processor")
        return torch.tensor(ids, device=labels.labels.device).expand(labels.labels.shape[0], -1)

    def _attend(
        self,
        original: Any,
        layer: int,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """The shadowed attention function of one decoder layer."""
        if self._record is not None:
            scaling = kwargs.get("scaling")
            self._record(layer, query, key, value, module.scaling if scaling is None else scaling)
        if self._plans is not None:
            plan = self._plans[layer]
            key, value, bias = plan.apply(key, value)
            mask = region_mask(mask, query, key.shape[2], bias.shape[-1], bias)
        else:
            held = self._cache.layers[layer] if self._cache is not None else None
            if isinstance(held, CompressedLayer) and held.region:
                mask = region_mask(mask, query, key.shape[2], held.region, held.bias)
        return original(module, query, key, value, mask, **kwargs)


_PROBE_REMEDY = "this policy watches a prompt of its own: pass the processor, `compressor(model, processor)`"
