"""Hooks of a session in a model: methods in place of its own, all taken back on exit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from threading import RLock
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from acckv.cache.cache import CompressedCache, compressed_layers
from acckv.config import When
from acckv.errors import InputError
from acckv.models.base import ModelAdapter
from acckv.models.batching import shift_left_padding
from acckv.runtime.continuation import following_positions, generated_positions
from acckv.runtime.new_tokens import NewTokens, read_new_tokens
from acckv.runtime.patching import patch_method
from acckv.runtime.request import Request

#: (the decoder's own forward, the request, the new tokens that it brings or None, its arguments) -> its output
Decode = Callable[[Callable[..., Any], Request | None, NewTokens | None, dict[str, Any]], Any]
Method = TypeVar("Method", bound=Callable[..., Any])


class ModelHooks:
    """Open, they read the new tokens of every call of the model and send the decoder's forward through `decode`.

    ``model.generate`` and ``model(...)`` take `modality_ids`, the labels of tokens that no placeholder marks. A prompt
    with media that comes without a cache gets one; where it cannot have one, it is refused.

    Args:
        compresses: whether media are to be compressed, or read with an adapter, at all.

    Attributes:
        lock: held for each request from its start to its end, so that those of several threads are served one after
            another: what a forward is for, the model's own record of positions and LoRA are one for the whole model.
        request: the one that is served, or None.
    """

    def __init__(self, adapter: ModelAdapter, decode: Decode, when: When, compresses: Callable[[], bool]) -> None:
        self.adapter, self.decode, self.when, self.compresses = adapter, decode, when, compresses
        self.lock = RLock()
        self.is_open = False
        self.request: Request | None = None
        self._takes_positions = "position_ids" in inspect.signature(adapter.model.forward).parameters
        self._stack = ExitStack()

    def __enter__(self) -> ModelHooks:
        with ExitStack() as stack:
            stack.enter_context(patch_method(self.adapter.decoder, "forward", self._decoder_forward))
            stack.enter_context(patch_method(self.adapter.model, "forward", self._model_forward))
            stack.enter_context(patch_method(self.adapter.model, "generate", self._generate))
            stack.enter_context(patch_method(self.adapter.model, "init_continuous_batching", _refuse_batching))
            name = "_prepare_position_ids_for_generation"
            stack.enter_context(patch_method(self.adapter.model, name, self._generated_positions))
            self._stack = stack.pop_all()
        self.is_open = True
        return self

    def __exit__(self, *error: object) -> None:
        self.is_open = False
        self._stack.close()

    @contextmanager
    def serving(self, request: Request) -> Iterator[Request]:
        """The forwards inside are for `request`."""
        before, self.request = self.request, request
        try:
            yield request
        finally:
            self.request = before

    def _generate(
        self, original: Callable[..., Any], *args: Any, modality_ids: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """Generation: the first forward brings the prompt, and guesses of assisted decoding after it."""
        tokens = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        mask = kwargs.get("attention_mask")
        whole = mask if isinstance(mask, Tensor) and mask.ndim == 2 else tokens
        with self.lock:
            if not self.is_open:
                raise InputError(
                    "was taken from a session that is closed by now; join its threads first", field="generate"
                )
            self._check_whole({**kwargs, "modality_ids": modality_ids})
            length = whole.shape[1] if isinstance(whole, Tensor) else None
            with self.serving(Request(modality_ids=modality_ids, prompt_length=length)) as request:
                output = original(*args, **kwargs)
            if not request.reached and self.compresses():
                raise InputError(
                    "generated without its decoder's own forward, so that nothing was compressed; replace no part of "
                    "it while a session is open",
                    field="model",
                )
            return output

    def _generated_positions(self, original: Callable[..., Tensor], tokens: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Positions of a call of generate that gave none."""
        cache = renamed(inputs).get("cache")
        if self.is_open and isinstance(cache, CompressedCache):
            return generated_positions(self.adapter, cache, inputs, tokens)
        return original(tokens, inputs)

    def _check_whole(self, options: dict[str, Any]) -> None:
        """Refuse media in a prompt that generate would cut up: each part would be compressed for itself."""
        config = options.get("generation_config") or self.adapter.model.generation_config
        size = options.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
        media = any(options.get(name) is not None for name in (*self.adapter.feature_inputs, "modality_ids"))
        if size and media and self.compresses():
            raise InputError(
                "cuts a prompt up, which is compressed as a whole; leave it off, or feed a long clip to session.extend",
                field="prefill_chunk_size",
            )

    def _one_at_a_time(self) -> AbstractContextManager[Any]:
        """The lock; a graph cannot take one, so compiled forwards of several threads are not kept apart."""
        return nullcontext() if torch.compiler.is_compiling() else self.lock

    def _model_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._one_at_a_time():
            if not self.is_open:
                return original(*args, **kwargs)
            before, request = self.request, self.request or Request()
            self.request = request
            try:
                if request.mode == "user":
                    args, kwargs = self._read(request, args, kwargs)
                return original(*args, **kwargs)
            finally:
                self.request, request.new_tokens = before, None  # an error on the way to the decoder leaves them

    def _read(
        self, request: Request, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Read the new tokens while their ids are still known; the model's arguments as they go on."""
        kwargs = renamed(kwargs)
        modality_ids = kwargs.pop("modality_ids", None)
        request.new_tokens = None
        inputs = {**kwargs, "input_ids": kwargs.get("input_ids", args[0] if args else None)}
        tokens = inputs["input_ids"] if isinstance(inputs["input_ids"], Tensor) else inputs.get("inputs_embeds")
        if not isinstance(tokens, Tensor):
            return args, kwargs
        if kwargs.get("cache") is None:
            kwargs |= self._missing_cache(inputs, request.modality_ids if modality_ids is None else modality_ids)
        cache = kwargs.get("cache")
        if cache is None:
            return args, kwargs
        seen, length = cache.get_seq_length(), tokens.shape[1]
        if not length:
            raise InputError(
                f"brings no token after the {seen} that the cache has seen: give the ids of the whole conversation, or "
                "the new ones with an attention_mask of its whole length",
                field="input_ids",
            )
        if isinstance(cache, CompressedCache):
            cache.check_rows(tokens.shape[0])
            if self._takes_positions and kwargs.get("position_ids") is None and len(args) < 2:
                kwargs["position_ids"] = following_positions(self.adapter, cache, inputs, tokens)
        candidates = 0
        if request.prompt_length is not None:
            candidates = max(seen + length - request.prompt_length, 0) % length
            modality_ids = request.modality_ids if modality_ids is None else modality_ids
        request.modality_ids = request.prompt_length = None  # of the first forward only
        if modality_ids is not None and candidates:
            raise InputError("cannot be given for assisted decoding; use plain generation", field="modality_ids")
        if length > 1 or modality_ids is not None:
            request.new_tokens = _read_eagerly(self.adapter, inputs, self.when, modality_ids, seen, candidates)
        mask = kwargs.get("attention_mask")
        if self.adapter.has_windows and compressed_layers(cache) and isinstance(mask, Tensor) and mask.ndim == 2:
            # Sliding windows count columns: gaps inside rows were closed when they came.
            closed = torch.cat([shift_left_padding(mask[:, :seen] > 0), mask[:, seen:] > 0], dim=1)
            kwargs["attention_mask"] = closed.to(mask.dtype)
        return args, kwargs

    def _missing_cache(self, inputs: dict[str, Any], modality_ids: Tensor | None) -> dict[str, Any]:
        """The cache that media need, as arguments of the model; none for text, or where nothing is compressed.

        Raises:
            InputError: the caller wants none.
        """
        if not self.compresses() or not _read_eagerly(self.adapter, inputs, self.when, modality_ids).has_media:
            return {}
        use_cache = inputs.get("use_cache")
        if not (getattr(self.adapter.decoder.config, "use_cache", True) if use_cache is None else use_cache):
            raise InputError(
                "is off, and without a cache there is nothing to compress; leave it on, or close the session first",
                field="use_cache",
            )
        return {"cache": DynamicCache(config=self.adapter.decoder.config), "use_cache": True}

    def _decoder_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._one_at_a_time():
            request, new_tokens = self.request, None
            if request is not None:
                request.reached = True  # a number would change, and be compiled anew, at each step
                new_tokens, request.new_tokens = request.new_tokens, None
            if args and new_tokens is not None and new_tokens.has_media:
                raise InputError("call the decoder with keyword arguments and a cache", field="model")
            if args or not self.is_open:
                return original(*args, **kwargs)
            if new_tokens is None:
                return self.decode(original, request, None, renamed(kwargs))
            return _run_eagerly(self.decode, original, request, new_tokens, renamed(kwargs))


@torch.compiler.disable
def _read_eagerly(*args: Any) -> NewTokens:
    return read_new_tokens(*args)


@torch.compiler.disable
def _run_eagerly(call: Callable[..., Any], *args: Any) -> Any:
    """Call it with nothing compiled, whatever part of the model is: how a prompt runs depends on its contents."""
    with torch.compiler.set_stance("force_eager"):
        return call(*args)


def _refuse_batching(*_: Any, **__: Any) -> NoReturn:
    raise InputError(
        "batches requests into a cache of pages, which cannot be compressed; call generate with a batch of them",
        field="generate_batch",
    )


def renamed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a forward with the cache under its name of today; transformers takes the old one until 5.40."""
    if "past_key_values" not in arguments:
        return arguments
    others = {name: value for name, value in arguments.items() if name != "past_key_values"}
    return {"cache": arguments["past_key_values"], **others}


def served(method: Method) -> Method:
    """A session's method that runs the model: only while it is open, and for one thread after another."""

    @wraps(method)
    def call(session: Any, *args: Any, **options: Any) -> Any:
        hooks = session.dispatcher.hooks
        with hooks.lock:
            if not hooks.is_open:
                raise InputError("is closed; use it inside `with compressor(model) as session`", field="session")
            return method(session, *args, **options)

    return cast(Method, call)
