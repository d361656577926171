"""The training simulation on every family: equal to eviction, differentiable, and gradient checkpointing may be on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from acckv import InputError, KVCompressor
from acckv.models import find_adapter
from acckv.policies import AccKV
from acckv.runtime.prefill import Prefill
from acckv.runtime.simulation import Simulation
from tests.families import FAMILIES, Built, Tokenizer
from tests.learned import trained, weights_of
from tests.support.running import assert_close, continued, plain_inputs

QUESTION = (20, 21, 22)


@pytest.fixture(scope="module", params=list(FAMILIES))
def built(request: pytest.FixtureRequest) -> Built:
    family = FAMILIES[request.param]
    return family, family.build()


def after(session: Any, prefill: Any, tokens: tuple[int, ...] = QUESTION) -> dict[str, Any]:
    """Inputs of text that follows a prefill."""
    rows = prefill.labels.labels.shape[0]
    real = prefill.labels.real.long()
    return {
        "input_ids": torch.tensor([tokens] * rows, device=real.device),
        "attention_mask": torch.cat([real, real.new_ones(rows, len(tokens))], dim=1),
        "position_ids": session.adapter.text_positions(
            prefill.next_position + torch.arange(len(tokens), device=real.device)
        ),
    }


@pytest.mark.parametrize("preset", ["paper", "context"])
def test_hard_gates_equal_eviction(built: Built, preset: str) -> None:
    family, model = built
    compressor = KVCompressor(AccKV.preset(preset), ratio=0.4)
    with compressor(model, Tokenizer()) as session, torch.no_grad():
        prefill = session.prefill(**family.context(model))
        simulated = session.simulate(prefill, session.plan(prefill), **after(session, prefill))
        evicted = continued(model, session, session.compress(prefill), QUESTION)
        teacher = session.simulate(prefill, None, **after(session, prefill))
        full = continued(model, session, session.compress(prefill, ratio=1.0), QUESTION)
    assert_close(simulated[0], evicted)
    assert_close(teacher[0], full)


def test_packed_turns_equal_single_ones(built: Built) -> None:
    """Two questions in one row that do not see each other, by a 4-D mask."""
    family, model = built
    first, second = (20, 21, 22), (23, 24)
    with KVCompressor("keydiff", ratio=0.4)(model) as session, torch.no_grad():
        prefill = session.prefill(**family.context(model, frames=3, sounds=9))
        plans = session.plan(prefill)
        alone = [session.simulate(prefill, plans, **after(session, prefill, turn))[0] for turn in (first, second)]
        offsets = torch.tensor([[0, 1, 2, 0, 1]])
        same = torch.tensor([0, 0, 0, 1, 1])
        visible = (same[:, None] == same) & torch.ones(5, 5, dtype=torch.bool).tril()
        length = prefill.labels.labels.shape[1]
        visible = torch.cat([torch.ones(5, length, dtype=torch.bool), visible], dim=1)[None, None]
        packed = session.simulate(
            prefill,
            plans,
            input_ids=torch.tensor([[*first, *second]]),
            attention_mask=torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min),
            position_ids=session.adapter.text_positions(prefill.next_position + offsets),
        )
    assert_close(packed[0, :3], alone[0])
    assert_close(packed[0, 3:], alone[1])


@pytest.mark.parametrize("policy", ["snapkv", "kvzip", "acckv"])
def test_kept_rows_equal_a_prefill_of_their_own(built: Built, policy: Any) -> None:
    """A clip's prefill, kept by itself and stacked beside a longer clip's, is the batch's."""
    family, model = built
    long, short = family.context(model, frames=3, sounds=9), family.context(model, seed=1)
    with KVCompressor(policy, ratio=0.4)(model, Tokenizer()) as session, torch.no_grad():
        if session.adapter.has_windows:
            with pytest.raises(InputError, match="cannot be kept by row"):
                session.prefill(**long).unstack()
            return
        batch = session.prefill(**family.collate([short, long]))
        reversed_rows = [Prefill.stack(batch.unstack()[::-1]).unstack()[place] for place in (1, 0)]
        again = Prefill.stack(reversed_rows)
        for row, single in enumerate((short, long)):
            alone = session.prefill(**single)
            expected = session.simulate(alone, session.plan(alone), **after(session, alone))
            for prefill in (batch, again):
                found = session.simulate(prefill, session.plan(prefill), **after(session, prefill))
                assert_close(found[row], expected[0])
            kept = reversed_rows[row]
            assert_close(session.simulate(kept, session.plan(kept), **after(session, kept)), expected)


