"""On the pretend accelerator a model, its cache and every method do what they do on the CPU, and no devices mix."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from torch import Tensor

from acckv import KVCompressor
from acckv.cache.cache import CompressedCache, compressed_layers
from acckv.config import HeadBudgets, When
from acckv.method.weights import CalibratedWeights
from acckv.policies import POLICIES
from acckv.runtime.prefill import Prefill
from lightning_modules.calibration.config import CalibrationConfig
from lightning_modules.calibration.schedule import Schedule
from tests.calibration.test_training import after
from tests.families import FAMILIES, Family, Tokenizer
from tests.learned import trained
from tests.support.simulated_accelerator import DEVICE, SECOND_DEVICE, SimulatedAccelerator, on_cpu, on_device, place

pytestmark = pytest.mark.usefixtures("matrix_attention")

Model = tuple[Family, Any]


@pytest.fixture(scope="module")
def family() -> Family:
    return FAMILIES["qwen2_5_omni"]


@pytest.fixture(scope="module")
def model(family: Family) -> Any:
    return family.build()


def batch(family: Family, model: Any) -> dict[str, Any]:
    """Two clips of different length."""
    return family.collate([family.clip(model), family.clip(model, seed=1, frames=3, sounds=9)])


def held(cache: CompressedCache) -> list[Tensor]:
    """All that a cache holds, on the CPU."""
    parts = [
        (layer.keys, layer.values, layer.bias, layer.labels, layer.candidates) for layer in compressed_layers(cache)
    ]
    return [on_cpu(part) for layer in parts for part in layer if part is not None]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    """Tokens, labels and counts are equal, keys, values and logits up to the rounding of a few sums."""
    assert [part.shape for part in found] == [part.shape for part in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-5 if other.is_floating_point() else 0)


def generated(model: Any, inputs: dict[str, Any], compressor: KVCompressor) -> list[Tensor]:
    """New tokens, and the cache of the prompt."""
    with compressor(model, Tokenizer()) as session:
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        cache = session.last_cache
    return [on_cpu(tokens), *([] if cache is None else held(cache))]


def spread(model: Any) -> Any:
    """A copy whose layers are on two devices, by accelerate's own hooks, and whose head is not where it begins."""
    body, decoder = model.model, model.model.language_model
    first, second = str(DEVICE), str(SECOND_DEVICE)
    places = {"lm_head": second}
    places |= {f"model.{name}": first for name, part in body.named_children() if part is not decoder}
    places |= {
        f"model.language_model.{name}": second if name == "norm" else first
        for name, _ in decoder.named_children()
        if name != "layers"
    }
    places |= {f"model.language_model.layers.{index}": second if index else first for index in range(3)}
    return dispatch_model(copy.deepcopy(model), places, skip_keys=model._skip_keys_device_placement)


@pytest.mark.parametrize(
    ("policy", "when", "heads"),
    [
        *((policy, "context", "equal") for policy in POLICIES),
        ("acckv", "prompt", "equal"),
        ("acckv", "context", "joint"),
        ("kvzip", "context", "joint"),
        ("madakv", "prompt", "joint"),
    ],
)
def test_every_policy(family: Family, model: Any, policy: str, when: When, heads: HeadBudgets) -> None:
    """Layers on two devices, and clips of different length in one batch, whose padding is on a device too."""
    inputs = batch(family, model)
    compressor = KVCompressor(policy, ratio=0.3, when=when, head_budgets=heads)
    expected = generated(model, inputs, compressor)
    with SimulatedAccelerator():
        found = generated(spread(model), on_device(inputs), compressor)
    assert_same(found, expected)


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    """A calibrated compressor whose weights and LoRA are not those they start from."""
    folder = tmp_path_factory.mktemp("export")
    trained(model).with_ratio(0.3).save_pretrained(folder)
    return folder


def one_device(model: Any) -> Any:
    return place(copy.deepcopy(model))


