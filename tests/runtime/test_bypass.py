"""Inside a session media are compressed, or the call is refused: there is no third way for a prompt to go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM

from acckv import KVCompressor
from acckv.cache.cache import compressed_layers
from acckv.config import When
from acckv.errors import InputError
from tests.families import FAMILIES, TEXT, Family
from tests.support import not_none
from tests.support.running import assert_close, plain_inputs

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
SLOW_PARTS = ["wrapper", "forward", "module"]
NAMES = ["qwen2_5_omni", "gemma4", "videollama2"]


@pytest.fixture(params=NAMES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def compressor(**options: Any) -> KVCompressor:
    return KVCompressor(**{"policy": "keydiff", "ratio": 0.3, **options})


@pytest.mark.parametrize("when", ["context", "prompt"])
def test_a_call_without_a_cache_gets_one(family: Family, when: When) -> None:
    model = family.build()
    inputs = family.clip(model)
    with torch.no_grad(), compressor(when=when)(model) as session:
        expected = model(**inputs, cache=DynamicCache(config=model.config.get_text_config()), use_cache=True)
        held = [layer.physical for layer in compressed_layers(not_none(session.last_cache))]
        for options in ({}, {"use_cache": True}):
            found = model(**inputs, **options)
            assert torch.equal(found.logits, expected.logits)
            assert [layer.physical for layer in compressed_layers(found.cache)] == held
            assert max(held) < inputs["attention_mask"].shape[1]


def test_without_a_cache_media_are_refused_and_text_is_not(family: Family) -> None:
    model = family.build()
    inputs, text = family.clip(model), family.text(model, (2, 10, 11, 12))
    expected = model.generate(**plain_inputs(text), **GREEDY, use_cache=False)
    with compressor()(model) as session:
        with pytest.raises(InputError, match="use_cache: is off"):
            model(**inputs, use_cache=False)
        if "input_ids" in inputs:  # with embeddings generate does not heed it
            with pytest.raises(InputError, match="use_cache: is off"):
                model.generate(**inputs, **GREEDY, use_cache=False)
        assert torch.equal(model.generate(**text, **GREEDY, use_cache=False), expected)
        assert session.last_cache is None
    with compressor(ratio=1.0)(model):  # where nothing would be evicted, nothing is missed
        assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), model.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("by", ["argument", "config"])
def test_a_prompt_in_parts_is_refused_and_text_is_not(by: str) -> None:
    family = FAMILIES["gemma4"]
    model = family.build()
    inputs, text = family.clip(model), family.text(model, tuple(range(10, 22)))
    expected = model.generate(**text, **GREEDY)
    options = dict(GREEDY)
    if by == "argument":
        options["prefill_chunk_size"] = 4
    else:
        model.generation_config.prefill_chunk_size = 4
    video = {name: value for name, value in inputs.items() if not name.startswith("input_features")}
    with compressor()(model):
        with pytest.raises(InputError, match="prefill_chunk_size: cuts a prompt up"):
            model.generate(**video, **options)
        assert torch.equal(model.generate(**text, **options), expected)


def test_continuous_batching_is_refused() -> None:
    model = FAMILIES["videollama2"].build()
    with compressor()(model), pytest.raises(InputError, match="generate_batch: batches requests"):
        model.generate_batch([[2, 10, 11, 12]])


@pytest.mark.parametrize("name", ["gemma4", "videollama2"])
def test_guidance_reads_its_own_prompt_in_full(name: str) -> None:
    """The prompt without media goes by uncompressed, beside the one with media: scores are made of both."""
    family = FAMILIES[name]
    model = family.build()
    negative, weight = torch.tensor([[2, 10, 11]]), 1.5
    asked = {**GREEDY, "output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    with compressor()(model):
        guided = {"guidance_scale": weight, "negative_prompt_ids": negative}
        found = model.generate(**family.clip(model), **asked, **guided)
        alone = model.generate(**family.clip(model), **asked)
    assert torch.equal(found.logits[0], alone.logits[0])
    for step, (scores, logits) in enumerate(zip(found.scores, found.logits, strict=True)):
        ids = torch.cat([negative, found.sequences[:, -4:][:, :step]], dim=1)
        with torch.no_grad():
            away = model(input_ids=ids).logits[:, -1].log_softmax(-1)
        assert_close(scores, away + weight * (logits.log_softmax(-1) - away))


def test_a_decoder_called_past_its_model_is_refused(family: Family) -> None:
    model = family.build()
    decoder, embeds = model.get_decoder(), model.get_input_embeddings()(torch.arange(10, 16)[None])
    with torch.no_grad(), compressor()(model):
        with pytest.raises(InputError, match="decoder called past it"):
            decoder(inputs_embeds=embeds)
        model.generate(**family.clip(model), **GREEDY)
        decoder(inputs_embeds=embeds[:, :1])
    decoder(inputs_embeds=embeds)


def test_a_decoder_that_was_replaced_inside_is_noticed() -> None:
    family = FAMILIES["videollama2"]
    model = family.build()
    own = type(model.model).forward
    with compressor()(model):
        model.model.forward = lambda **arguments: own(model.model, **arguments)
        with pytest.raises(InputError, match="nothing was compressed"):
            model.generate(**family.clip(model), **GREEDY)


@pytest.mark.parametrize("part", [*(pytest.param(part, marks=pytest.mark.slow) for part in SLOW_PARTS), "layers"])
@pytest.mark.parametrize("used", [pytest.param(False, marks=pytest.mark.slow), True], ids=["new", "used"])
def test_a_model_that_was_compiled_before(part: str, used: bool) -> None:
    """Prompts run uncompiled; graphs of before know nothing of the session, and are not taken in it or after it."""
    options: dict[str, Any] = {"dynamic": True, "backend": "eager"}
    family = FAMILIES["videollama2"]
    model = family.build()
    batch = family.collate([family.clip(model), family.clip(model, (25,), seed=2, frames=3, intro=(2, 10, 11, 12))])
    with compressor()(model):
        expected = logits(model, batch)
    full = logits(model, plain_inputs(batch))
    torch._dynamo.reset()
    call: Any = model
    if part == "wrapper":
        call = torch.compile(model, **options)
    elif part == "forward":
        model.forward = torch.compile(model.forward, **options)
    elif part == "module":
        model.compile(**options)
    else:
        for layer in model.model.layers:
            layer.compile(**options)
    if used:
        assert_close(logits(call, plain_inputs(batch)), full)
    with compressor()(call) as session:
        assert_close(logits(call, batch), expected)
        session.dispatcher.last_cache = None
        call.generate(**batch, **GREEDY)
        assert session.last_cache is not None
    assert_close(logits(call, plain_inputs(batch)), full)


def logits(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Of the last token of a prompt and of two greedy steps after it: ``[3, rows, vocabulary]``."""
    found, mask = [], inputs["attention_mask"]
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for _ in range(3):
            found.append(model(**inputs, cache=cache, use_cache=True).logits[:, -1])
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = mask.cumsum(-1)[:, -1:] - 1
            inputs = {
                "input_ids": found[-1].argmax(-1, keepdim=True),
                "attention_mask": mask,
                "position_ids": positions,
            }
    return torch.stack(found)