def test_gradient_checkpointing_changes_nothing(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the cache from the layers and repeats their forward in backward: the gates must still be there."""
    family, model = built
    attend, calls = Simulation.attend, []

    def counted(self: Simulation, *args: Any, **kwargs: Any) -> Any:
        calls.append(self)
        return attend(self, *args, **kwargs)

    monkeypatch.setattr(Simulation, "attend", counted)
    required = [parameter.requires_grad for parameter in model.parameters()]
    found = []
    for checkpointing in (False, True):
        compressor = trained(model)
        model.requires_grad_(False)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        with compressor(model, Tokenizer(), lora_mode="separate") as session:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(".lora_" in name)
            prefill = session.prefill(**family.context(model))
            plans = session.plan(prefill, 0.4, temperature=0.5)
            logits = session.simulate(prefill, plans, **after(session, prefill))
            once = len(calls)
            logits.square().mean().backward()
            assert len(calls) == (2 * once if checkpointing else once)
            calls.clear()
            assert session.attached is not None
            parameters = [*weights_of(compressor).parameters(), *session.attached.parameters()]
            found.append((logits.detach(), [parameter.grad for parameter in parameters]))
        model.activation_checkpointing_disable()
        model.eval()
    for parameter, flag in zip(model.parameters(), required, strict=True):
        parameter.requires_grad_(flag)
    (plain, expected), (checkpointed, gradients) = found
    assert_close(checkpointed, plain)
    reached = 0
    for gradient, reference in zip(gradients, expected, strict=True):
        assert (gradient is None) == (reference is None)
        if gradient is not None and reference is not None:
            assert torch.allclose(gradient, reference, atol=1e-6 + 1e-4 * float(reference.abs().max()))
            reached += bool(reference.abs().max() > 0)
    assert reached > 15  # budgets, scores, probes, merging, alignment and LoRA


def test_lora_is_on_the_decoder_alone_and_comes_off(built: Built) -> None:
    family, model = built
    adapter = find_adapter(model)
    names = list(adapter.projections(("q_proj", "v_proj")))
    decoder = next(name for name, module in model.named_modules() if module is adapter.decoder)
    assert names and all(name.startswith(f"{decoder}.layers.") for name in names)
    assert len([name for name in names if name.endswith("q_proj")]) == len(adapter.decoder.layers)
    clip = plain_inputs(family.clip(model))
    before = model.generate(**clip, max_new_tokens=2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for mode in ("separate", "merged"):
        with trained(model)(model, Tokenizer(), lora_mode=mode) as session:
            session.compress(**family.context(model))
            assert any("lora" in name for name, _ in model.named_modules()) == (mode == "separate")
        assert not any("lora" in name for name, _ in model.named_modules())
        assert model.state_dict().keys() == state.keys()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert torch.equal(model.generate(**clip, max_new_tokens=2), before)


@pytest.mark.parametrize("preset", ["paper", "context"])
def test_a_calibrated_stream_stays_within_its_budget(built: Built, preset: str) -> None:
    family, model = built
    weights = trained(model).weights
    chunk = family.context(model, frames=1, sounds=3, intro=())
    for options in ({}, {"share_heads": True}):
        policy = AccKV.preset(preset, n_probe_queries=2, **options)
        with KVCompressor(policy, budget=4, weights=weights)(model, Tokenizer()) as session:
            cache = session.extend(chunk, session.extend(chunk, session.extend(chunk)))
        assert cache.kept_entries().sum() == 4 * family.layers


@pytest.mark.parametrize("preset", ["paper", "context"])
def test_a_head_alone_is_planned_as_beside_the_others(built: Built, preset: str) -> None:
    family, model = built
    # The split that attention asks for is measured over the heads that are seen.
    policy = AccKV.preset(preset, n_probe_queries=2, n_neighbours=2, focusing=False)
    compressor = KVCompressor(policy, weights=trained(model).weights)
    with compressor(model, Tokenizer()) as session, torch.no_grad():
        prefill = session.prefill(**family.context(model, frames=3, sounds=9))
        observed = prefill.probes if policy.observes_attention else prefill.observations
    assert observed is not None
    labels = prefill.labels

    planner, budget = compressor.planners.default, torch.tensor([7])
    policies = [planner.policy.head(head) for head in range(observed[1].keys.shape[1])]
    whole = planner.compress_layer(1, observed[1], [labels], budget, 0.3)
    joined = planner.compress_layer(1, observed[1], [labels] * len(policies), budget, 0.3, policies=policies)
    assert torch.equal(whole.log_gates, joined.log_gates)
    torch.testing.assert_close((whole.merged_keys, whole.merged_values), (joined.merged_keys, joined.merged_values))
    torch.testing.assert_close(whole.merged_bias, joined.merged_bias)
