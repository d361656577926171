"""What follows a compressed cache stands where it would in one prompt, however it is run and whatever ran before."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from acckv import InputError, KVCompressor
from acckv.cache.cache import CompressedCache, compressed_layers
from acckv.config import When
from acckv.models.batching import rope_positions
from acckv.runtime.context_reconstruction import moved_positions
from tests.families import FAMILIES, Built, Family, Tokenizer
from tests.support import not_none
from tests.support.model_sweep import build
from tests.support.running import assert_close, generate, plain_inputs

OMNI = ["qwen2_5_omni", "qwen2_5_omni_interleaved", "qwen3_omni_moe"]
QUESTION = (20, 21, 22, 23)
STEPS = 3
ASKED = torch.tensor([QUESTION])
GREEDY: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}


@pytest.fixture(scope="module", params=["qwen2_5_omni_interleaved", "qwen3_omni_moe", "gemma4", "videollama2"])
def built(request: pytest.FixtureRequest) -> Built:
    return FAMILIES[request.param], FAMILIES[request.param].build()


@pytest.fixture(scope="module", params=OMNI)
def omni(request: pytest.FixtureRequest) -> Built:
    return FAMILIES[request.param], FAMILIES[request.param].build()


def compressor(ratio: float = 1.0, policy: Any = "keydiff", when: When = "context") -> KVCompressor:
    return KVCompressor(policy, ratio=ratio, when=when)


def generated(model: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    """Logits of each step ``[steps, rows, vocabulary]``."""
    return generate(model, inputs, **{**GREEDY, **options})[1]


def whole(cache: Any, ids: Tensor) -> dict[str, Tensor]:
    """The ids of a conversation whose beginning the cache has seen, with their mask."""
    mask = torch.cat([cache.labels.real.long(), torch.ones_like(ids)], dim=1)
    return {"input_ids": torch.cat([ids.new_full(cache.labels.labels.shape, 10), ids], dim=1), "attention_mask": mask}


@contextmanager
def watched(model: Any) -> Iterator[list[Tensor]]:
    """The position ids ``[3 or 1, batch, tokens]`` that each call of the decoder gets."""
    seen: list[Tensor] = []

    def note(module: Any, args: Any, options: dict[str, Any]) -> None:
        positions = rope_positions(options["position_ids"])
        seen.append(positions if positions.ndim == 3 else positions[None])

    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def two_clips(family: Family, model: Any, question: tuple[int, ...]) -> dict[str, Any]:
    """A left-padded batch of clips of different length."""
    return family.collate([family.clip(model, question, seed=1), family.clip(model, question, seed=2, frames=1)])


def test_generate_on_a_compressed_cache(built: Built) -> None:
    """At ratio 1 it is the plain model's, on copies and branches, from all ids or the new ones, after another clip."""
    family, model = built
    expected = generated(model, plain_inputs(two_clips(family, model, QUESTION)))
    whole = two_clips(family, model, QUESTION)
    key = "input_ids" if "input_ids" in whole else "inputs_embeds"
    mask = whole["attention_mask"]
    with compressor()(model) as session:
        cache = session.compress(**two_clips(family, model, ()))
        new = torch.tensor([QUESTION] * 2)
        calls = [{"input_ids": new, "attention_mask": mask}]
        if key == "input_ids":
            calls.append({"input_ids": whole[key], "attention_mask": mask})
        session.compress(**family.context(model, frames=3, sounds=1))  # the model's own record is of this one now
        for call in calls:
            for taken in (cache.branch(), copy.deepcopy(cache)):
                assert_close(generated(model, call, cache=taken), expected)
        found = session.answer(cache, new, **GREEDY)
        assert torch.equal(found.T, expected.argmax(-1))


