"""The way of each forward of the decoder: compress a prompt, record a prefill, simulate, or plain decoding."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from acckv.cache.cache import CompressedCache, adopt, as_compressed, compressed_layers
from acckv.errors import InputError
from acckv.method.modality import Modality, ModalityMap
from acckv.models.base import ModelAdapter
from acckv.models.batching import next_position, observed_queries
from acckv.planner import Planners
from acckv.runtime.attention import SIMULATION, AttentionHook
from acckv.runtime.hooks import ModelHooks
from acckv.runtime.layer_eviction import LayerEviction
from acckv.runtime.lora import LoraSets, SessionLora
from acckv.runtime.new_tokens import NewTokens
from acckv.runtime.observation import LayerListener, Recorder
from acckv.runtime.policy_inputs import PolicyInputs
from acckv.runtime.prefill_run import Decoder, ProbePrompt, PromptRun
from acckv.runtime.request import Request


class Dispatcher:
    """Sends the decoder's forwards where they belong while a session is open.

    Args:
        probe: the text whose attention stands for the question's.

    Attributes:
        last_cache: of the last prompt that was compressed under the user's own call.
        lora: the compressor's, while it is on the model.
    """

    def __init__(
        self, planners: Planners, adapter: ModelAdapter, probe: ProbePrompt, lora: LoraSets | None = None
    ) -> None:
        self.planners, self.adapter, self.probe = planners, adapter, probe
        self._adapts_prompt = lora is not None and lora.scope == "all"
        self.attention_hook = AttentionHook(adapter.attention_layers)
        self.policy_inputs = PolicyInputs(planners.default, adapter, self.attention_hook, probe.processor)
        self.hooks = ModelHooks(adapter, self._decode, planners.config.when, self._compresses)
        self.last_cache: CompressedCache | None = None
        self.lora: SessionLora | None = None

    def _decode(
        self, original: Decoder, request: Request | None, new_tokens: NewTokens | None, arguments: dict[str, Any]
    ) -> Any:
        """The decoder's forward: compresses when media go by, otherwise as it was."""
        if request is not None and request.simulation is not None:
            replaced = request.simulation.replaced
            if replaced:
                arguments = {name: value for name, value in arguments.items() if name != "input_ids"} | replaced
            return original(**arguments, **{SIMULATION: request.simulation})
        hook, cache = self.attention_hook, arguments.get("cache")
        self._adapt(cache is not None and any(layer.low_ratio for layer in compressed_layers(cache)))
        before, hook.cache, hook.reached = hook.cache, cache, False
        try:
            if new_tokens is None:
                self._check_announced(request, arguments)
            if cache is None or request is None or new_tokens is None:
                output = original(**arguments)
            else:
                new_tokens, arguments = _together(new_tokens, arguments)
                output = self._prompt(request, original, cache, new_tokens, arguments)
        finally:
            hook.cache = before
            hook.forget()
        if not hook.reached and cache is not None and compressed_layers(cache):
            raise InputError(
                "attended by another function than when its session was opened; change it before that", field="model"
            )
        return output

    def _check_announced(self, request: Request | None, arguments: dict[str, Any]) -> None:
        """Refuse a prompt that the user gives to the decoder past its model: what of it is media, nobody knows."""
        tokens = next(
            (arguments[name] for name in ("inputs_embeds", "input_ids") if arguments.get(name) is not None), None
        )
        own = request is not None or self.attention_hook.listener is not None
        if not own and tokens is not None and tokens.shape[1] > 1 and self._compresses():
            raise InputError(
                "had its decoder called past it, which says nothing of media; call the model, or session.compress",
                field="model",
            )

    def _prompt(
        self, request: Request, original: Decoder, cache: Cache, new_tokens: NewTokens, arguments: dict[str, Any]
    ) -> Any:
        """Several new tokens: recorded, compressed, or read on."""
        is_users = request.mode == "user"
        if not is_users:  # nobody gets them
            arguments = {**arguments, "output_hidden_states": False, "output_attentions": False}
        elif not (new_tokens.has_media and self._compresses()):
            return self._read_on(original, cache, new_tokens, arguments)
        elif getattr(self.adapter.decoder, "gradient_checkpointing", False) and self.adapter.decoder.training:
            raise InputError("checkpoints activations, which takes its cache away; call model.eval()", field="model")
        adopt(cache, self.adapter)
        run = PromptRun(self.adapter, self.attention_hook, original, cache, new_tokens, arguments)
        listener, probe = (self._recorder if request.mode == "record" else self._eviction)(run, request)
        is_prompt = new_tokens.has_media or request.mode == "record"
        output = run.run(listener, probe, self.prompt_adapters() if is_prompt else nullcontext())
        if is_users:
            self._note(cache, new_tokens, next_position(run.arguments["position_ids"]))
        return output

    def _read_on(self, original: Decoder, cache: Cache, new_tokens: NewTokens, arguments: dict[str, Any]) -> Any:
        """Tokens that nothing of is compressed."""
        if self.adapter.has_windows and compressed_layers(cache) and new_tokens.labels.is_padded:
            run = PromptRun(self.adapter, self.attention_hook, original, cache, new_tokens.uncompressed(), arguments)
            output = run.run(None, None, nullcontext())
        else:
            output = original(**arguments)
        if isinstance(cache, CompressedCache) and arguments.get("position_ids") is not None:
            cache.note(new_tokens.labels, next_position(arguments["position_ids"]))
        return output

    def _note(self, cache: Cache, new_tokens: NewTokens, start: Tensor) -> None:
        """Take down what a prompt of the user's has brought; text goes on at `start`."""
        labels = new_tokens.labels
        if isinstance(cache, CompressedCache):
            cache.note(labels, start)
        elif new_tokens.seen:
            past = torch.where(new_tokens.past, int(Modality.TEXT), int(Modality.PADDING))
            labels = ModalityMap(torch.cat([past, labels.labels], dim=1))
        self.last_cache = as_compressed(cache, labels, start)

    def _compresses(self) -> bool:
        """Whether media under the user's own call are compressed, or read with an adapter."""
        return self.lora is not None or not self.planners.keeps_all()

    def _eviction(self, run: PromptRun, request: Request) -> tuple[LayerListener | None, Tensor | None]:
        """The listener that evicts while the context runs, and the probe prompt that it needs; none where all is
        kept."""
        if self.planners.keeps_all(request.ratio) or not run.new_tokens.has_media:
            return None, None
        policy = self.planners.policy
        by_probe = policy.queries == "text" and self.planners.config.when == "context"
        probe = self._probe_ids(run) if by_probe else None
        mask = observed_queries(run.context_labels, "none" if by_probe else policy.queries, policy.window_size)
        eviction = LayerEviction(
            self.planners, run.cache, run.observer(mask, probe), run.embedded_context, self.policy_inputs, request.ratio
        )
        self._adapt(eviction.is_low)  # what follows the context is read with the adapter of its ratio
        return eviction, probe

    def _recorder(self, run: PromptRun, request: Request) -> tuple[LayerListener, Tensor | None]:
        """The listener that records the context, and the probe prompt where one is wanted."""
        queries = request.queries
        wanted = queries == "text" or (queries == "all" and self.probe.processor is not None)
        probe = self._probe_ids(run) if wanted and self.planners.config.when == "context" else None
        mask = observed_queries(run.new_tokens.labels, queries, self.planners.policy.window_size)
        request.embedded = run.embedded
        for layer in compressed_layers(run.cache):
            layer.unpack()  # what is recorded is a rectangle
        request.recorder = Recorder(run.observer(mask, probe), run.cache)
        return request.recorder, probe

    def _probe_ids(self, run: PromptRun) -> Tensor:
        labels = run.new_tokens.labels.labels
        return self.probe.ids(labels.shape[0], labels.device)

    def _adapt(self, is_low: bool) -> None:
        if self.lora is not None:
            self.lora.select(is_low)

    @property
    def adapts_prompt(self) -> bool:
        """Whether LoRA acts on the prompt too, so that a prefill of the base model is of no use here."""
        return self.lora is not None and self._adapts_prompt

    def prompt_adapters(self) -> AbstractContextManager[Any]:
        """LoRA of scope 'after' is off while the prompt runs."""
        return nullcontext() if self.adapts_prompt else self.base_projections()

    def base_projections(self) -> AbstractContextManager[Any]:
        """LoRA, if there is any, is off while the context is open."""
        return nullcontext() if self.lora is None else self.lora.disabled()


def _together(new_tokens: NewTokens, arguments: dict[str, Any]) -> tuple[NewTokens, dict[str, Any]]:
    """New tokens and their positions where their embeddings are: accelerate moves them away from the caller's tensors.

    A prompt is planned there; what a layer holds, and what is decided about it, is on the device of that layer.
    """
    embeds, positions = arguments.get("inputs_embeds"), arguments.get("position_ids")
    if embeds is None:
        return new_tokens, arguments
    if positions is not None:
        arguments = {**arguments, "position_ids": positions.to(embeds.device)}
    return new_tokens.to(embeds.device), arguments
