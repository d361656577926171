"""A session: the scope in which a model's cache is compressed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor

from acckv.cache.cache import CompressedCache, branch_layers, compressed_layers, fresh_cache
from acckv.errors import InputError
from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerPlan
from acckv.models import Family, find_adapter
from acckv.models.batching import DecoderInputs, next_position
from acckv.planner import Planners
from acckv.policies.base import Queries
from acckv.runtime.attention import attention_of_masks, hook_attention
from acckv.runtime.context_reconstruction import drawn_window
from acckv.runtime.continuation import generated_copies, question_inputs
from acckv.runtime.dispatch import Dispatcher
from acckv.runtime.hooks import served
from acckv.runtime.logits import at_index, chosen_logits, last_position
from acckv.runtime.lora import AttachedLora, LoraSets
from acckv.runtime.merged_lora import LoraMode, attach
from acckv.runtime.new_tokens import NewTokens, embedded_tokens, new_mask, read_new_tokens
from acckv.runtime.patching import in_use
from acckv.runtime.prefill import Prefill
from acckv.runtime.prefill_run import ProbePrompt, decoder_arguments
from acckv.runtime.request import Request
from acckv.runtime.simulation import LengthCache, Simulation, without_checkpointing

__all__ = ["Prefill", "Session"]


class Session:
    """Open with ``with compressor(model) as session``; the model is as before on exit.

    Inside, ``model.generate`` and plain forwards with a cache compress on their own. :meth:`compress`, :meth:`extend`
    and :meth:`answer` are for several questions about one clip, several turns, and streams.

    Args:
        planners: decide what is kept; model: of a supported family; processor: tokenises the probe prompt, if one is
            needed.
        lora: the compressor's, or None.
        probe_prompt: text run once after the media and forgotten, whose attention stands for the question's.
        lora_mode: 'merged' holds copies of the weights with the compressor's LoRA in them, so that an adapted token
            costs no more than one of the base model; 'separate' runs LoRA beside the weights, which training and
            quantised weights need; 'auto' merges where the weights are plain and the copies take at most half of the
            free memory, and warns where they would take more.
        family: of the model; None is the one of its model type.
    """

    def __init__(
        self,
        planners: Planners,
        model: Any,
        processor: Any = None,
        lora: LoraSets | None = None,
        probe_prompt: str = "describe the clip",
        lora_mode: LoraMode = "auto",
        family: Family | None = None,
    ) -> None:
        if lora_mode not in get_args(LoraMode):
            raise InputError(f"{lora_mode!r} is not one of {', '.join(get_args(LoraMode))}", field="lora_mode")
        self.planners, self.lora = planners, lora
        model = getattr(model, "_orig_mod", model)  # what torch.compile wraps; prompts run uncompiled in a session
        self.adapter = find_adapter(model, family)
        self.model = self.adapter.model
        self.lora_mode = lora_mode
        self.dispatcher = Dispatcher(planners, self.adapter, ProbePrompt(processor, probe_prompt), lora)
        self._stack = ExitStack()

    # ------------------------------------------------------------------ scope

    def __enter__(self) -> Session:
        adapter = self.adapter
        with ExitStack() as stack:
            stack.enter_context(in_use(adapter.decoder))
            if self.lora is not None:
                self.dispatcher.lora = attach(adapter, self.lora, self.lora_mode)
                stack.callback(self.dispatcher.lora.remove)
            stack.enter_context(attention_of_masks(adapter))
            modules = [layer.module for layer in adapter.attention_layers]
            stack.enter_context(
                hook_attention(modules, adapter.attention_implementation, self.dispatcher.attention_hook.attend)
            )
            stack.enter_context(self.dispatcher.hooks)
            self.dispatcher.policy_inputs.prepare()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        with self.dispatcher.hooks.lock:  # another thread may still generate
            self._stack.close()
            self.dispatcher.lora = None

    @property
    def last_cache(self) -> CompressedCache | None:
        """The cache that was compressed last, by generate or by this session's own methods."""
        return self.dispatcher.last_cache

    @served
    def prefill(
        self, embedded: DecoderInputs | None = None, queries: Queries = "all", gradients: bool = False, **inputs: Any
    ) -> Prefill:
        """Run the model over `inputs` with the full cache, observing; nothing is compressed.

        Args:
            embedded: of an earlier prefill, instead of `inputs`: the encoders need not run again.
            queries: those to record; 'all' serves every policy (the probe prompt's too, where a processor was given).
            gradients: keep the graph, to train LoRA of scope 'all'.
            inputs: as for the model, media included; with `when: context` up to the end of the media.
        """
        if queries not in get_args(Queries):
            raise InputError(f"{queries!r} is not one of {', '.join(get_args(Queries))}", field="queries")
        cache, request = fresh_cache(self.adapter), Request("record", queries=queries)
        logits = None
        if embedded is None:
            inputs = self.adapter.placed(inputs)
            new_tokens = self._read(inputs)
            inputs.pop("modality_ids", None)
            if inputs.get("position_ids") is None:
                start = new_tokens.labels.labels.new_zeros(new_tokens.context_lengths.shape[0], 1)
                inputs["position_ids"] = self.adapter.prompt_positions(inputs, new_tokens.labels.real, start)
        else:
            embedded = embedded.to(self.adapter.device)
            new_tokens, inputs = embedded_tokens(embedded), decoder_arguments(self.adapter, embedded)
            inputs |= {"position_ids": embedded.position_ids, "attention_mask": embedded.labels.real.long()}
        arguments = {**inputs, "cache": cache, "use_cache": True}
        request.new_tokens = new_tokens
        with torch.set_grad_enabled(gradients), without_checkpointing(self.adapter.decoder), self._serving(request):
            if embedded is None:
                logits = chosen_logits(self.model, last_position, partial(self.model, **arguments))[:, -1]
            else:
                self.adapter.decoder(**arguments)
        recorder, embedded = request.recorder, request.embedded
        if recorder is None or embedded is None:
            raise InputError("brings no token", field="input_ids")
        return Prefill(
            cache,
            embedded.labels,
            recorder.observations,
            recorder.probes or None,
            embedded.next_position,
            self.adapts_prompt,
            embedded,
            logits,
        )

    @served
    @torch.no_grad()
    def compress(self, prefill: Prefill | None = None, ratio: float | None = None, **inputs: Any) -> CompressedCache:
        """The compressed cache of a prefill, or of model `inputs`, whose layers are evicted as the prefill goes on.

        Args:
            ratio: kept share, replaces the config's.
        """
        if prefill is None:
            return self.extend(inputs, ratio=ratio)
        if prefill.adapted != self.adapts_prompt:
            raise InputError("was made with other LoRA weights; run this session's own prefill", field="prefill")
        cache = CompressedCache(branch_layers(prefill.cache.layers), prefill.labels, prefill.next_position)
        if not self.planners.keeps_all(ratio):
            labels, candidates = prefill.labels.labels[:, None], prefill.labels.counts()
            is_low = self.planners.is_low(self._ratio(prefill, ratio))
            for layer, plan in zip(compressed_layers(cache), self.plan(prefill, ratio), strict=True):
                layer.commit(plan, labels, candidates, is_low)
        self.dispatcher.last_cache = cache
        return cache

    @served
    @torch.no_grad()
    def extend(
        self,
        chunk: Mapping[str, Any],
        cache: CompressedCache | None = None,
        ratio: float | None = None,
        keep_text: bool = True,
    ) -> CompressedCache:
        """Prefill a further chunk and compress it: the next seconds of a stream, a new clip, a turn of text.

        With a ratio only what is new is compressed. With an absolute budget everything held competes, so that a stream
        of any length never holds more than its budget, its text, and one chunk.

        Args:
            chunk: model inputs of the new tokens alone, media included.
            cache: to go on from; it is not consumed. None starts anew.
            ratio: kept share, replaces the config's ratio or budget.
            keep_text: False lets the chunk's text (markers, time stamps) age with its media, which keeps an endless
                stream flat.
        """
        inputs = self.adapter.placed(chunk)
        seen = 0 if cache is None else cache.get_seq_length()
        new_tokens = self._read({**inputs, "attention_mask": new_mask(inputs, seen)}, seen)
        real, labels = new_tokens.labels.real, new_tokens.labels.labels
        inputs.pop("modality_ids", None)
        if cache is not None and len(labels) != len(cache.labels.labels):
            raise InputError(f"{len(labels)} rows cannot go on from {len(cache.labels.labels)}", field="input_ids")
        if cache is None:
            branch, start = fresh_cache(self.adapter), labels.new_zeros(labels.shape[0], 1)
        else:
            branch = cache.branch()
            start, new_tokens = branch.next_position, new_tokens.after(branch.labels)
            labels = torch.cat([branch.labels.labels, labels], dim=1)
        positions = self.adapter.prompt_positions(inputs, real, start)
        inputs |= {"attention_mask": torch.cat([new_tokens.past, real], dim=1).long(), "position_ids": positions}
        if new_tokens.token_types is not None:
            inputs["mm_token_type_ids"] = new_tokens.token_types
        request = Request("evict", new_tokens if keep_text else new_tokens.with_text_as_media(), ratio=ratio)
        with without_checkpointing(self.adapter.decoder), self._serving(request):
            self.adapter.backbone(**{**inputs, "cache": branch, "use_cache": True})
        self.dispatcher.last_cache = CompressedCache(branch.layers, ModalityMap(labels), next_position(positions))
        return self.dispatcher.last_cache

    @served
    @torch.no_grad()
    def answer(
        self, cache: CompressedCache, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Continue a compressed context with a question, by ``model.generate``; the cache is not consumed.

        Args:
            input_ids: ``[rows, length]`` of the question and what opens the answer, padded on the left; `rows` is a
                multiple n of the cache's batch, with the n questions about one clip side by side.
            attention_mask: 0 where padded.
            options: of generate; beams and several returns take as many copies of the cache.

        Returns:
            the new tokens ``[rows, new]``, or ``[rows * returns, new]``.
        """
        copies = generated_copies(options, self.model.generation_config)
        ids, mask, branch = question_inputs(cache, input_ids, attention_mask, copies, self.adapter.device)
        out = self.model.generate(input_ids=ids, attention_mask=mask, cache=branch, **options)
        out = out if isinstance(out, Tensor) else out.sequences
        return out[:, ids.shape[1] :]

    # ------------------------------------------------- planning, and training

    @served
    def plan(self, prefill: Prefill, ratio: float | None = None, temperature: float | None = None) -> list[LayerPlan]:
        """The plans by which :meth:`compress` would keep entries, one a layer.

        Args:
            ratio: kept share, replaces the config's.
            temperature: above 0 for the differentiable twin of the selection that is shipped; None for that itself.
        """
        if temperature is not None and not temperature > 0:
            raise InputError(f"{temperature!r} is not above 0; None selects as it is shipped", field="temperature")
        policy = self.planners.policy
        seen = prefill.watched(policy, self.planners.config.when)
        repeats = policy.queries == "reconstruction"
        with self.dispatcher.prompt_adapters() if repeats else nullcontext():  # the one that runs the model
            layers, policy_inputs = prefill.cache.layers, self.dispatcher.policy_inputs
            observations = policy_inputs.complete(seen, layers, prefill.embedded, prefill.reconstruction)
        planner = self.planners.at(self._ratio(prefill, ratio))
        return planner.plan(observations, prefill.labels, ratio, temperature)

    @served
    def reconstruction(self, prefill: Prefill) -> list[Tensor]:
        """By compressed layer ``[B, K, N]``, the most attention that each entry gets while the context is repeated."""
        return self.dispatcher.policy_inputs.reconstruction(prefill.cache.layers, prefill.embedded)

    @served
    @torch.no_grad()
    def repetition(self, prefill: Prefill, places: Sequence[float], tokens: int) -> tuple[DecoderInputs, int]:
        """A prompt to repeat the context, then up to `tokens` of it, for :meth:`simulate`; and the prompt's length.

        Args:
            places: by row, 0 to 1, where in the context the repeated tokens lie.
        """
        columns = drawn_window(prefill.labels, places, tokens)
        return self.dispatcher.policy_inputs.repetition(prefill.embedded, columns)

    @served
    def simulate(
        self, prefill: Prefill, plans: list[LayerPlan] | None, logits_at: Tensor | None = None, **inputs: Any
    ) -> Tensor:
        """Logits of tokens that follow a prefill, reading it through gates instead of an evicted cache.

        It equals physical eviction where the gates are hard, and passes gradients where they are soft. The prefill is
        not consumed. Gradient checkpointing may be on: nothing of a simulation is lost before backward, as long as the
        session stays open.

        Args:
            plans: None reads the full cache (the teacher).
            logits_at: int64 ``[wanted]``, tokens whose logits are wanted, counted through all rows; None: all.
            inputs: input_ids, attention_mask (4-D additive, or 2-D) and position_ids of the new tokens. Where they are
                no text: `embedded` (DecoderInputs) in place of ids and positions.

        Returns:
            ``[B, tokens, vocabulary]``, or ``[wanted, vocabulary]``.
        """
        layers = prefill.cache.layers
        embedded, replaced = inputs.pop("embedded", None), {}
        if embedded is not None:  # the model embeds some ids, and its decoder gets these instead
            replaced = decoder_arguments(self.adapter, embedded)
            inputs |= {"input_ids": torch.zeros_like(embedded.labels.labels), "position_ids": embedded.position_ids}
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 4:
            positions = inputs["position_ids"]
            positions = positions[-1] if positions.ndim == 3 else positions
            inputs["attention_mask"] = self.adapter.packed_mask(mask, positions, layers)
        simulation = Simulation(layers, plans, replaced)
        with self._serving(Request("simulate", simulation=simulation)):
            run = partial(self.model, cache=LengthCache(layers), use_cache=True, **inputs)
            logits = run().logits if logits_at is None else chosen_logits(self.model, at_index(logits_at), run)[0]
        if not simulation.reached:
            raise InputError("keeps keyword arguments from its attention, so it cannot be simulated", field="model")
        return logits

    @property
    def attached(self) -> AttachedLora | None:
        """The compressor's LoRA layers while they are on the model; None without any, and where they are merged."""
        return self.dispatcher.lora if isinstance(self.dispatcher.lora, AttachedLora) else None

    @property
    def adapts_prompt(self) -> bool:
        """Whether LoRA acts on the prompt too, so that a prefill of the base model is of no use here."""
        return self.dispatcher.adapts_prompt

    @contextmanager
    def base_projections(self) -> Iterator[None]:
        """The compressor's LoRA, if there is one, is off while the context is open; other threads wait."""
        with self.dispatcher.hooks.lock, self.dispatcher.base_projections():
            yield

    @contextmanager
    def adapted(self, ratio: float) -> Iterator[None]:
        """Simulations use the LoRA of a ratio while the context is open, and other threads wait; caches know their
        own."""
        with self.dispatcher.hooks.lock:
            lora = self.dispatcher.lora
            with nullcontext() if lora is None else lora.selected(self.planners.is_low(ratio)):
                yield

    # ------------------------------------------------------------------ inside

    def _serving(self, request: Request) -> AbstractContextManager[Request]:
        return self.dispatcher.hooks.serving(request)

    def _ratio(self, prefill: Prefill, ratio: float | None) -> float:
        return self.planners.default.ratio_of(prefill.labels, len(prefill.observations), ratio)

    def _read(self, inputs: dict[str, Any], seen: int = 0) -> NewTokens:
        new_tokens = read_new_tokens(self.adapter, inputs, "prompt", inputs.get("modality_ids"), seen)
        return new_tokens.compressed_whole()