def test_forward_without_positions(built: Built) -> None:
    """A question, then token by token, with nothing but a mask; single tokens do not wait to be told either."""
    family, model = built
    whole = two_clips(family, model, QUESTION)
    with torch.no_grad():
        expected = model(**plain_inputs(whole), use_cache=False).logits[:, -len(QUESTION) :]
    with compressor()(model) as session, torch.no_grad():
        cache = session.compress(**two_clips(family, model, ()))
        session.compress(**family.context(model, frames=3, sounds=1))
        mask, found = cache.labels.real.long(), []
        branch = cache.branch()
        for piece in (QUESTION[:2], QUESTION[2:3], QUESTION[3:]):
            ids = torch.tensor([piece] * 2)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            found.append(model(input_ids=ids, attention_mask=mask, cache=branch, use_cache=True).logits)
    assert_close(torch.cat(found, dim=1), expected)


def test_beams_take_copies_of_the_cache(omni: Built) -> None:
    family, model = omni
    beams: dict[str, Any] = {"num_beams": 2, "max_new_tokens": STEPS}
    whole = two_clips(family, model, QUESTION)
    expected = model.generate(**whole, **beams)
    text = {name: whole[name] for name in ("input_ids", "attention_mask")}
    with compressor()(model) as session:
        cache = session.compress(**two_clips(family, model, ()))
        assert torch.equal(model.generate(**text, **beams, cache=cache.branch(2)), expected)
        with pytest.raises(InputError, match=r"holds 2 rows and is read by 4; give cache\.branch"):
            model.generate(**text, **beams, cache=cache.branch())
        with pytest.raises(InputError, match="holds 2 rows and is read by 3"):
            model.generate(input_ids=torch.zeros(3, 30, dtype=torch.long), cache=cache.branch())
        with pytest.raises(InputError, match="brings no token after the"):
            model.generate(input_ids=torch.tensor([QUESTION] * 2), cache=cache.branch())


def test_caches_of_generate_by_turns(omni: Built) -> None:
    """Two clips under plain generate, then a question to each: both go on where their own conversation ended."""
    family, model = omni
    clips = [family.clip(model, QUESTION, seed=1), family.clip(model, QUESTION, seed=2, frames=3, sounds=2)]
    for when in ("context", "prompt"):
        with watched(model) as seen, compressor(0.3, when=when)(model) as session:
            said, caches = [], []
            for clip in clips:
                out = model.generate(**clip, **GREEDY, return_dict_in_generate=True)
                said.append(out.sequences)
                caches.append(out.cache)
                assert out.cache is session.last_cache and isinstance(out.cache, CompressedCache)
            for clip, ids, cache in zip(clips, said, caches, strict=True):
                ids = torch.cat([ids, torch.tensor([[24, 25]])], dim=1)
                text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                seen.clear()
                model.generate(**text, **GREEDY, cache=cache)
                found = torch.cat(seen, dim=-1)
                right = family.positions(model, {**clip, **text})
                assert right is not None
                assert torch.equal(found[..., :3], right[..., -3:].to(found.dtype))  # the last said was not read yet
                assert bool((found.diff(dim=-1) == 1).all())


def test_a_new_clip_under_generate_on_a_compressed_cache(omni: Built) -> None:
    """Its media stand behind the conversation so far, as if all of it had been one prompt; so do turns after it."""
    family, model = omni
    turns = [family.context(model), family.clip(model, QUESTION, seed=7, frames=1, sounds=3, intro=(23,))]
    both = family.join(turns)
    with watched(model) as seen:
        model.generate(**both, **GREEDY)
        expected = torch.cat(seen, dim=-1)
        with compressor(0.3, when="prompt")(model) as session:
            cache = session.compress(**turns[0]).branch()
            first = cache.get_seq_length()
            seen.clear()
            later = {**turns[1], "attention_mask": both["attention_mask"]}
            model.generate(**{**later, "input_ids": both["input_ids"]}, **GREEDY, cache=cache)
            assert torch.equal(torch.cat(seen, dim=-1), expected[..., first:])
            assert session.last_cache is cache
            assert cache.full_entries().tolist() == [12, 9]
            seen.clear()
            mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
            model(input_ids=torch.tensor([[24]]), attention_mask=mask, cache=cache.branch())
            assert torch.equal(seen[0], expected[..., -1:] + 1)


