"""Several turns: of text, with a new clip, branching; nothing is re-fed, re-compressed or copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from acckv import InputError, KVCompressor
from acckv.cache.cache import compressed_layers
from acckv.config import When
from tests.families import Built, Family, Tokenizer
from tests.reference import Reference
from tests.support import not_none
from tests.support.running import assert_close, continued, plain_inputs

RATIO, FIRST, SECOND = 0.4, 2 * 4 + 6, 1 * 4 + 3  # media entries of the two clips


def whole(family: Family, reference: Reference, turns: list[dict[str, Any]], last: int) -> torch.Tensor:
    """Logits of the last tokens of a conversation run in one forward, evicted entries hidden."""
    with reference.hiding() as full:
        return full(**plain_inputs(family.join(turns)), use_cache=False).logits[0, -last:]


@pytest.mark.parametrize("policy", ["keydiff", "snapkv", "pyramidkv", "fastv", "madakv", "expected_attention"])
def test_a_conversation_equals_one_masked_forward(built: Built, policy: str) -> None:
    """A clip, text, a new clip, text: positions, masks and budgets of each turn, against all of it at once."""
    family, model = built
    turns = [
        family.context(model),
        family.text(model, (20, 21, 22, 40, 41)),
        family.context(model, seed=7, frames=1, sounds=3, intro=(23,)),
        family.text(model, (24, 25)),
    ]
    reference = Reference(model)
    with KVCompressor(policy, ratio=RATIO)(model) as session:
        cache = session.compress(**turns[0])
        reference.read(turns[0], cache)
        held = [layer.physical for layer in compressed_layers(cache)]
        cache = session.extend(turns[1], cache)
        assert [layer.physical for layer in compressed_layers(cache)] == [count + 5 for count in held]
        assert cache.kept_entries().sum() == int(RATIO * family.layers * FIRST)
        cache = session.extend(turns[2], cache)
        reference.read(family.join(turns[:3]), cache)
        logits = continued(model, session, cache, (24, 25))
    # Only what was new is compressed, and the whole stays within its share of everything that was offered.
    assert cache.kept_entries().sum() == int(RATIO * family.layers * (FIRST + SECOND))
    for (_, before), (_, after) in reference.evictions.values():
        assert torch.equal(after[:, : before.shape[1]], before)
    expected = whole(family, reference, turns, 2)
    assert_close(logits, expected)


@pytest.mark.parametrize("when", ["context", "prompt"])
def test_a_later_clip_under_plain_generate(built: Built, when: When) -> None:
    """generate goes on from the cache that generate returned, first with text, then with a new clip."""
    family, model = built
    clip = family.clip(model)
    more = family.clip(model, (26, 27), seed=7, frames=1, sounds=3, intro=(23,))
    reference = Reference(model)

    def converse(model: Any, in_session: bool) -> list[torch.Tensor]:
        """Logits of each turn ``[steps, vocabulary]``."""
        cache: Any = DynamicCache(config=model.config.get_text_config())
        turns, logits = [], []
        for new in (clip, family.text(model, (24, 25)), more):
            turns.append(new)
            inputs = family.join(turns)
            for name in list(inputs):  # the features of earlier turns are in the cache
                if name not in family.padding:
                    inputs.pop(name)
            inputs |= {name: value for name, value in new.items() if name not in family.padding}
            if not in_session:
                inputs.pop("modality_ids", None)
                # Some models take media that come behind a cache for text; ours stand as in one prompt.
                inputs["position_ids"] = family.positions(model, family.join(turns))
            out = model.generate(
                **inputs,
                cache=cache,
                max_new_tokens=4,
                do_sample=False,
                suppress_tokens=list(range(100, 128)),  # what a random model says may look like media
                return_dict_in_generate=True,
                output_logits=True,
            )
            cache = out.cache
            logits.append(torch.stack(out.logits)[:, 0])
            turns.append(family.text(model, tuple(out.sequences[0, -4:].tolist())))
            if in_session:
                reference.read(family.join(turns), cache)
        return logits

    with KVCompressor("keydiff", when=when, ratio=RATIO)(model) as session:
        found = converse(model, in_session=True)
        assert not_none(session.last_cache).kept_entries().sum() == int(RATIO * family.layers * (FIRST + SECOND))
    assert [len(times) for times in reference.evictions.values()] == [2] * family.layers
    with reference.hiding() as full:
        expected = converse(full, in_session=False)
    for turn, right in zip(found, expected, strict=True):
        assert_close(turn, right)


@pytest.mark.parametrize("policy", ["acckv", "look_m"])
def test_a_later_clip_is_merged_into_itself(built: Built, policy: str) -> None:
    """Policies that merge keep their budget in a later turn, and leave what was kept before as it is."""
    family, model = built
    with KVCompressor(policy, ratio=RATIO)(model, Tokenizer()) as session:
        first = session.compress(**family.context(model))
        cache = session.extend(family.context(model, seed=7, frames=1, sounds=3, intro=(23,)), first)
    assert cache.kept_entries().sum() == int(RATIO * family.layers * (FIRST + SECOND))
    for old, new in zip(compressed_layers(first), compressed_layers(cache), strict=True):
        assert torch.equal(old.keys, new.keys[:, :, : old.physical])
        assert torch.equal(old.values, new.values[:, :, : old.physical])


def test_repetition_needs_the_whole_context(built: Built) -> None:
    family, model = built
    with KVCompressor("kvzip", ratio=RATIO)(model, Tokenizer()) as session:
        cache = session.compress(**family.context(model))
        with pytest.raises(InputError, match="kvzip repeats a whole context"):
            session.extend(family.context(model), cache)


def test_questions_branch_without_copying(built: Built) -> None:
    family, model = built
    with KVCompressor("keydiff", ratio=RATIO)(model) as session:
        cache = session.compress(**family.context(model))

        def places() -> list[int]:
            return [t.data_ptr() for layer in compressed_layers(cache) for t in (layer.keys, layer.values)]

        before, bytes_before = places(), cache.kv_bytes()
        branch = cache.branch()
        assert [t.data_ptr() for layer in compressed_layers(branch) for t in (layer.keys, layer.values)] == before
        questions = [(20, 21, 22), (23,), (24, 25)]
        alone = [session.answer(cache, torch.tensor([q]), max_new_tokens=5, do_sample=False)[0] for q in questions]
        again = [session.answer(cache, torch.tensor([q]), max_new_tokens=5, do_sample=False)[0] for q in questions]
        assert places() == before and cache.kv_bytes() == bytes_before
        ids = torch.tensor([[0] * (3 - len(q)) + list(q) for q in questions])
        together = session.answer(cache, ids, (ids > 0).long(), max_new_tokens=5, do_sample=False)
    assert all(torch.equal(one, other) for one, other in zip(alone, again, strict=True))
    assert torch.equal(torch.stack(alone), together)


def test_another_clip_in_between_leaves_a_conversation_alone(built: Built) -> None:
    """The model's own record of positions (rope_deltas) belongs to the last forward; a cache keeps its own."""
    family, model = built
    question = torch.tensor([[20, 21, 22]])
    with KVCompressor("keydiff", ratio=RATIO)(model) as session:
        cache = session.compress(**family.context(model))
        expected = session.answer(cache, question, max_new_tokens=5, do_sample=False)
        model.generate(**family.clip(model, frames=3, sounds=1, seed=3), max_new_tokens=2)
        assert torch.equal(session.answer(cache, question, max_new_tokens=5, do_sample=False), expected)


