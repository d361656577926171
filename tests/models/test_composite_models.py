"""Composite models whose processors give token ids and pixels: placeholders are never taken for text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from acckv import InputError, KVCompressor
from acckv.cache.cache import compressed_layers
from acckv.config import When
from acckv.models import find_adapter
from acckv.models.qwen_vl import Qwen3VLAdapter, QwenVLAdapter
from tests.families import (
    FAMILIES,
    FRAME_TOKENS,
    IMAGE,
    MROPE,
    TEXT,
    VIDEO,
    VISION,
    VISION_BOS,
    VISION_EOS,
    Clip,
    Qwen25Omni,
)
from tests.reference import Reference
from tests.support import not_none
from tests.support.running import assert_close, generate

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
CLIP = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 4}
TOWERS: dict[str, dict[str, Any]] = {
    "Qwen2VL": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
    "Qwen2_5_VL": {**VISION, "depth": 1, "window_size": 16, "fullatt_block_indexes": [0]},
    "Qwen3VL": {**VISION, "depth": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
}


class QwenVL(Qwen25Omni):
    """Video alone; Qwen3-VL lays time stamps between the frames."""

    padding = {**Qwen25Omni.padding, "mm_token_type_ids": 0}  # noqa: RUF012
    plain = {**Qwen25Omni.plain, "mm_token_type_ids": 0}  # noqa: RUF012

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def model_class(self) -> Any:
        return getattr(transformers, f"{self.name}ForConditionalGeneration")

    def config(self) -> Any:
        rope = {**MROPE, "mrope_interleaved": True} if self.name == "Qwen3VL" else MROPE
        return getattr(transformers, f"{self.name}Config")(
            text_config={**TEXT, "head_dim": 16, "rope_parameters": rope},
            vision_config=TOWERS[self.name],
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            vision_start_token_id=VISION_BOS,
            vision_end_token_id=VISION_EOS,
        )

    def inputs(self, model: Any, clip: Clip) -> dict[str, Any]:
        frame = [VIDEO] * FRAME_TOKENS
        body = [VISION_BOS, *frame * clip.frames, VISION_EOS]
        if self.name == "Qwen3VL":
            body = [token for second in range(clip.frames) for token in (30 + second, VISION_BOS, *frame, VISION_EOS)]
        ids = torch.tensor([[*clip.intro, *body, *clip.question]])
        pixels = torch.randn(16 * clip.frames, 3 * 2 * 4 * 4, generator=clip.generator())
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": 2 * (ids == VIDEO).long(),
            "pixel_values_videos": pixels.to(model.dtype),
            "video_grid_thw": torch.tensor([[clip.frames, 4, 4]]),
        }


@pytest.fixture(scope="module", params=list(TOWERS))
def vl(request: pytest.FixtureRequest) -> tuple[QwenVL, Any]:
    family = QwenVL(request.param)
    return family, family.build()


@pytest.mark.parametrize("when", ["context", "prompt"])
def test_qwen_vl_equals_masked_full_attention(vl: tuple[QwenVL, Any], when: When) -> None:
    family, model = vl
    inputs, reference = family.clip(model), Reference(model)
    assert isinstance(find_adapter(model), Qwen3VLAdapter if family.name == "Qwen3VL" else QwenVLAdapter)
    with KVCompressor("keydiff", ratio=0.4, when=when)(model) as session:
        tokens, logits = generate(model, inputs, **GREEDY)
        reference.read(inputs, session.last_cache)
        assert not_none(session.last_cache).kept_entries().sum() == int(0.4 * 3 * 8)
        batch = family.collate([inputs, family.clip(model, (25,), seed=2, frames=3, intro=(2,))])
        rows, _ = generate(model, batch, **GREEDY)
        assert torch.equal(rows[:1], tokens)
    with reference.hiding() as full:
        expected_tokens, expected = generate(full, inputs, **GREEDY)
    assert torch.equal(tokens, expected_tokens)
    assert_close(logits, expected)
    assert (logits - generate(model, inputs, **GREEDY)[1]).abs().max() > 1e-3


def test_qwen_vl_compresses_once_for_several_questions(vl: tuple[QwenVL, Any]) -> None:
    """By the session's own methods, which compute positions themselves; chunks of a stream join to the whole."""
    family, model = vl
    compressor = KVCompressor("keydiff", ratio=0.4, when="context")
    with compressor(model) as session:
        cache = session.compress(**family.context(model))
        kept = session.compress(session.prefill(**family.context(model)))
        for question in ((20, 21, 22), (25, 26)):
            expected, _ = generate(model, family.clip(model, question), **GREEDY)
            for held in (cache, kept):
                assert torch.equal(session.answer(held, torch.tensor([question]), **GREEDY), expected)
        whole = session.extend(family.text(model, (40, 41)), session.compress(**family.context(model), ratio=1.0))
        joined = session.compress(**family.join([family.context(model), family.text(model, (40, 41))]), ratio=1.0)
    for one, other in zip(compressed_layers(whole), compressed_layers(joined), strict=True):
        assert torch.allclose(one.keys, other.keys, atol=1e-5)