def attentions(model: Any) -> dict[str, str]:
    """The implementation that each module's own configuration names."""
    modules = model.named_modules()
    return {name: module.config._attn_implementation for name, module in modules if hasattr(module, "config")}


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_attention_without_masks_is_switched_for_the_session(family: Family, implementation: str) -> None:
    """The kernels need not be there: none of them may run. Towers keep theirs, and the decoder has its own back."""
    model, inputs = family.build(), family.clip(family.build())
    with compressor()(model):
        expected = model.generate(**inputs, **GREEDY)
    model.get_decoder().config._attn_implementation_internal = implementation
    before = attentions(model)
    with pytest.warns(UserWarning, match=f"'{implementation}' has no mask .* with 'sdpa' until") as caught:
        session = compressor()(model).__enter__()
    assert caught[0].filename == __file__
    assert {before[name] for name, now in attentions(model).items() if now != before[name]} == {implementation}
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    session.__exit__()
    assert attentions(model) == before
    with pytest.raises(KeyError), pytest.warns(UserWarning, match=implementation), compressor()(model):
        raise KeyError
    assert attentions(model) == before


def test_a_decoder_that_sdpa_cannot_serve_is_switched_to_eager() -> None:
    """Gemma 2 caps its attention logits, which sdpa cannot."""
    torch.manual_seed(0)
    soft: dict[str, Any] = {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16, "head_dim": 16}
    config = Gemma2Config(**TEXT, **soft, layer_types=["full_attention"] * 3)
    model = Gemma2ForCausalLM._from_config(config, attn_implementation="eager").eval()
    ids = torch.arange(10, 34)[None]
    inputs = {"input_ids": ids, "modality_ids": torch.where((ids > 12) & (ids < 29), 1, 0)}
    with compressor()(model):
        expected = model.generate(**inputs, **GREEDY)
    config._attn_implementation_internal = "flash_attention_2"
    with pytest.warns(UserWarning, match="with 'eager' until the session is closed"), compressor()(model):
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)


def test_attention_changed_in_a_session_is_noticed() -> None:
    """What is not seen is not compressed: neither a prompt, nor a step on a compressed cache."""
    family = FAMILIES["videollama2"]
    model = family.build()
    with compressor()(model) as session, torch.no_grad():
        expected = model.generate(**family.clip(model), **GREEDY)
        cache = session.compress(**family.context(model))
        model.set_attn_implementation("eager")
        with pytest.raises(InputError, match=r"model: .* or was changed while the session was open"):
            model.generate(**family.clip(model), **GREEDY)
        with pytest.raises(InputError, match="model: attended by another function"):
            model(input_ids=torch.tensor([[20]]), cache=cache.branch())
        model.set_attn_implementation("sdpa")
        assert torch.equal(model.generate(**family.clip(model), **GREEDY), expected)
