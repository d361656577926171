"""What each forward of the decoder is for: compressing a prompt, recording a prefill, a simulation, plain decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from acckv.cache.cache import CompressedCache, adopt, as_compressed, compressed_layers
from acckv.errors import InputError
from acckv.method.modality import Modality, ModalityMap
from acckv.models.base import ModelAdapter
from acckv.models.batching import DecoderInputs, next_position, observed_queries
from acckv.planner import Planners
from acckv.policies.base import Rows
from acckv.runtime.attention import SIMULATION, Tap
from acckv.runtime.hooks import Wiring
from acckv.runtime.layer_eviction import Eviction
from acckv.runtime.lora import LoraSets, SessionLora
from acckv.runtime.model_inputs import Turn
from acckv.runtime.observation import Recorder, WatchListener
from acckv.runtime.policy_inputs import SecondLook
from acckv.runtime.prefill_run import Decoder, ProbePrompt, PromptRun
from acckv.runtime.simulation import Simulation


@dataclass
class Task:
    """What the next forward is for, when the session itself asked for it.

    Attributes:
        rows: to record for a Prefill; None evicts while it runs, at `ratio` (None: the config's).
        recorder: what was recorded; embedded: the turn as it entered the decoder.
    """

    rows: Rows | None = None
    ratio: float | None = None
    recorder: Recorder | None = None
    embedded: DecoderInputs | None = None


class Router:
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
        self.tap = Tap(adapter.attention_layers)
        self.look = SecondLook(planners.default, adapter, self.tap, probe.processor)
        self.wiring = Wiring(adapter, self._decode, planners.config.when, self._compresses)
        self.last_cache: CompressedCache | None = None
        self.lora: SessionLora | None = None
        self._task: Task | None = None
        self._simulation: Simulation | None = None

    def run(self, call: Callable[..., Any], task: Task, turn: Turn, arguments: dict[str, Any]) -> Any:
        """Call the model, or its backbone, for the session's own sake."""
        with self.wiring.expecting(turn):
            self._task = task
            try:
                return call(**arguments)
            finally:
                self._task = None

    @contextmanager
    def simulating(self, simulation: Simulation) -> Iterator[None]:
        """Attention of the forwards inside goes through a simulation."""
        self._simulation = simulation
        try:
            yield
        finally:
            self._simulation = None

    def _decode(self, original: Decoder, turn: Turn | None, arguments: dict[str, Any]) -> Any:
        """The decoder's forward: compresses when media go by, otherwise as it was."""
        if self._simulation is not None:
            return original(**arguments, **{SIMULATION: self._simulation})
        cache: Cache | None = arguments.get("cache")
        self._adapt(cache is not None and any(layer.low_ratio for layer in compressed_layers(cache)))
        before, self.tap.cache, self.tap.reached = self.tap.cache, cache, False
        try:
            output = self._routed(original, cache, turn, arguments)
        finally:
            self.tap.cache = before
            self.tap.forget()
        if not self.tap.reached and cache is not None and compressed_layers(cache):
            raise InputError(
                "attended by another function than when its session was opened; change it before that", field="model"
            )
        return output

    def _routed(self, original: Decoder, cache: Cache | None, turn: Turn | None, arguments: dict[str, Any]) -> Any:
        if turn is None:
            self._check_announced(arguments)
        if cache is None or turn is None:
            return original(**arguments)
        turn, arguments = _together(turn, arguments)
        if self._task is not None:
            return self._run_task(self._task, original, cache, turn, arguments)
        if turn.has_media and self._compresses():
            return self._compress_prompt(original, cache, turn, arguments)
        return self._read_on(original, cache, turn, arguments)

    def _read_on(self, original: Decoder, cache: Cache, turn: Turn, arguments: dict[str, Any]) -> Any:
        """Tokens that nothing of is compressed."""
        if self.adapter.has_windows and compressed_layers(cache) and turn.labels.is_padded:
            run = PromptRun(self.adapter, self.tap, original, cache, turn.uncompressed(), arguments)
            output = run.run(None, None, nullcontext())
        else:
            output = original(**arguments)
        if isinstance(cache, CompressedCache) and arguments.get("position_ids") is not None:
            cache.note(turn.labels, next_position(arguments["position_ids"]))
        return output

    def _compresses(self) -> bool:
        """Whether media under the user's own call are compressed, or read with an adapter."""
        return self.lora is not None or not self.planners.keeps_all()

    def _check_announced(self, arguments: dict[str, Any]) -> None:
        """Refuse a prompt that the user gives to the decoder past its model: what of it is media, nobody knows."""
        tokens = next(
            (arguments[name] for name in ("inputs_embeds", "input_ids") if arguments.get(name) is not None), None
        )
        own = self.wiring.announced or self.tap.listener is not None
        if not own and tokens is not None and tokens.shape[1] > 1 and self._compresses():
            raise InputError(
                "had its decoder called past it, which says nothing of media; call the model, or session.compress",
                field="model",
            )

    def _run_task(self, task: Task, original: Decoder, cache: Cache, turn: Turn, arguments: dict[str, Any]) -> Any:
        arguments = {**arguments, "output_hidden_states": False, "output_attentions": False}  # nobody gets them
        run = PromptRun(self.adapter, self.tap, original, cache, turn, arguments)
        if task.rows is None:
            listener, probe = self._eviction(run, cache, turn, task.ratio)
        else:
            listener, probe = self._recorder(run, cache, turn, task)
        is_prompt = turn.has_media or task.rows is not None
        return run.run(listener, probe, self.prompt_adapters() if is_prompt else nullcontext())

    def _compress_prompt(self, original: Decoder, cache: Cache, turn: Turn, arguments: dict[str, Any]) -> Any:
        """A prompt under the user's own call."""
        if getattr(self.adapter.decoder, "gradient_checkpointing", False) and self.adapter.decoder.training:
            raise InputError("checkpoints activations, which takes its cache away; call model.eval()", field="model")
        adopt(cache, self.adapter)
        run = PromptRun(self.adapter, self.tap, original, cache, turn, arguments)
        listener, probe = self._eviction(run, cache, turn, None)
        output = run.run(listener, probe, self.prompt_adapters())
        labels, start = turn.labels, next_position(run.arguments["position_ids"])
        if isinstance(cache, CompressedCache):
            cache.note(labels, start)
            self.last_cache = cache
        else:
            if turn.seen:
                past = torch.zeros_like(turn.past, dtype=torch.long).masked_fill(~turn.past, Modality.PADDING)
                labels = ModalityMap(torch.cat([past, labels.labels], dim=1))
            self.last_cache = as_compressed(cache, labels, start)
        return output

    def _eviction(
        self, run: PromptRun, cache: Cache, turn: Turn, ratio: float | None
    ) -> tuple[WatchListener | None, Tensor | None]:
        """Who evicts while the front runs, and the probe prompt that it needs; nobody where all is kept."""
        if self.planners.keeps_all(ratio) or not turn.has_media:
            return None, None
        rows = self.planners.policy.rows
        by_probe = rows == "text" and self.planners.config.when == "context"
        probe = self._probe_ids(turn) if by_probe else None
        mask = observed_queries(run.front_labels, "none" if by_probe else rows, self.planners.config.window)
        watch = run.watch(mask, 0 if probe is None else probe.shape[1])
        eviction = Eviction(self.planners, cache, watch, run.embedded_front, self.look, ratio, by_probe)
        self._adapt(eviction.is_low)  # what follows the front is read with the adapter of its ratio
        return eviction, probe

    def _recorder(
        self, run: PromptRun, cache: Cache, turn: Turn, task: Task
    ) -> tuple[WatchListener | None, Tensor | None]:
        rows: Rows = task.rows or "all"
        wanted = rows == "text" or (rows == "all" and self.probe.processor is not None)
        probe = self._probe_ids(turn) if wanted and self.planners.config.when == "context" else None
        mask = observed_queries(turn.labels, rows, self.planners.config.window)
        task.embedded = run.embedded
        task.recorder = Recorder(run.watch(mask, 0 if probe is None else probe.shape[1]), cache)
        return task.recorder, probe

    def _probe_ids(self, turn: Turn) -> Tensor:
        labels = turn.labels.labels
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


def _together(turn: Turn, arguments: dict[str, Any]) -> tuple[Turn, dict[str, Any]]:
    """A turn and its positions where its embeddings are: the caller's tensors may be elsewhere (accelerate moves them).

    A prompt is planned there; what a layer holds, and what is decided about it, is on the device of that layer.
    """
    embeds, positions = arguments.get("inputs_embeds"), arguments.get("position_ids")
    if embeds is None:
        return turn, arguments
    if positions is not None:
        arguments = {**arguments, "position_ids": positions.to(embeds.device)}
    return turn.to(embeds.device), arguments
