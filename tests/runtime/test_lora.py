"""LoRA merged into copies of the weights equals LoRA beside them, and a change between sets moves no values."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from acckv import KVCompressor
from acckv.config import LoraScope
from acckv.errors import InputError
from acckv.export import LowRatio
from acckv.models import find_adapter
from acckv.runtime import merged_lora
from acckv.runtime.lora import LoraWeights
from acckv.runtime.merged_lora import LoraMode, MergedLora, merged_weight
from tests import tiny_omni
from tests.learned import random_lora
from tests.support.running import generate

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SETTING: dict[str, Any] = {"policy": "keydiff", "ratio": 0.3}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
QUESTION = torch.tensor([[20, 21, 22]])


def weights(model: Any, seed: int, targets: tuple[str, ...] = TARGETS) -> LoraWeights:
    torch.manual_seed(seed)
    return random_lora(model, 4, 0.2, targets)


def compressor(model: Any, scope: LoraScope = "after") -> KVCompressor:
    """Of two sets where the scope allows it: ratios below 0.2 have their own."""
    base = {"name": "tiny", **find_adapter(model).dimensions}
    low = LowRatio(0.2, None, weights(model, 2)) if scope == "after" else None
    return KVCompressor(**SETTING, lora=weights(model, 1), lora_scope=scope, base=base, low_ratio=low)


def logits(model: Any, compress: KVCompressor, ratio: float, **options: Any) -> Tensor:
    with compress.with_ratio(ratio)(model, **options):
        return generate(model, tiny_omni.prompt(), **GREEDY)[1]


@pytest.mark.parametrize("scope", ["after", "all"])
@pytest.mark.parametrize("ratio", [0.5, 0.1])
def test_merged_equals_separate(scope: LoraScope, ratio: float) -> None:
    """At ratios of either set; the same tokens, and logits to what float32 sums in another order differ by."""
    model = tiny_omni.build()
    plain = KVCompressor(**SETTING)
    found = [logits(model, compressor(model, scope), ratio, lora_mode=mode) for mode in ("merged", "separate")]
    base = logits(model, plain, ratio)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.argmax(-1), other.argmax(-1))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
    assert max(float((a - b).abs().max()) for a, b in zip(found[0], base, strict=True)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_weight_is_rounded_once(dtype: torch.dtype) -> None:
    """Within half a unit in the last place of the sum in float64, but for the sums of float32."""
    generator = torch.Generator().manual_seed(0)
    base, down, up = (torch.randn(*size, generator=generator) for size in ((48, 32), (16, 32), (48, 16)))
    base = base.to(dtype)
    exact = base.double() + 0.5 * up.double() @ down.double()
    size = base.double().abs() + 0.5 * up.double().abs() @ down.double().abs()
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 18 * torch.finfo(torch.float32).eps * size
    merged = merged_weight(base, down, up, 0.5)
    assert merged.dtype == dtype and bool(((merged.double() - exact).abs() <= bound).all())


def test_caches_by_turns_move_no_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two caches of different sets, token by token: each set is merged once, and each answer is the one alone."""
    model = tiny_omni.build()
    made: list[Tensor] = []
    merge = merged_lora.merged_weight

    def recorded(*parts: Any) -> Tensor:
        made.append(merge(*parts))
        return made[-1]

    monkeypatch.setattr(merged_lora, "merged_weight", recorded)
    with compressor(model)(model, lora_mode="merged") as session:
        caches = [session.compress(**tiny_omni.context(), ratio=ratio) for ratio in (0.5, 0.1)]
        alone = [session.answer(cache, QUESTION, **GREEDY) for cache in caches]
        branches, tokens = [cache.branch() for cache in caches], [QUESTION, QUESTION]
        said: list[list[int]] = [[], []]
        for _ in range(GREEDY["max_new_tokens"]):
            for turn, branch in enumerate(branches):
                positions = session.adapter.text_positions(branch.next_position + torch.arange(tokens[turn].shape[1]))
                with torch.no_grad():
                    out = model(
                        input_ids=tokens[turn],
                        attention_mask=torch.ones(1, branch.get_seq_length() + tokens[turn].shape[1]),
                        position_ids=positions,
                        cache=branch,
                        use_cache=True,
                    )
                tokens[turn] = out.logits[:, -1:].argmax(-1)
                said[turn].append(int(tokens[turn]))
        assert len(made) == 2 * len(TARGETS) * 3
    assert said == [answer[0].tolist() for answer in alone] and said[0] != said[1]


class OtherLinear(nn.Linear):
    """A linear class of another library: its weights may be anything."""

    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden)