def test_last_cache_of_generate_goes_on(built: Built) -> None:
    """What generate compressed can be asked again, its own answer included."""
    family, model = built
    clip = family.clip(model)
    with KVCompressor("keydiff", when="prompt", ratio=RATIO)(model) as session:
        tokens = model.generate(**clip, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
        found = continued(model, session, not_none(session.last_cache), (tokens[-1], 30))
        cache = session.extend(family.text(model, tuple(tokens[:3])), session.compress(**clip))
        expected = continued(model, session, cache, (tokens[-1], 30))
    assert_close(found, expected)


def test_text_first_then_a_clip(built: Built) -> None:
    """A cache that generate made before any clip was there is taken over as it is."""
    family, model = built
    greeting, clip = family.text(model, (2, 50, 51, 52)), family.clip(model, intro=(23,))
    both = family.join([greeting, clip])
    compressor = KVCompressor("keydiff", when="prompt", ratio=RATIO)
    with compressor(model) as session, torch.no_grad():
        cache: Any = DynamicCache(config=model.config.get_text_config())
        one = {name: value for name, value in greeting.items() if name != "mm_token_type_ids"}
        model(**one, cache=cache)
        seen = one["attention_mask"].shape[1]
        positions = session.adapter.prompt_positions(clip, clip["attention_mask"].bool(), torch.tensor([[seen]]))
        logits = model(
            **{**clip, "attention_mask": both["attention_mask"]}, position_ids=positions, cache=cache
        ).logits[0, -1]
        kept = not_none(session.last_cache).kept_entries().sum()
        expected = not_none(session.prefill(**both).logits)[0]
    assert kept == int(RATIO * family.layers * FIRST)
    assert_close(logits, expected)


def test_clips_of_different_length_in_a_later_turn(built: Built) -> None:
    """A batch of two conversations equals each alone; sliding windows count columns, so there it is refused."""
    family, model = built
    rows = [
        [family.context(model, seed=1), family.context(model, seed=2, frames=1, sounds=3, intro=(23,))],
        [family.context(model, seed=3, frames=1), family.context(model, seed=4, frames=2, sounds=5, intro=(24, 25))],
    ]
    with KVCompressor(ratio=RATIO)(model, Tokenizer()) as session:
        first = session.compress(**family.collate([row[0] for row in rows]))
        second = family.collate([row[1] for row in rows])
        if session.adapter.has_windows:
            with pytest.raises(InputError, match="one row at a time"):
                session.extend(second, first)
            return
        cache = session.extend(second, first)
        batch = session.answer(cache, torch.tensor([[20, 21]] * 2), max_new_tokens=5, do_sample=False)
        for row, (one, two) in enumerate(rows):
            alone = session.extend(two, session.compress(**one))
            answer = session.answer(alone, torch.tensor([[20, 21]]), max_new_tokens=5, do_sample=False)
            assert torch.equal(batch[row], answer[0])
