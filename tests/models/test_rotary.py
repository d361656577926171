"""Queries before position embedding, of decoders that turn them in every way there is, are those of the projection."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from acckv import KVCompressor
from acckv.errors import InputError
from acckv.method.rotary import RotaryLayout, rotate, unrotate
from tests.families import FAMILIES, TEXT

SLIDING = {"head_dim": 16, "sliding_window": 8}
#: Class -> what is special in its rotary embedding, as config options.
DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Phi": {},  # a part of the head
    "Glm4": {"head_dim": 16},  # a part, neighbouring pairs
    "Nemotron": {},  # a part of the head
    "GptOss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},  # cosines of half the size
    "Gemma3": {**SLIDING, "num_hidden_layers": 6},  # one a layer type
    "Cohere": {},  # neighbouring pairs, tables of neighbours
    "Helium": {"head_dim": 16},  # neighbouring pairs
    "Ernie4_5": {"head_dim": 16},
    "SmolLM3": {"num_hidden_layers": 4},  # none in each fourth layer
}
EXPECTED = KVCompressor("expected_attention", ratio=0.4)


def decoder(name: str) -> Any:
    config_class = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")._from_config(config_class(**{**TEXT, **DECODERS[name]}))
    model.generation_config.eos_token_id = None
    return model.eval()


def prompt(model: Any) -> dict[str, Tensor]:
    ids = torch.tensor([[2, 10, 11, *[50] * 20, 20, 21]])
    kinds = torch.tensor([[0] * 3 + [1] * 12 + [2] * 8 + [0] * 2])
    embeds = model.get_input_embeddings()(ids).detach()
    return {"inputs_embeds": embeds, "attention_mask": torch.ones_like(ids), "modality_ids": kinds}


def check(model: Any, inputs: dict[str, Any]) -> int:
    """Compare what a session takes the rotation off with what the projections gave; how many layers were compared."""
    with EXPECTED(model) as session:
        layers = [layer for layer in session.adapter.attention_layers if layer.owner and layer.slot is not None]
        given: dict[int, Tensor] = {}
        hooks = []
        for slot, layer in enumerate(layers):
            part: Any = getattr(layer.module, "q_norm", None) or layer.module.q_proj
            hooks.append(part.register_forward_hook(lambda m, a, out, slot=slot: given.update({slot: out.detach()})))
        prefill = session.prefill(**inputs)
        seen = session.dispatcher.policy_inputs.complete(prefill.observations, [], prefill.embedded, [])
        for hook in hooks:
            hook.remove()
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    for slot, one in enumerate(seen):
        assert one.rotation is not None
        cos, sin = one.rotation.cos[:, None], one.rotation.sin[:, None]
        found = unrotate(one.queries, cos, sin, one.rotation.layout)
        _, heads, rows, size = found.shape
        expected = given[slot]
        if expected.shape[1:3] != (heads, rows):  # as the projection gives it
            expected = expected.reshape(1, rows, heads, size).transpose(1, 2)
        assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
        assert torch.allclose(rotate(found, cos, sin, one.rotation.layout), one.queries, atol=1e-4)
    return len(seen)


@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str) -> None:
    model = decoder(name)
    assert check(model, prompt(model)) >= 1


@pytest.mark.parametrize("name", ["qwen2_5_omni_interleaved", "qwen3_omni_moe", "gemma4"])
def test_families(name: str) -> None:
    model = FAMILIES[name].build()
    assert check(model, FAMILIES[name].context(model)) == FAMILIES[name].layers


def test_layers_that_turn_nothing_and_layers_that_do() -> None:
    with EXPECTED(decoder("SmolLM3")) as session:
        assert [layout.size for layout in session.dispatcher.policy_inputs.layouts] == [16, 16, 16, 0]


def test_half_precision_is_recognised() -> None:
    with EXPECTED(decoder("Glm4").bfloat16()) as session:
        assert {layout.neighbours for layout in session.dispatcher.policy_inputs.layouts} == {True}


def test_what_cannot_be_taken_off_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm after the rotation: no turning of what the projection gave."""
    model = decoder("Llama")
    module = __import__(type(model).__module__, fromlist=["x"])
    own = module.apply_rotary_pos_emb
    monkeypatch.setattr(
        module, "apply_rotary_pos_emb", lambda q, k, cos, sin, *rest: (own(q, k, cos, sin)[0].sinh(), k)
    )
    with (
        pytest.raises(InputError, match=r"layer 0 of LlamaForCausalLM turns in a way that is not known"),
        EXPECTED(model),
    ):
        pass
    assert "generate" not in vars(model)  # nothing of the session is left


def test_a_layout_turns_the_pairs_it_names() -> None:
    vectors, cos, sin = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.zeros(4), torch.ones(4)
    assert rotate(vectors, cos, sin, RotaryLayout(4, size=4)).tolist() == [-3, -4, 1, 2]
    assert rotate(vectors, cos, sin, RotaryLayout(4, size=4, neighbours=True)).tolist() == [-2, 1, -4, 3]
    part = RotaryLayout(4, start=2, size=2)
    table = torch.tensor([0.5])
    assert part.spread(table, 1.0).tolist() == [1, 1, 0.5, 0.5]
    assert rotate(vectors, part.spread(torch.zeros(1), 1.0), part.spread(torch.ones(1), 0.0), part).tolist() == [
        1,
        2,
        -4,
        3,
    ]
