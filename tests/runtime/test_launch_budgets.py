"""What compression may cost in launches and host synchronisations; counts on the pretend accelerator have no noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from acckv import KVCompressor
from acckv.models import find_adapter
from tests import tiny_omni
from tests.families import Tokenizer
from tests.support.launch_counts import CALIBRATED, Counts, clips, compressor, counted, model
from tests.support.simulated_accelerator import SimulatedAccelerator, on_device, place

#: Launches a layer that a policy may add to a prefill, the question's own pass over what was kept included (some 50).
PREFILL = {
    "snapkv": 85,
    "keydiff": 75,
    "context": 85,
    "calibrated": 150,
    "look_m": 135,
    "expected_attention": 130,
    "acckv": 170,
    "calibrated paper": 240,
}
LAYERS = 6


@pytest.fixture(scope="module")
def plain() -> Counts:
    loaded = model()
    assert len(find_adapter(loaded).attention_modules) == LAYERS
    return counted(None, loaded, clips(loaded))


@pytest.mark.parametrize("policy", PREFILL)
def test_a_prompt_and_its_answer(policy: str, plain: Counts) -> None:
    """Where entries are merged, a layer asks twice at most what came of it; all others wait once a prompt."""
    loaded = model()
    found = counted(compressor(policy, loaded), loaded, clips(loaded))
    assert found.prefill - plain.prefill <= PREFILL[policy] * LAYERS
    merges = policy in ("acckv", "calibrated paper", "look_m")
    assert found.prefill_syncs <= (1 + 2 * LAYERS if merges else 1)
    assert found.step_syncs == 0
    # Merged entries of a learned mass need a mask.
    assert found.step <= plain.step * (1.15 if policy == "calibrated paper" else 1)


def test_lora_beside_the_weights_costs_what_it_says(plain: Counts) -> None:
    """Four launches a projection and token: what merging saves."""
    loaded = model()
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    found = counted(compressor("calibrated", loaded, targets), loaded, clips(loaded), lora_mode="separate")
    assert found.step == plain.step + 4 * LAYERS * len(targets)


def test_clips_of_different_length(plain: Counts) -> None:
    """Padding costs masks, in every layer and step, and no waiting in a layer."""
    loaded = model()
    inputs = clips(loaded, (90, 70, 85))
    alone = counted(None, model(), inputs)
    found = counted(compressor("calibrated", loaded), loaded, inputs)
    assert found.prefill - alone.prefill <= 185 * LAYERS and found.prefill_syncs <= 3
    assert found.step <= alone.step * 1.15 and found.step_syncs == 0


@pytest.mark.parametrize("options", [{"ratio": 0.3}, {"budget": 6}], ids=["ratio", "budget"])
@pytest.mark.parametrize("policy", ["keydiff", CALIBRATED[0]])
def test_a_stream(policy: str, options: dict[str, Any]) -> None:
    """A further chunk, over one that is kept whole: each layer holds other entries, which it is asked for once."""
    loaded = tiny_omni.build(LAYERS)
    given = compressor(policy, loaded)
    shared = replace(given.policy, share_heads=True)
    compress = KVCompressor(shared, **options, weights=given.weights, lora=given.lora, base=given.base)
    with SimulatedAccelerator() as accelerator:
        place(loaded)
        chunk = on_device(tiny_omni.context())
        with compress(loaded, Tokenizer()) as session:
            cache = session.extend(chunk, session.extend(chunk))
            found = []
            for ratio in (1.0, None):
                accelerator.reset()
                session.extend(chunk, cache, ratio)
                found.append((accelerator.launches, accelerator.synced))
    (whole, asked), (launches, waited) = found
    assert launches - whole <= (60 if policy == "keydiff" else 125) * LAYERS, launches - whole
    assert waited - asked <= LAYERS + 2, accelerator.syncs