def test_padding_of_a_later_turn_is_no_text(built: Built) -> None:
    """Rows of a batch whose second turns differ in length go on as each does alone."""
    family, model = built
    turns = [(40, 41, 42, 43), (50,)]
    ids = torch.tensor([[40, 41, 42, 43], [0, 0, 0, 50]])
    with compressor(0.4)(model) as session, torch.no_grad():
        cache = session.compress(**two_clips(family, model, ()))
        branch = cache.branch()
        mask = torch.cat([cache.labels.real.long(), (ids > 0).long()], dim=1)
        model(input_ids=ids, attention_mask=mask, cache=branch, use_cache=True)
        together = session.answer(branch, torch.tensor([[24, 25]] * 2), **GREEDY)
        assert torch.equal(branch.branch().labels.real, mask > 0)
        for row, turn in enumerate(turns):
            clip = family.context(model, seed=row + 1, frames=2 - row)
            alone = session.answer(session.compress(**clip), torch.tensor([[*turn, 24, 25]]), **GREEDY)
            assert torch.equal(together[row], alone[0])


def test_guesses_taken_back_move_no_position(omni: Built) -> None:
    """Prompt lookup crops the cache; what it is asked next stands right behind what is left."""
    family, model = omni
    with compressor(0.4)(model) as session:
        cache = session.compress(**family.context(model))
        ids = torch.tensor([[0] * cache.get_seq_length() + [20, 21, 22, 20, 21]])
        branch = cache.branch()
        model.generate(input_ids=ids, cache=branch, max_new_tokens=6, prompt_lookup_num_tokens=3, do_sample=False)
        assert torch.equal(branch.next_position - cache.next_position, torch.tensor([[5 + 5]]))
        assert branch.branch().labels.real.shape[1] == branch.get_seq_length()


def test_rows_of_different_length_and_a_second_turn(built: Built) -> None:
    """The second question is asked behind the first answer, which each row has at its own positions."""
    family, model = built
    rows = [family.context(model, seed=1), family.context(model, seed=2, frames=3, intro=(2, 10, 11, 12, 13))]
    with compressor(0.5)(model) as session:
        single = []
        for row in rows:
            cache = session.compress(**row)
            first = model.generate(**whole(cache, ASKED), cache=cache, **GREEDY)[:, -STEPS:]
            ids = torch.cat([ASKED, first, ASKED], dim=1)
            single.append((first, model.generate(**whole(cache, ids), cache=cache, **GREEDY)[:, -STEPS:]))
        cache = session.compress(**family.collate(rows))
        question = ASKED.expand(2, -1)
        first = model.generate(**whole(cache, question), cache=cache, **GREEDY)[:, -STEPS:]
        ids = torch.cat([question, first, question], dim=1)
        second = model.generate(**whole(cache, ids), cache=cache, **GREEDY)[:, -STEPS:]
    assert torch.equal(first, torch.cat([one for one, _ in single]))
    assert torch.equal(second, torch.cat([two for _, two in single]))


@pytest.mark.parametrize("name", ["qwen2_5_omni", "qwen3_omni_moe"])
def test_frames_that_are_no_whole_number_of_positions_apart(name: str) -> None:
    """Qwen3-Omni keeps the fraction, Qwen2.5-Omni cuts it off; a session does as the model does."""
    family = FAMILIES[name]
    model = family.build()
    seconds = {"video_second_per_grid": torch.tensor([0.37])}
    asked = {**family.clip(model, QUESTION), **seconds}
    expected = model.generate(**asked, **GREEDY)[:, -STEPS:]
    with compressor()(model) as session:
        cache = session.compress(**{**family.context(model), **seconds})
        assert torch.equal(session.answer(cache, ASKED, **GREEDY), expected)
        assert torch.equal(model.generate(**whole(cache, ASKED), cache=cache, **GREEDY)[:, -STEPS:], expected)
        positions = session.prefill(**{**family.context(model), **seconds}).embedded.position_ids
    assert bool((positions != positions.round()).any()) == (name == "qwen3_omni_moe")


