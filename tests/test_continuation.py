"""What follows a compressed cache stands where it would stand in one prompt, whoever runs the next forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from acckv import CompressionConfig, KVCompressor
from acckv.cache import compressed_layers
from acckv.errors import InputError
from tests.families import FAMILIES, Family, Tokenizer

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
QUESTION = torch.tensor([[20, 21, 22, 23]])
HALF = KVCompressor(CompressionConfig(policy="keydiff", ratio=0.5))


@pytest.fixture(scope="module", params=["qwen2_5_omni_interleaved", "qwen3_omni_moe", "gemma4", "videollama2"])
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def model(family: Family) -> Any:
    return family.build()


def whole(cache: Any, ids: Tensor) -> dict[str, Tensor]:
    """The ids of a conversation whose beginning the cache has seen, with their mask."""
    mask = torch.cat([cache.labels.real.long(), torch.ones_like(ids)], dim=1)
    return {"input_ids": torch.cat([ids.new_full(cache.labels.labels.shape, 10), ids], dim=1), "attention_mask": mask}


def test_generate_goes_on_from_a_compressed_cache(family: Family, model: Any) -> None:
    """With the ids of the whole conversation, or the new ones and a mask of the whole; two clips by turns."""
    with HALF(model) as session:
        caches = [session.compress(**family.context(model, seed=seed, frames=2 + seed)) for seed in range(2)]
        expected = [session.answer(cache, QUESTION, **GREEDY) for cache in caches]
        for _ in range(2):
            for cache, right in zip(caches, expected, strict=True):
                inputs = whole(cache, QUESTION)
                for given in (inputs, {**inputs, "input_ids": QUESTION}):
                    found = model.generate(**given, cache=copy.deepcopy(cache), **GREEDY)
                    assert torch.equal(found[:, -6:], right)


def test_at_ratio_1_it_is_the_plain_prompt(family: Family, model: Any) -> None:
    asked = family.clip(model, tuple(QUESTION[0].tolist()))
    options = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    plain = {name: value for name, value in asked.items() if name != "modality_ids"}
    expected = torch.stack(model.generate(**plain, **options).logits)
    with KVCompressor(CompressionConfig(policy="keydiff", ratio=1.0))(model) as session:
        cache = session.compress(**family.context(model))
        found = torch.stack(model.generate(**whole(cache, QUESTION), cache=cache, **options).logits)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_rows_of_different_length_and_a_second_turn(family: Family, model: Any) -> None:
    """The second question is asked behind the first answer, which each row has at its own positions."""
    rows = [family.context(model, seed=1), family.context(model, seed=2, frames=3, intro=(2, 10, 11, 12, 13))]
    with HALF(model) as session:
        single = []
        for row in rows:
            cache = session.compress(**row)
            first = model.generate(**whole(cache, QUESTION), cache=cache, **GREEDY)[:, -6:]
            ids = torch.cat([QUESTION, first, QUESTION], dim=1)
            single.append((first, model.generate(**whole(cache, ids), cache=cache, **GREEDY)[:, -6:]))
        cache = session.compress(**family.collate(rows))
        question = QUESTION.expand(2, -1)
        first = model.generate(**whole(cache, question), cache=cache, **GREEDY)[:, -6:]
        ids = torch.cat([question, first, question], dim=1)
        second = model.generate(**whole(cache, ids), cache=cache, **GREEDY)[:, -6:]
    assert torch.equal(first, torch.cat([one for one, _ in single]))
    assert torch.equal(second, torch.cat([two for _, two in single]))


def test_a_forward_without_positions(family: Family, model: Any) -> None:
    with torch.no_grad(), HALF(model) as session:
        cache = session.compress(**family.context(model))
        model.generate(**family.clip(model, seed=3, frames=4), **GREEDY)  # leaves a record of its own in the model
        positions = session.adapter.text_positions(cache.next_position + torch.arange(4))
        mask = whole(cache, QUESTION)["attention_mask"]
        options = {"input_ids": QUESTION, "attention_mask": mask, "use_cache": True}
        expected = model(**options, cache=cache.branch(), position_ids=positions).logits
        assert torch.allclose(model(**options, cache=cache.branch()).logits, expected, atol=1e-5)


def test_new_ids_without_a_mask_of_the_whole_are_refused(family: Family, model: Any) -> None:
    with HALF(model) as session:
        cache = session.compress(**family.context(model))
        with pytest.raises(InputError, match="input_ids: brings no token after the"):
            model.generate(input_ids=QUESTION, cache=cache, **GREEDY)


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_frames_that_are_no_whole_number_of_positions_apart(name: str) -> None:
    """Qwen3-Omni keeps the fraction, Qwen2.5-Omni cuts it off; a session does as the model does."""
    family = FAMILIES[name]
    model = family.build()
    seconds = {"video_second_per_grid": torch.tensor([0.37])}
    asked = {**family.clip(model, tuple(QUESTION[0].tolist())), **seconds}
    expected = model.generate(**asked, **GREEDY)[:, -6:]
    with KVCompressor(CompressionConfig(policy="keydiff", ratio=1.0))(model) as session:
        cache = session.compress(**{**family.context(model), **seconds})
        assert torch.equal(session.answer(cache, QUESTION, **GREEDY), expected)
        assert torch.equal(model.generate(**whole(cache, QUESTION), cache=cache, **GREEDY)[:, -6:], expected)
        positions = session.prefill(**{**family.context(model), **seconds}).embedded.position_ids
    assert bool((positions != positions.round()).any()) == (name == "qwen3_omni_moe")


@pytest.mark.parametrize("when", ["context", "prompt"])
def test_the_context_is_repeated_where_it_stands(family: Family, model: Any, when: Any) -> None:
    """KVzip under generate keeps what it keeps of a prefill of its own, whatever numbers the positions are."""
    zipped = KVCompressor(CompressionConfig(policy="kvzip", ratio=0.4, when=when))
    inputs = family.clip(model) if when == "prompt" else family.context(model)
    with zipped(model, Tokenizer()) as session:
        model.generate(**family.clip(model), **GREEDY)
        assert session.last_cache is not None
        found = [layer.labels for layer in compressed_layers(session.last_cache)]
        expected = compressed_layers(session.compress(session.prefill(**inputs)))
    for one, other in zip(found, expected, strict=True):
        assert one is not None and torch.equal(one[..., : other.region], other.labels)
