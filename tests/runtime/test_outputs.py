"""What a compressed generate or forward gives out besides tokens: as the plain model's, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from acckv import InputError, KVCompressor
from acckv.cache.cache import compressed_layers
from acckv.config import When
from acckv.runtime.session import Session
from tests.families import FAMILIES, Family, Tokenizer
from tests.support.running import plain_inputs

STEPS: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}


def rows_of(family: Family, model: Any) -> list[dict[str, Any]]:
    """Questions and clips of different length."""
    return [
        family.clip(model, (20, 21, 22, 23, 24), seed=1),
        family.clip(model, (25,), seed=2, frames=3, sounds=4, intro=(2, 10, 11, 12)),
    ]


def compressor(when: When, policy: str = "keydiff") -> KVCompressor:
    return KVCompressor(policy, ratio=0.4, when=when)


def media_end(batch: dict[str, Any], model: Any, session: Session) -> Tensor:
    """int64 ``[batch]``: column after the media."""
    labels = batch.get("modality_ids")
    if labels is None:
        labels = session.adapter.label(batch["input_ids"], batch["attention_mask"]).labels
    media = (labels == 1) | (labels == 2)
    return media.shape[1] - media.flip(1).long().argmax(dim=1)


@pytest.mark.parametrize(
    ("name", "when"), [*((name, "context") for name in FAMILIES), ("qwen2_5_omni", "prompt"), ("videollama2", "prompt")]
)
def test_hidden_states_of_a_padded_batch(name: str, when: When) -> None:
    """In the prompt's own columns: equal to the plain model's up to the end of the media, where nothing is evicted yet,
    after it to those of each row alone; the head makes the logits of the last ones."""
    family = FAMILIES[name]
    model = family.build()
    rows = rows_of(family, model)
    batch = family.collate(rows)
    asked = {**STEPS, "output_hidden_states": True, "output_logits": True}
    plain = model.generate(**plain_inputs(batch), **asked)
    with compressor(when)(model) as session:
        found = model.generate(**batch, **asked)
        singles = [model.generate(**row, **asked) for row in rows]
        ends = media_end(batch, model, session)
    assert [[state.shape for state in step] for step in found.hidden_states] == [
        [state.shape for state in step] for step in plain.hidden_states
    ]
    size = max(float(state.abs().max()) for state in plain.hidden_states[0])
    for layer, state in enumerate(found.hidden_states[0]):
        for row, single in enumerate(singles):
            alone = single.hidden_states[0][layer][0]
            padding = state.shape[1] - alone.shape[0]
            assert (state[row, padding:] - alone).abs().max() < 1e-5 * size
            context = slice(padding, int(ends[row]))
            assert (state[row, context] - plain.hidden_states[0][layer][row, context]).abs().max() < 1e-5 * size
    head = model.get_output_embeddings()
    for states, logits in zip(found.hidden_states, found.logits, strict=True):
        predicted, right = head(states[-1][:, -1]).log_softmax(-1), logits.log_softmax(-1)
        cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        if cap is None:
            assert (predicted - right).abs().max() < 1e-4
        assert torch.equal(predicted.argmax(-1), right.argmax(-1))


def test_selected_hidden_states() -> None:
    """Layers that were not asked for are None, as without a session."""
    family = FAMILIES["videollama2"]
    model = family.build()
    batch = family.collate(rows_of(family, model))
    with torch.no_grad(), compressor("context")(model):
        cache = [DynamicCache(config=model.config) for _ in range(2)]
        whole = model(**batch, cache=cache[0], output_hidden_states=True).hidden_states
        chosen = model(**batch, cache=cache[1], output_hidden_states=[0, -1]).hidden_states
    assert [state is not None for state in chosen] == [True, False, False, True]
    assert torch.equal(chosen[0], whole[0]) and torch.equal(chosen[-1], whole[-1])


def test_router_logits() -> None:
    """Of every token of a padded batch, one row a token, with the experts' loss computed from all of them."""
    family = FAMILIES["qwen3_omni_moe"]
    model = family.build()
    rows = rows_of(family, model)
    batch = family.collate(rows)

    def routed(inputs: dict[str, Any]) -> Any:
        cache = DynamicCache(config=model.config.get_text_config())
        return model(**inputs, cache=cache, output_router_logits=True)

    with torch.no_grad():
        plain = routed(batch)
        with compressor("context")(model) as session:
            found, singles = routed(batch), [routed(row) for row in rows]
            ends = media_end(batch, model, session)
    length = batch["input_ids"].shape[1]
    assert len(found.router_logits) == len(plain.router_logits) == 3
    for layer, logits in enumerate(found.router_logits):
        assert logits.shape == plain.router_logits[layer].shape
        by_row = logits.view(2, length, -1)
        for row, single in enumerate(singles):
            alone = single.router_logits[layer]
            start = length - alone.shape[0]
            assert (by_row[row, start:] - alone).abs().max() < 1e-4
            right = plain.router_logits[layer].view(2, length, -1)[row, start : ends[row]]
            assert (by_row[row, start : ends[row]] - right).abs().max() < 1e-4