def llava() -> tuple[Any, dict[str, Any]]:
    """A picture of four tokens before a Llama decoder, without an adapter of its own."""
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**CLIP, "image_size": 8, "model_type": "clip_vision_model"},
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration._from_config(config).eval()
    model.generation_config.eos_token_id = None
    ids = torch.tensor([[2, 10, *[IMAGE] * 4, 11, *[IMAGE] * 4, 20, 21, 22]])
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(2, 3, 8, 8)}


def test_a_composite_model_without_adapter_labels_by_its_config() -> None:
    model, inputs = llava()
    reference = Reference(model)
    with KVCompressor("keydiff", ratio=0.4)(model) as session:
        tokens, logits = generate(model, inputs, **GREEDY)
        cache = not_none(session.last_cache)
        reference.read(inputs, cache)
        assert cache.labels.media.equal(inputs["input_ids"] == IMAGE)
        assert cache.kept_entries().sum() == int(0.4 * 3 * 8)
        context = {
            **inputs,
            "input_ids": inputs["input_ids"][:, :-3],
            "attention_mask": inputs["attention_mask"][:, :-3],
        }
        answer = session.answer(session.compress(**context), torch.tensor([[20, 21, 22]]), **GREEDY)
        with pytest.raises(InputError, match="modality_ids: must be given with the inputs"):
            model.generate(**{**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, 12)})
    assert torch.equal(answer, tokens)
    with reference.hiding() as full:
        _, expected = generate(full, inputs, **GREEDY)
    assert_close(logits, expected)


def test_a_plain_decoder_takes_token_ids_and_modality_ids() -> None:
    """Sound as tokens of the vocabulary."""
    family = FAMILIES["avicuna"]
    model = family.build()
    ids = torch.randint(10, 60, (1, 24), generator=torch.Generator().manual_seed(1))
    kinds = torch.zeros_like(ids)
    kinds[:, 3:18] = 2
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
    with KVCompressor("keydiff", ratio=0.3)(model) as session:
        by_ids, _ = generate(model, {"input_ids": ids, "modality_ids": kinds}, **GREEDY)
        held = [layer.keys for layer in compressed_layers(session.compress(input_ids=ids, modality_ids=kinds))]
        by_embeds, _ = generate(model, {"inputs_embeds": embeds, "modality_ids": kinds}, **GREEDY)
        expected = [
            layer.keys for layer in compressed_layers(session.compress(inputs_embeds=embeds, modality_ids=kinds))
        ]
    assert torch.equal(by_ids, by_embeds)
    assert all(torch.equal(one, other) for one, other in zip(held, expected, strict=True))


def test_media_that_see_each_other_are_refused_where_no_adapter_knows_them() -> None:
    """Gemma 3 lets the tokens of a picture see later ones; a causal mask in its place would be another model."""
    config = transformers.Gemma3Config(
        text_config={**TEXT, "head_dim": 16, "layer_types": ["full_attention"] * 3},
        vision_config={**CLIP, "image_size": 16},
        image_token_index=IMAGE,
        mm_tokens_per_image=4,
    )
    model = transformers.Gemma3ForConditionalGeneration._from_config(config).eval()
    ids = torch.tensor([[2, 10, *[IMAGE] * 4, 20, 21]])
    inputs = {"input_ids": ids, "token_type_ids": (ids == IMAGE).long(), "pixel_values": torch.randn(1, 3, 16, 16)}
    session = KVCompressor("keydiff", ratio=0.3)(model)
    with session, pytest.raises(InputError, match="lets tokens of its media see later ones"):
        model.generate(**inputs, max_new_tokens=2)
