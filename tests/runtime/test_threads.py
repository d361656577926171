"""What several requests share: threads on one session, caches by turns, requests and sessions left early."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event, Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from acckv import InputError, KVCompressor
from acckv.cache.cache import compressed_layers
from acckv.policies import AccKV
from acckv.runtime.session import Session
from acckv.runtime.simulation import disable_checkpointing, enable_checkpointing
from tests import tiny_omni
from tests.families import FAMILIES, Family, Tokenizer
from tests.learned import calibrated, with_low_ratio

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
KEYDIFF = KVCompressor("keydiff", ratio=0.3)
QUESTION = torch.tensor([[20, 21, 22]])


@pytest.fixture
def quick_switches() -> Iterator[None]:
    """Threads take turns within every forward, many times."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """The calls' results, each from a thread of its own."""
    with ThreadPoolExecutor(len(calls)) as threads:
        return [future.result() for future in [threads.submit(call) for call in calls]]


def calls_of(family: Family, model: Any, session: Session) -> list[Callable[[], Any]]:
    """Requests of every kind, about clips of different length."""
    clips = [family.clip(model, seed=seed, frames=2 + seed) for seed in range(3)]

    def generated(clip: dict[str, Any]) -> list[list[int]]:
        return model.generate(**clip, **GREEDY).tolist()

    calls: list[Callable[[], Any]] = [partial(generated, clip) for clip in clips]

    def answer() -> list[int]:
        return session.answer(session.compress(**family.context(model)), QUESTION, **GREEDY).tolist()

    def stream() -> list[int]:
        first = session.extend(family.context(model, seed=1), ratio=0.2)
        return session.answer(session.extend(family.text(model, (20, 21)), first), QUESTION, **GREEDY).tolist()

    def recorded() -> list[list[int]]:
        prefill = session.prefill(**family.context(model, seed=2))
        return [session.answer(session.compress(prefill, ratio), QUESTION, **GREEDY).tolist() for ratio in (0.1, 0.6)]

    return [*calls, answer, stream, recorded]


@pytest.mark.parametrize("name", ["videollama2", "qwen2_5_omni"])
def test_requests_of_several_threads(name: str, quick_switches: None) -> None:
    """Each gets what it gets alone, on models with and without a record of their own positions."""
    family = FAMILIES[name]
    model = family.build()
    with KEYDIFF(model, Tokenizer()) as session:
        calls = calls_of(family, model, session)
        alone = [call() for call in calls]
        assert together(calls * 2) == alone * 2


def test_threads_with_lora_of_two_ratios(quick_switches: None) -> None:
    """LoRA is off while one prompt runs, and of another ratio for another cache."""
    model = tiny_omni.build()
    preset = AccKV.preset("context")
    wide, low = calibrated(model, preset, noise=1.0, rank=2), calibrated(model, preset, noise=0.3, rank=2)
    with with_low_ratio(wide, low, 0.3)(model, tiny_omni.Tokenizer()) as session:

        def at(ratio: float) -> list[int]:
            return session.answer(session.compress(ratio=ratio, **tiny_omni.context()), QUESTION, **GREEDY).tolist()

        calls: list[Callable[[], Any]] = [partial(at, ratio) for ratio in (0.1, 0.5, 0.2, 0.8)]
        assert together(calls) == [call() for call in calls]


def test_direct_forwards_of_several_caches_by_turns() -> None:
    """Prompts and steps of two requests in any order equal those of each alone."""
    family = FAMILIES["videollama2"]
    model = family.build()
    clips = [family.clip(model, seed=1, frames=2), family.clip(model, seed=2, frames=4)]

    def request(clip: dict[str, Any]) -> Iterator[Tensor]:
        """Logits of the prompt, then of three steps."""
        cache = DynamicCache(config=model.config)
        logits = model(**clip, cache=cache).logits[:, -1]
        yield logits
        for _ in range(3):
            logits = model(input_ids=logits.argmax(-1)[:, None], cache=cache).logits[:, -1]
            yield logits

    with torch.no_grad(), KEYDIFF(model):
        alone = [list(request(clip)) for clip in clips]
        by_turns = list(zip(*map(request, clips), strict=True))
    for step, logits in enumerate(by_turns):
        for found, expected in zip(logits, alone, strict=True):
            assert torch.equal(found, expected[step])


