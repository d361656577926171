"""KVCompressor: the calibrated one starts as the preset; the lowest ratios may have a calibration of their own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from acckv import InputError, KVCompressor
from acckv.cache.cache import compressed_layers
from acckv.config import HeadBudgets
from acckv.policies import AccKV
from tests import tiny_omni
from tests.learned import CONTEXT, calibrated, weights_of, with_low_ratio
from tests.support.running import generate

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_omni.build()


@pytest.mark.parametrize("preset", ["paper", "context"])
@pytest.mark.parametrize("when", ["context", "prompt"])
@pytest.mark.parametrize("ratio", [0.5, 0.3, 0.1])
def test_untrained_weights_select_what_the_preset_selects(model: Any, preset: str, when: Any, ratio: float) -> None:
    options: dict[str, Any] = {"policy": AccKV.preset(preset), "when": when, "ratio": ratio}
    inputs = tiny_omni.context() if when == "context" else tiny_omni.prompt()
    plans = []
    for compressor in (KVCompressor(**options), calibrated(model, **options)):
        with compressor(model, tiny_omni.Tokenizer()) as session:
            plans.append(session.plan(session.prefill(**inputs)))
    for preset_plan, learned_plan in zip(*plans, strict=True):
        assert torch.equal(preset_plan.log_gates, learned_plan.log_gates)
        assert torch.equal(preset_plan.merged_keys, learned_plan.merged_keys)
        assert torch.equal(preset_plan.merged_bias, learned_plan.merged_bias)
    moved = calibrated(model, **options, noise=1.0)
    with moved(model, tiny_omni.Tokenizer()) as session:
        other = session.plan(session.prefill(**inputs))
    assert any(not torch.equal(a.log_gates, b.log_gates) for a, b in zip(plans[0], other, strict=True))


@pytest.mark.parametrize("options", [{"ratio": 0.3}, {"budget": 5}])
def test_the_lowest_ratios_have_a_calibration_of_their_own(model: Any, options: dict[str, Any]) -> None:
    """Evicted during the prefill or planned afterwards, read by generate or a session; 0.3 or 5 of 18 entries."""
    wide, low = (calibrated(model, CONTEXT, noise, 2, **options) for noise in (1.0, 0.3))
    question = torch.tensor([[20, 21, 22]])

    def outcome(compressor: KVCompressor) -> list[torch.Tensor]:
        with compressor(model, tiny_omni.Tokenizer()) as session:
            streamed = session.compress(**tiny_omni.context())
            planned = session.compress(session.prefill(**tiny_omni.context()))
            tokens = [session.answer(cache, question, **GREEDY) for cache in (streamed, planned)]
            _, found = generate(model, tiny_omni.prompt(), **GREEDY)
        keys = [layer.keys for cache in (streamed, planned) for layer in compressed_layers(cache)]
        return [*keys, *tokens, *found]

    def alike(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))

    by_wide, by_low = outcome(wide), outcome(low)
    assert not alike(by_wide, by_low) and not torch.equal(by_wide[-1], by_low[-1])
    assert alike(outcome(with_low_ratio(wide, low, 0.27)), by_wide)
    assert alike(outcome(with_low_ratio(wide, low, 0.31)), by_low)
    assert alike(outcome(with_low_ratio(wide, low, 0.31).with_ratio(0.31)), outcome(wide.with_ratio(0.31)))


def test_a_cache_is_read_with_the_adapter_of_its_ratio(model: Any) -> None:
    """Whatever was compressed or asked in between."""
    wide, low = calibrated(model, noise=1.0, rank=2), calibrated(model, noise=0.3, rank=2)
    question = torch.tensor([[20, 21, 22]])

    def answers(compressor: KVCompressor, *ratios: float) -> list[list[int]]:
        with compressor(model, tiny_omni.Tokenizer()) as session:
            prefill = session.prefill(**tiny_omni.context())
            caches = [session.compress(prefill, ratio) for ratio in ratios]
            return [session.answer(cache, question, **GREEDY)[0].tolist() for cache in (*caches, *caches)]

    both = answers(with_low_ratio(wide, low, 0.3), 0.2, 0.5, 1.0)
    assert both == [*answers(low, 0.2)[:1], *answers(wide, 0.5, 1.0)[:2]] * 2
    assert both[0] != answers(wide, 0.2)[0] and both[1] != answers(low, 0.5)[0]


@pytest.mark.parametrize("head_budgets", ["equal", "joint", "learned"])
def test_budgets_of_learned_weights_are_exact(model: Any, head_budgets: HeadBudgets) -> None:
    heads = 1 if head_budgets == "equal" else 2
    for ratio in (0.9, 0.5, 0.2, 0.05):
        compressor = calibrated(model, AccKV(), noise=2.0, ratio=ratio, head_budgets=head_budgets)
        with compressor(model, tiny_omni.Tokenizer()) as session:
            cache = session.compress(**tiny_omni.context())
        assert cache.kept_entries().sum() * heads == int(ratio * 3 * heads * 18 + 1e-9)


def test_every_weight_gets_a_gradient(model: Any) -> None:
    """With all steps on, each learned weight of docs/method.md is reached by the soft selection's gradient."""
    compressor = calibrated(model, AccKV(n_scorer_units=4), noise=0.1, head_budgets="learned")
    with compressor(model, tiny_omni.Tokenizer()) as session:
        prefill = session.prefill(**tiny_omni.context())
        loss = torch.zeros(())
        for ratio in (0.3, 0.5, 0.7):
            plans = session.plan(prefill, ratio, temperature=0.5)
            ids = torch.tensor([[20, 21, 22]])
            positions = session.adapter.text_positions(prefill.next_position + torch.arange(3))
            mask = torch.ones(1, prefill.labels.labels.shape[1] + 3, dtype=torch.long)
            logits = session.simulate(prefill, plans, input_ids=ids, attention_mask=mask, position_ids=positions)
            loss = loss + logits.square().mean()
        loss.backward()
    for name, parameter in compressor.named_parameters():
        assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0, name