@pytest.mark.parametrize("when", ["context", "prompt"])
def test_the_context_is_repeated_where_it_stands(built: Built, when: When) -> None:
    """KVzip under generate keeps what it keeps of a prefill of its own, whatever numbers the positions are."""
    family, model = built
    zipped = compressor(0.4, "kvzip", when)
    inputs = family.clip(model) if when == "prompt" else family.context(model)
    with zipped(model, Tokenizer()) as session:
        model.generate(**family.clip(model), **GREEDY)
        found = [not_none(layer.labels) for layer in compressed_layers(not_none(session.last_cache))]
        expected = compressed_layers(session.compress(session.prefill(**inputs)))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one[..., : other.region], not_none(other.labels))


def test_kvzip_repeats_frames_between_two_whole_positions() -> None:
    """Under generate, in a prefill and in the answer, positions are the fractions of the model's own forward."""
    family = FAMILIES["qwen3_omni_moe"]
    model = family.build()
    seconds = {"video_second_per_grid": torch.tensor([0.3])}
    clip, context = {**family.clip(model, QUESTION), **seconds}, {**family.context(model), **seconds}
    with watched(model) as seen, compressor(0.4, "kvzip")(model, Tokenizer()) as session:
        cache = session.compress(session.prefill(**context))
        assert any(not torch.equal(positions, positions.round()) for positions in seen)
        found = session.answer(cache, ASKED, **GREEDY)
        assert torch.equal(found[0], model.generate(**clip, **GREEDY)[0, -STEPS:])


def test_a_block_moves_by_fractions() -> None:
    positions = torch.tensor([[[0.0, 4.5, 4.75, 6.0]], [[0.0, 5.0, 5.5, 6.0]], [[0.0, 6.0, 6.0, 7.0]]])
    moved = moved_positions(positions, torch.tensor([[-1, 1, 2, 3]]), torch.tensor([[9.5]]))
    assert moved[:, 0].tolist() == [[0, 9.5, 9.75, 11], [0, 10, 10.5, 11], [0, 11, 11, 12]]
    whole = moved_positions(positions.long(), torch.tensor([[-1, 1, 2, 3]]), torch.tensor([[9]]))
    assert whole.dtype == torch.int64 and whole[0, 0].tolist() == [0, 9, 9, 11]


def test_a_shorter_clip_is_repeated_as_it_is_alone() -> None:
    """With sliding windows, which count columns: a gap before what KVzip repeats would shorten their reach."""
    family = FAMILIES["gemma4"]
    model = family.build()
    rows = [family.clip(model, seed=1, frames=1, sounds=4), family.clip(model, seed=2, frames=3, sounds=9)]
    with compressor(0.4, "kvzip")(model, Tokenizer()):
        alone = torch.cat([generated(model, row, max_new_tokens=1) for row in rows], dim=1)
        together = generated(model, family.collate(rows), max_new_tokens=1)
    assert float((together - alone).abs().max()) < 1e-4 * float(alone.abs().max())


def test_a_later_clip_whose_positions_nobody_knows_is_refused() -> None:
    """Under generate a first clip is the model's own affair; text after it goes on, a second clip does not."""
    model = build("Glm4vForConditionalGeneration")
    ids = torch.arange(10, 22)[None]
    kinds = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2, 2, 2, 0, 0]])
    with compressor(0.5)(model) as session, watched(model) as seen:
        model.generate(input_ids=ids, modality_ids=kinds, max_new_tokens=1)
        cache = session.last_cache
        assert cache is not None
        session.answer(cache, ASKED, **GREEDY)
        stood = torch.cat([positions[0, 0] for positions in seen])
        assert stood.tolist() == list(range(12 + len(QUESTION) + STEPS - 1))
        clip = {"input_ids": torch.full((1, 4), model.config.image_token_id), "pixel_values": torch.zeros(1)}
        for go_on in (
            lambda: session.extend(clip, cache),
            lambda: model(**clip, cache=cache.branch()),
            lambda: model.generate(**clip, attention_mask=torch.ones(1, 16), cache=cache.branch()),
        ):
            with pytest.raises(InputError, match=r"positions of their own; .*, one clip a conversation"):
                go_on()