def test_backward_beside_a_request_of_another_thread() -> None:
    """Gradient checkpointing repeats attention outside of any forward: it is neither observed nor cut to a cache."""
    family = FAMILIES["videollama2"]
    model = family.build()
    decoder = model.get_decoder()
    ids = torch.randint(10, 60, (1, 12), generator=torch.Generator().manual_seed(0))

    def gradient(meanwhile: Callable[[Callable[[], Any]], Any] = lambda backward: backward()) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        enable_checkpointing(decoder)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        meanwhile(loss.backward)
        disable_checkpointing(decoder)
        return model.lm_head.weight.grad.clone(), decoder.layers[0].self_attn.k_proj.weight.grad.clone()

    with KEYDIFF(model) as session:
        expected, alone = gradient(), compressed_layers(session.compress(**family.context(model)))
        found: list[Any] = []

        def compress(backward: Callable[[], Any]) -> None:
            waiting = [backward]

            def in_between(*_: Any) -> None:
                while waiting:
                    together([waiting.pop()])

            handle = decoder.layers[1].self_attn.q_proj.register_forward_hook(in_between)
            found.append(compressed_layers(session.compress(**family.context(model))))
            handle.remove()

        gradients = gradient(compress)
    for one, other in zip(gradients, expected, strict=True):
        assert torch.equal(one, other)
    for held, kept in zip(found[0], alone, strict=True):
        assert torch.equal(held.keys, kept.keys) and torch.equal(held.values, kept.values)


class Tokens(BaseStreamer):
    """Tokens as they come; the second one tells that generation runs, and is slow."""

    def __init__(self) -> None:
        self.running, self.ended = Event(), False
        self.values: list[int] = []

    def put(self, value: Tensor) -> None:
        self.values += value.flatten().tolist()
        self.running.set()
        time.sleep(0.02)

    def end(self) -> None:
        self.ended = True


def test_closing_waits_for_a_stream_of_another_thread() -> None:
    model, found, streamer = tiny_omni.build(), [], Tokens()
    with KEYDIFF(model):
        expected = model.generate(**tiny_omni.prompt(), **GREEDY)
    with KEYDIFF(model):
        options = {**tiny_omni.prompt(), **GREEDY, "streamer": streamer}
        thread = Thread(target=lambda: found.append(model.generate(**options)))
        thread.start()
        assert streamer.running.wait(10)
    assert streamer.ended
    thread.join()
    assert torch.equal(found[0], expected) and streamer.values == expected[0].tolist()
    assert "generate" not in vars(model)


def test_what_was_taken_from_a_session_ends_with_it() -> None:
    """A thread that starts late is refused, instead of answering from the full cache."""
    model = tiny_omni.build()
    with KEYDIFF(model) as session:
        generate = model.generate
        cache = session.compress(**tiny_omni.context())
        prefill = session.prefill(**tiny_omni.context())
    with pytest.raises(InputError, match="generate: was taken from a session that is closed"):
        generate(**tiny_omni.prompt(), **GREEDY)

    def generated(clip: dict[str, Any]) -> list[list[int]]:
        return model.generate(**clip, **GREEDY).tolist()

    calls: list[Callable[[], Any]] = [
        lambda: session.prefill(**tiny_omni.context()),
        lambda: session.compress(**tiny_omni.context()),
        lambda: session.extend(tiny_omni.context()),
        lambda: session.answer(cache, QUESTION),
        lambda: session.plan(prefill),
        lambda: session.simulate(prefill, None, input_ids=QUESTION),
    ]
    for call in calls:
        with pytest.raises(InputError, match="session: is closed"):
            call()
    with session:  # and it can be opened again
        expected = model.generate(**tiny_omni.prompt(), **GREEDY)[0, -8:]
        assert torch.equal(session.answer(cache, QUESTION, **GREEDY)[0], expected)


@pytest.mark.parametrize(
    ("place", "kind"),
    [("encoder", KeyboardInterrupt), ("layer", RuntimeError), ("attention", KeyboardInterrupt), ("step", KeyError)],
)
def test_an_interrupted_request_leaves_nothing(place: str, kind: type[BaseException]) -> None:
    """The next one is right, in this thread and in another, as is the model after the session."""
    model = tiny_omni.build()
    plain = model.generate(**tiny_omni.prompt(), **GREEDY)
    layer = model.model.language_model.layers[1]
    module = {"encoder": model.model.visual, "layer": layer, "attention": layer.self_attn.o_proj, "step": layer}[place]
    calls = 0

    def interrupt(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == (4 if place == "step" else 1):
            raise kind

    compressor = calibrated(tiny_omni.build(), AccKV.preset("context"), noise=1.0, rank=2, ratio=0.3)
    with compressor(model, tiny_omni.Tokenizer()) as session:
        expected = model.generate(**tiny_omni.prompt(), **GREEDY)
        handle = module.register_forward_hook(interrupt)
        with pytest.raises(kind):
            model.generate(**tiny_omni.prompt(), **GREEDY)
        handle.remove()
        with pytest.raises(InputError, match="called past it"):  # not taken for the turn that did not reach the decoder
            model.model.language_model(inputs_embeds=torch.randn(1, 3, 64), use_cache=False)
        assert torch.equal(model.generate(**tiny_omni.prompt(), **GREEDY), expected)
        assert torch.equal(together([lambda: model.generate(**tiny_omni.prompt(), **GREEDY)])[0], expected)
        assert session.last_cache is not None
    assert torch.equal(model.generate(**tiny_omni.prompt(), **GREEDY), plain)