def test_what_cannot_be_merged_stays_separate() -> None:
    model = tiny_omni.build()
    compress = compressor(model)
    find_adapter(model).decoder.layers[0].self_attn.q_proj.__class__ = OtherLinear
    with compress(model) as session, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert session.attached is not None
    with pytest.raises(InputError, match="lora_mode: is 'merged', but OtherLinear layers keep weights that cannot be"):
        compress(model, lora_mode="merged").__enter__()
    assert not any("lora" in name for name, _ in model.named_modules())
    with pytest.raises(InputError, match="lora_mode: 'fold' is not one of auto, merged, separate"):
        compress(model, lora_mode="fold")


def test_auto_asks_for_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_omni.build()
    compress = compressor(model)
    names = list(find_adapter(model).projections(TARGETS))
    copies = 2 * sum(4 * model.get_parameter(f"{name}.weight").numel() for name in names)
    monkeypatch.setattr(merged_lora, "_free_memory", lambda device: 2 * copies)
    with compress(model) as session:
        assert isinstance(session.dispatcher.lora, MergedLora) and session.attached is None
    monkeypatch.setattr(merged_lora, "_free_memory", lambda device: 2 * copies - 1)
    with pytest.warns(UserWarning, match="LoRA is not merged: copies of the adapted weights would take"):
        session = compress(model).__enter__()
    assert session.attached is not None
    session.__exit__()


def test_fresh_lora_is_there_to_be_trained() -> None:
    """And gradients reach it: no value is copied behind the back of autograd."""
    model = tiny_omni.build()
    fresh = LoraWeights(weights(model, 1).config, {})
    compress = KVCompressor(**SETTING, lora=fresh)
    with compress(model) as session:
        assert session.attached is not None
        session.attached.keep_low_ratio()
        for parameter in session.attached.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        session.attached.keep_low_ratio()
        with session.attached.selected(True):
            held = session.attached.tensors(low_ratio=True)
        now = session.attached.tensors()
        assert all(torch.equal(held[name], value) for name, value in now.items())
        prefill = session.prefill(**tiny_omni.context())
        inputs = {
            "input_ids": QUESTION,
            "attention_mask": torch.ones(1, prefill.labels.labels.shape[1] + 3),
            "position_ids": session.adapter.text_positions(prefill.next_position + torch.arange(3)),
        }
        loss = session.simulate(prefill, None, **inputs).square().mean()
        with session.attached.selected(True), torch.no_grad():  # a validation in between
            session.simulate(prefill, None, **inputs)
        loss.backward()
        assert all(parameter.grad is not None for parameter in session.attached.parameters())


@pytest.mark.parametrize("mode", ["merged", "separate"])
def test_a_model_that_is_moved_inside_a_session_stays_whole(mode: LoraMode) -> None:
    """Its base weights go with it, and LoRA is merged into them anew."""
    model, moved = tiny_omni.build(), tiny_omni.build()
    ours, fresh = compressor(model), compressor(tiny_omni.build().double())
    with ours(moved, lora_mode=mode) as session:
        moved.double()
        found = session.answer(session.compress(**in_double(tiny_omni.context())), QUESTION, **GREEDY)
    assert all(parameter.dtype == torch.float64 for parameter in moved.parameters())
    assert all(
        torch.equal(mine, its.double()) for mine, its in zip(moved.parameters(), model.parameters(), strict=True)
    )
    with fresh(moved, lora_mode=mode) as session:
        expected = session.answer(session.compress(**in_double(tiny_omni.context())), QUESTION, **GREEDY)
    assert torch.equal(found, expected)


def in_double(inputs: dict[str, Any]) -> dict[str, Any]:
    features = ("pixel_values_videos", "input_features")
    return {name: value.double() if name in features else value for name, value in inputs.items()}


def test_text_without_a_cache_is_read_with_the_lora_of_all_ratios() -> None:
    """Whatever was answered before it."""
    model = tiny_omni.build()
    with compressor(model)(model, lora_mode="merged") as session, torch.no_grad():
        before = model(QUESTION, use_cache=False).logits
        session.answer(session.compress(ratio=0.05, **tiny_omni.context()), QUESTION, **GREEDY)
        assert torch.equal(model(QUESTION, use_cache=False).logits, before)


def test_a_module_that_layers_share_is_not_merged() -> None:
    """LoRA acts in the layer that it was put on; merged it would act in all of them."""
    model = tiny_omni.build()
    layers = find_adapter(model).decoder.layers
    layers[2].self_attn.q_proj = layers[1].self_attn.q_proj
    shared = KVCompressor(**SETTING, lora=weights(model, 1, ("q_proj",)))
    with shared(model) as session:
        assert session.attached is not None
    with pytest.raises(InputError, match="lora_mode: is 'merged', but layers of the decoder share a module"):
        shared(model, lora_mode="merged").__enter__()