@pytest.mark.parametrize(("placed", "heads"), [(one_device, "equal"), (spread, "equal"), (spread, "learned")])
def test_an_export(family: Family, model: Any, export: Path, placed: Callable[[Any], Any], heads: HeadBudgets) -> None:
    """It is read on the CPU, and each layer's weights and LoRA act where that layer is."""
    inputs = batch(family, model)
    expected = generated(model, inputs, KVCompressor.from_pretrained(export, head_budgets=heads))
    with SimulatedAccelerator():
        found = generated(placed(model), on_device(inputs), KVCompressor.from_pretrained(export, head_budgets=heads))
    assert_same(found, expected)


def test_draws_are_the_same_whatever_device_is_the_default(family: Family, model: Any) -> None:
    """As within Lightning, and after `torch.set_default_device`."""
    schedule = Schedule(CalibrationConfig(), 100)
    with KVCompressor("random")(model) as session:
        prefill = session.prefill(**family.context(model))
    seen, labels, policy = prefill.observations[0], prefill.labels, session.planners.policy
    expected = [policy.score(0, seen, labels).score, torch.tensor([schedule.ratio(step) for step in range(9)])]
    with SimulatedAccelerator(), torch.device("sim"):
        here = replace(seen, keys=on_device(seen.keys))
        found = [policy.score(0, here, labels).score, torch.tensor([schedule.ratio(step) for step in range(9)])]
        assert_same([on_cpu(part) for part in found], expected)


def test_weights_are_the_same_whatever_device_is_the_default() -> None:
    """As within Lightning, and after `torch.set_default_device`."""
    expected = CalibratedWeights(2, 1, 2, 4, 3).state_dict()
    with SimulatedAccelerator(), torch.device("sim"):
        found = CalibratedWeights(2, 1, 2, 4, 3)
        assert all(weight.device == DEVICE for weight in found.parameters())
    assert_same([on_cpu(weight) for weight in found.state_dict().values()], list(expected.values()))


@pytest.mark.parametrize("options", [{"ratio": 0.3}, {"budget": 6, "share_heads": False}], ids=["ratio", "budget"])
def test_a_stream(family: Family, model: Any, export: Path, options: dict[str, Any]) -> None:
    """Chunk after chunk, as a processor gives them, then a question; within a budget heads hold different entries."""
    chunks = [family.context(model), family.context(model, seed=1), family.context(model, seed=2)]

    def streamed(model: Any) -> list[Tensor]:
        with KVCompressor.from_pretrained(export, **options)(model, Tokenizer()) as session:
            cache = session.extend(chunks[0])
            for chunk in chunks[1:]:
                cache = session.extend(chunk, cache)
            answer = session.answer(cache, torch.tensor([[20, 21, 22]]), max_new_tokens=3, do_sample=False)
        return [on_cpu(answer), *held(cache)]

    expected = streamed(model)
    with SimulatedAccelerator():
        found = streamed(spread(model))
    assert_same(found, expected)


def test_a_shared_prefill(family: Family, model: Any, export: Path) -> None:
    """One prefill is kept on the CPU and read again on two devices: by eviction, and through gates with gradients."""
    rows = [family.context(model), family.context(model, seed=1, frames=3, sounds=9)]

    def answered(model: Any) -> list[Tensor]:
        with KVCompressor.from_pretrained(export)(model, Tokenizer()) as session:
            kept = [row.to(torch.device("cpu")) for row in session.prefill(**family.collate(rows)).unstack()]
            prefill = Prefill.stack(kept).to(session.adapter.device)
            new = session.answer(session.compress(prefill), torch.tensor([[20], [21]]), max_new_tokens=2)
            with torch.enable_grad():
                plans = session.plan(prefill, 0.3, temperature=0.5)
                logits = session.simulate(prefill, plans, **after(session, prefill))
        return [on_cpu(new), on_cpu(logits).detach()]

    expected = answered(model)
    with SimulatedAccelerator():
        found = answered(spread(model))
    assert_same(found, expected)
