"""A model that is in a session, and what else is done with it meanwhile: other sessions, copies, files, patches."""

from __future__ import annotations

import copy
import functools
import pickle
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from acckv import InputError, KVCompressor
from acckv.policies import AccKV
from tests import tiny_omni
from tests.families import Tokenizer
from tests.learned import calibrated

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
KEYDIFF = KVCompressor("keydiff", ratio=0.3)


def test_one_session_a_model() -> None:
    """A second one is refused, whether it is another or the same, and leaves the first as it was."""
    model = tiny_omni.build()
    with KEYDIFF(model) as session:
        expected = model.generate(**tiny_omni.prompt(), **GREEDY)
        for other in (session, KVCompressor("knorm")(model)):
            with pytest.raises(InputError, match="model: is in an open session already"), other:
                raise AssertionError
        around = type(model)(model.config)
        around.model = model.model  # another head on the same decoder
        with pytest.raises(InputError, match="model: is in an open session already"), KEYDIFF(around):
            raise AssertionError
        lora = calibrated(tiny_omni.build(), AccKV.preset("context"), rank=2)
        with pytest.raises(InputError, match="model: is in an open session already"), lora(model, Tokenizer()):
            raise AssertionError
        assert torch.equal(model.generate(**tiny_omni.prompt(), **GREEDY), expected)
    with KEYDIFF(model):
        assert torch.equal(model.generate(**tiny_omni.prompt(), **GREEDY), expected)


@pytest.mark.parametrize(("attention", "order"), [("sdpa", (0, 1, 2)), ("eager", (1, 2, 0)), ("sdpa", (1, 0, 2))])
def test_sessions_of_several_models_close_in_any_order(attention: str, order: tuple[int, ...]) -> None:
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    models = [tiny_omni.build(attention=attention) for _ in range(3)]
    compressors = [KVCompressor("keydiff", ratio=ratio) for ratio in (0.1, 0.3, 0.6)]

    def logits(model: Any) -> Tensor:
        options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
        return torch.stack(model.generate(**tiny_omni.prompt(), **options).logits)

    plain = logits(models[0])
    compressed = []
    for model, compressor in zip(models, compressors, strict=True):
        with compressor(model):
            compressed.append(logits(model))
    stacks = [ExitStack() for _ in models]
    for stack, model, compressor in zip(stacks, models, compressors, strict=True):
        stack.enter_context(compressor(model))
    for closed in range(4):
        for index, model in enumerate(models):
            expected = plain if index in order[:closed] else compressed[index]
            assert torch.equal(logits(model), expected)
        if closed < 3:
            stacks[order[closed]].close()
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == before


def test_an_attention_function_set_by_others_in_a_session_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny_omni.build(), []
    plain = model.generate(**tiny_omni.prompt(), **GREEDY)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", ALL_ATTENTION_FUNCTIONS["sdpa"])
    with KEYDIFF(model):
        compressed = model.generate(**tiny_omni.prompt(), **GREEDY)
        inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def counted(*args: Any, **options: Any) -> Any:
            calls.append(1)
            return inner(*args, **options)

        ALL_ATTENTION_FUNCTIONS["sdpa"] = counted
        assert torch.equal(model.generate(**tiny_omni.prompt(), **GREEDY), compressed)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is counted and calls
    assert torch.equal(model.generate(**tiny_omni.prompt(), **GREEDY), plain)
    with KEYDIFF(model):
        assert torch.equal(model.generate(**tiny_omni.prompt(), **GREEDY), compressed)
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is counted


def test_a_model_in_a_session_is_not_copied() -> None:
    """A copy would run the methods of its original; before and after the session, copies are models of their own."""
    model = tiny_omni.build()
    before = copy.deepcopy(model)
    with KEYDIFF(model):
        for attempt in (copy.deepcopy, pickle.dumps):
            with pytest.raises(InputError, match="is in an open session and cannot be copied or pickled"):
                attempt(model)
    plain = model.generate(**tiny_omni.prompt(), **GREEDY)
    for other in (before, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with KEYDIFF(other) as session:
            inside = other.generate(**tiny_omni.prompt(), **GREEDY)
            assert session.last_cache is not None
        with torch.no_grad():
            other.lm_head.weight.zero_()
        assert torch.equal(model.generate(**tiny_omni.prompt(), **GREEDY), plain)
        assert other.generate(**tiny_omni.prompt(), **GREEDY)[0, -1] == 0 and not torch.equal(inside, plain)


def test_a_model_with_merged_lora_is_neither_saved_nor_loaded(tmp_path: Path) -> None:
    """Its weights are not its own in the session; layers beside them are."""
    model = tiny_omni.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compressor = calibrated(tiny_omni.build(), AccKV.preset("context"), noise=1.0, rank=2)
    with compressor(model, tiny_omni.Tokenizer(), lora_mode="merged"):
        for save in (lambda: model.save_pretrained(tmp_path), lambda: torch.save(model.state_dict(), tmp_path / "w")):
            with pytest.raises(InputError, match="LoRA merged into them while its session is open; save or load"):
                save()
        with pytest.raises(InputError, match="LoRA merged into them"):
            model.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in before.items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with KEYDIFF(model):
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_others_put_on_a_model_in_a_session_stays() -> None:
    model = tiny_omni.build()
    with KEYDIFF(model):
        inner, calls = model.forward, []

        @functools.wraps(inner)
        def wrapped(*args: Any, **options: Any) -> Any:
            calls.append(1)
            return inner(*args, **options)

        model.forward = wrapped
        compressed = model.generate(**tiny_omni.prompt(), **GREEDY)
    assert model.forward is wrapped and calls
    plain = tiny_omni.build().generate(**tiny_omni.prompt(), **GREEDY)
    assert torch.equal(model.generate(**tiny_omni.prompt(), **GREEDY), plain) and not torch.equal(plain, compressed)