def answers(compressor: KVCompressor, model: Any) -> list[int]:
    with compressor(model, tiny_omni.Tokenizer()):
        tokens: list[int] = model.generate(**tiny_omni.prompt(), **GREEDY)[0].tolist()
    return tokens


def test_weights_that_change_after_use_are_read_anew(model: Any) -> None:
    """However they do; what a layer read is kept only as long as it holds."""
    here = torch.device("cpu")
    first = weights_of(calibrated(model, AccKV(), noise=0.1))
    other = weights_of(calibrated(model, AccKV(), noise=0.2)).state_dict()
    first.requires_grad_(False)
    first.load_state_dict({name: tensor + 1 for name, tensor in other.items()})
    first.layer(0, here)
    copied = copy.deepcopy(first)
    copied.load_state_dict(other)
    assert torch.equal(copied.layer(0, here).merge_bias, other["merge_bias"][0])
    first.load_state_dict(other, assign=True)
    assert torch.equal(first.layer(0, here).merge_bias, other["merge_bias"][0])
    first.merge_bias.data = other["merge_bias"] + 2
    assert torch.equal(first.layer(0, here).merge_bias, other["merge_bias"][0] + 2)


def test_a_compressor_that_was_made_in_inference_mode(model: Any) -> None:
    with torch.inference_mode():
        made = calibrated(model, noise=1.0, ratio=0.3).requires_grad_(False)
        with made(model, tiny_omni.Tokenizer()):
            inside = model.generate(**tiny_omni.prompt(), **GREEDY)
    with made(model, tiny_omni.Tokenizer()):
        assert torch.equal(model.generate(**tiny_omni.prompt(), **GREEDY), inside)


def test_a_compressor_in_half_precision(model: Any) -> None:
    """As one whose weights were rounded so: what is computed with them is float32."""
    half, rounded = (calibrated(model, noise=1.0, ratio=0.3).requires_grad_(False).half() for _ in range(2))
    found = []
    for one in (half, rounded.float()):
        with one(model, tiny_omni.Tokenizer()):
            found.append(model.generate(**tiny_omni.prompt(), **GREEDY))
    assert torch.equal(*found)


def test_lora_acts_and_leaves(model: Any) -> None:
    plain = model.generate(**tiny_omni.prompt(), **GREEDY)[0].tolist()
    gradients = [parameter.requires_grad for parameter in model.parameters()]
    assert answers(calibrated(model, noise=1.0, rank=4, ratio=1.0), model) != plain
    assert answers(calibrated(model, noise=0.0, rank=4, ratio=1.0), model) == plain
    assert not any("lora" in name for name, _ in model.named_modules())
    assert [parameter.requires_grad for parameter in model.parameters()] == gradients
    assert model.generate(**tiny_omni.prompt(), **GREEDY)[0].tolist() == plain


def test_scope_after_leaves_the_context_to_the_base_model(model: Any) -> None:
    layers: list[Any] = []
    for rank in (0, 4):
        with calibrated(model, noise=0.0 if rank == 0 else 1.0, rank=rank, ratio=1.0)(model) as session:
            layers.append(session.prefill(**tiny_omni.context()).cache.layers[-1])
    assert torch.equal(layers[0].keys, layers[1].keys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.5}, "ratio: 1.5 is not a number from 0 to 1"),
        ({"ratio": "a"}, "ratio: 'a' is not a number"),
        ({"policy": "h3o"}, "policy: 'h3o' is not one of full, random"),
        ({"when": "later"}, "when: 'later' is not one of context, prompt"),
        ({"budget": -1}, "budget: -1 is not an integer of at least 0"),
        ({"budget": True}, "budget: True is not an integer of at least 0"),
    ],
)
def test_option_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        KVCompressor(**options)
