"""KVzip: a repeated context against one plain forward, its chunks, the budgets of the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from acckv import InputError
from acckv.cache.cache import compressed_layers
from acckv.method.modality import ModalityMap
from acckv.models import load_model
from acckv.models.batching import DecoderInputs
from acckv.runtime.context_reconstruction import (
    LEAD_IN,
    chunks,
    moved_positions,
    reconstruction_attention,
    repeat_prompt,
)
from acckv.tiny.build import CHAT_TEMPLATE, build_processor, build_tokenizer
from tests import tiny_omni
from tests.policies.random_layers import (
    KV_HEADS,
    LAYERS,
    SEEDS,
    compressor_of,
    layer_budgets,
    layers_of,
    totals,
)


def repeated_once(model: Any, embedded: DecoderInputs, prompt: list[int], columns: list[int]) -> Tensor:
    """Attention ``[L, H, rows, N]`` of one forward over context, repeat prompt and repetition, without any cache."""
    embeds = torch.cat(
        [
            embedded.embeds,
            model.get_input_embeddings()(torch.tensor([prompt])),
            embedded.embeds[:, columns],
        ],
        dim=1,
    )
    positions = embedded.position_ids[-3:]
    start = int(positions[..., -1].max()) + 1
    asked = torch.arange(start, start + len(prompt)).expand(3, 1, -1)
    block = positions[..., columns]
    moved = block - block.min() + start + len(prompt)
    entries = positions.shape[-1]
    out = model.model.language_model(
        inputs_embeds=embeds,
        position_ids=torch.cat([positions, asked, moved], dim=-1),
        output_attentions=True,
        use_cache=False,
    )
    return torch.stack(out.attentions)[:, 0, :, entries:, :entries]


@pytest.mark.parametrize("chunk", [100, 7])
def test_kvzip_watches_a_repetition(eager: Any, chunk: int) -> None:
    """A left-padded batch of two, chunk by chunk behind the cache, against one plain forward a chunk and row."""
    clips = [tiny_omni.context(), tiny_omni.context(1, intro=(2, 10, 11, 12, 13))]
    prompt = [36, 33, 38]
    with compressor_of("kvzip")(eager, tiny_omni.Tokenizer()) as session, torch.no_grad():
        rows = [session.prefill(queries="none", **clip).embedded for clip in clips]
        batch = session.prefill(DecoderInputs.stack(rows), queries="none")
        ids = torch.tensor([prompt] * 2)
        positions = session.adapter.text_positions(batch.next_position + torch.arange(3))
        asked = DecoderInputs(eager.get_input_embeddings()(ids), positions, ModalityMap(torch.zeros_like(ids)))
        peaks = reconstruction_attention(
            batch.embedded, batch.cache.layers, asked, session.dispatcher.policy_inputs.feed, chunk
        )
        assert [layer.physical for layer in compressed_layers(batch.cache)] == [batch.labels.labels.shape[1]] * 3
    for row, embedded in enumerate(rows):
        media = embedded.labels.media[0].nonzero().flatten()
        first, last = int(media[0]), int(media[-1]) + 1
        slow = torch.zeros(3, 4, embedded.embeds.shape[1])
        for begin in range(first, last, chunk):
            columns = list(range(max(begin - LEAD_IN, first), min(begin + chunk, last)))
            with torch.no_grad():
                slow = torch.maximum(slow, repeated_once(eager, embedded, prompt, columns).amax(2))
        slow = slow.view(3, 2, 2, -1).amax(2)
        padding = batch.labels.labels.shape[1] - slow.shape[-1]
        for layer, peak in enumerate(peaks):
            assert torch.allclose(peak[row, :, padding:], slow[layer], atol=1e-5)
            assert not bool(peak[row, :, :padding].any())


def test_kvzip_repeats_each_clip_in_its_own_chunks() -> None:
    """The windows of a row do not depend on the rows beside it."""
    labels = torch.tensor([[3, 3, 0, 1, 1, 0, 2, 2, 1, 0], [0, 1, 1, 1, 1, 1, 2, 2, 0, 0], [0] * 10])
    windows = [[row[row >= 0].tolist() for row in columns] for columns in chunks(ModalityMap(labels), chunk=4)]
    assert windows == [[[3, 4, 5, 6], [1, 2, 3, 4], []], [[3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7], []]]
    positions = torch.arange(60).view(3, 2, 10)
    moved = moved_positions(positions, torch.tensor([[-1, 3, 4], [5, 6, 7]]), torch.tensor([[100], [200]]))
    assert moved[:, 0].tolist() == [[0, 100, 101], [0, 120, 121], [0, 140, 141]]
    assert moved[:, 1].tolist() == [[200, 201, 202], [220, 221, 222], [240, 241, 242]]


@given(seed=SEEDS, ratio=st.floats(0.05, 0.95))
@settings(max_examples=10, deadline=None)
def test_kvzip_ranks_all_layers_together(seed: int, ratio: float) -> None:
    observations, labels = layers_of(seed)
    compressor = compressor_of("kvzip", ratio=ratio)
    budgets = layer_budgets(compressor.planners.default, observations, labels)
    for b, total in enumerate(totals(labels, ratio)):
        ranked = sorted(
            (
                (float(seen.reconstruction[b, k, j]), layer)
                for layer, seen in enumerate(observations)
                if seen.reconstruction is not None
                for k in range(KV_HEADS)
                for j in labels.media[b].nonzero().flatten().tolist()
            ),
            reverse=True,
        )
        among = [sum(layer == wanted for _, layer in ranked[: total * KV_HEADS]) for wanted in range(LAYERS)]
        assert int(budgets[b].sum()) == total
        for layer in range(LAYERS):
            assert abs(int(budgets[b, layer]) - among[layer] / KV_HEADS) <= 1 + 1e-3


def test_the_repetition_is_an_answer_in_the_chat_format() -> None:
    """What a chat template writes behind a user's words, of a processor and of a tokenizer alone."""
    processor, tokenizer = build_processor(), build_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    expected = "\n\nRepeat the previous context exactly. <|im_end|> <|im_start|> assistant "
    for one in (processor, tokenizer):
        assert repeat_prompt(one, in_chat=True) == expected
        assert repeat_prompt(one, in_chat=False) == "Repeat the previous context exactly."
    with pytest.raises(InputError, match="has no chat template"):
        repeat_prompt(build_tokenizer(), in_chat=True)
    model, _ = load_model("tiny")
    with compressor_of("kvzip", repeat_in_chat=True)(model, processor) as session:
        ids = session.dispatcher.policy_inputs.prompt.ids(1, torch.device("cpu"))
    assert ids[0].tolist() == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert ids[0].tolist().count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_kvzip_needs_a_tokenizer(model: Any) -> None:
    with compressor_of("kvzip")(model) as session, pytest.raises(InputError, match="pass the processor"):
        session.compress(**tiny_omni.context())


def test_a_prefill_is_repeated_once(eager: Any) -> None:
    with compressor_of("kvzip")(eager, tiny_omni.Tokenizer()) as session:
        prefill = session.prefill(**tiny_omni.context())
        assert prefill.reconstruction == []
        session.compress(prefill, ratio=0.3)
        first = list(prefill.reconstruction)
        session.compress(prefill, ratio=0.1)
        assert len(first) == 3
        assert all(one is other for one, other in zip(first, prefill.reconstruction, strict=True))