@pytest.mark.parametrize("when", ["context", "prompt"])
def test_logits_and_scores(when: When) -> None:
    """One ``[batch, vocabulary]`` a step: those of forwards of the model with a cache of one's own."""
    family = FAMILIES["videollama2"]
    model = family.build()
    batch = family.collate(rows_of(family, model))
    with torch.no_grad(), compressor(when)(model):
        found = model.generate(**batch, **STEPS, output_logits=True, output_scores=True)
        cache, mask = DynamicCache(config=model.config), batch["attention_mask"]
        logits = model(**batch, cache=cache).logits[:, -1]
        for step in range(3):
            assert (found.logits[step] - logits).abs().max() < 1e-4
            assert torch.equal(found.scores[step], found.logits[step])
            token = found.logits[step].argmax(-1)[:, None]
            assert torch.equal(token[:, 0], found.sequences[:, step - 3])
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            logits = model(input_ids=token, attention_mask=mask, cache=cache).logits[:, -1]


def test_attentions() -> None:
    """Of the prompt as the plain model's, where it is evicted afterwards; of a step over what each layer holds then.

    Where a question reads what was kept of a context, the prompt has no one attention, and none is made up.
    """
    family = FAMILIES["videollama2"]
    model = family.build("eager")
    batch = family.collate(rows_of(family, model))
    asked = {**STEPS, "output_attentions": True}
    plain = model.generate(**plain_inputs(batch), **asked).attentions
    with compressor("prompt", "pyramidkv")(model, Tokenizer()):
        found = model.generate(**batch, **asked)
        held = [layer.physical for layer in compressed_layers(found.cache)]
        for one, other in zip(found.attentions[0], plain[0], strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one[0], other[0], atol=1e-5)
    assert len(set(held)) > 1
    for step, attentions in enumerate(found.attentions[1:]):
        assert [tuple(weights.shape) for weights in attentions] == [(2, 4, 1, width - 1 + step) for width in held]
        assert all(torch.allclose(weights.sum(-1), torch.ones(2, 4, 1)) for weights in attentions)
    with compressor("context")(model) as session:
        expected = model.generate(**batch, **STEPS).sequences
        with pytest.raises(InputError, match="output_attentions: cannot be given for a prompt that is compressed in"):
            model.generate(**batch, **asked)
        assert torch.equal(model.generate(**batch, **STEPS).sequences, expected)
        model.config.output_attentions = True  # of no concern to what gives none out
        context = family.collate([family.context(model, seed=seed, frames=2 + seed) for seed in (0, 1)])
        assert session.compress(**context).kept_entries().sum() > 0
        session.prefill(**context)


@pytest.mark.parametrize("when", ["context", "prompt"])
def test_attentions_of_sdpa_are_none(when: When) -> None:
    family = FAMILIES["videollama2"]
    model = family.build()
    with compressor(when)(model):
        assert model.generate(**family.clip(model), **STEPS, output_attentions=True).attentions == ((), (), ())
