"""Streams: chunk after chunk within one budget, whatever the length; and what a prefill holds at its peak."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from acckv import InputError, KVCompressor
from acckv.cache.cache import CompressedCache, compressed_layers
from acckv.cache.layer import CompressedLayer
from acckv.policies.keydiff import KeyDiff
from acckv.runtime.session import Session
from tests.families import FAMILIES, Built, Family, Tokenizer
from tests.reference import Reference
from tests.runtime.test_turns import whole
from tests.support import not_none
from tests.support.running import assert_close, continued

POLICIES = ["random", "streaming_llm", "h2o", "snapkv", "keydiff", "acckv"]
BUDGET, CHUNK = 10, 4 + 3  # entries a layer, media entries of a chunk


def stream(family: Family, model: Any, chunks: int) -> list[dict[str, Any]]:
    """Chunks of one frame and three sounds; only the first has text before it."""
    return [
        family.context(model, seed=number, frames=1, sounds=3, intro=(2, 10) if number == 0 else ())
        for number in range(chunks)
    ]


def run(session: Session, chunks: list[dict[str, Any]], **options: Any) -> CompressedCache:
    cache = None
    for chunk in chunks:
        cache = session.extend(chunk, cache, **options)
    assert cache is not None
    return cache


class Peak:
    """The most entries that one layer, and that all layers together, ever held."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.layer = self.together = 0
        update = CompressedLayer.update

        def watched(layer: CompressedLayer, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            result = update(layer, *args, **kwargs)
            self.layer = max(self.layer, layer.physical)
            self.together = max(self.together, sum(layer.lengths))
            return result

        monkeypatch.setattr(CompressedLayer, "update", watched)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("keydiff", {}),
        ("h2o", {}),
        ("streaming_llm", {}),
        ("keydiff", {"head_budgets": "joint"}),
        ("h2o", {"head_budgets": "joint"}),
        ("keydiff", {"head_budgets": "joint", "budget": None, "ratio": 0.3}),
    ],
)
def test_a_stream_equals_one_masked_forward(built: Built, policy: str, options: dict[str, Any]) -> None:
    """With an absolute budget all that is held competes, and heads hold different entries of different modality."""
    family, model = built
    chunks = stream(family, model, 5)
    cache, reference = None, Reference(model)
    with KVCompressor(policy, **{"budget": BUDGET} | options)(model) as session:
        for number, chunk in enumerate(chunks):
            cache = session.extend(chunk, cache)
            reference.read(family.join(chunks[: number + 1]), cache)
        logits = continued(model, session, not_none(cache), (20, 21))
    held = torch.tensor([float(not_none(layer.kept).sum()) for layer in compressed_layers(not_none(cache))])
    if "ratio" in options:
        heads = session.adapter.dimensions["kv_heads"]
        assert float(held.sum() * heads) == pytest.approx(int(0.3 * family.layers * heads * 5 * CHUNK + 1e-9))
    else:
        assert held.tolist() == [BUDGET] * family.layers
    expected = whole(family, reference, [*chunks, family.text(model, (20, 21))], 2)
    assert_close(logits, expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_long_stream_stays_flat(decoder: Built, policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """200 chunks: never more than budget, text and one chunk in any layer."""
    family, model = decoder
    compressor = KVCompressor(policy, budget=BUDGET)
    with compressor(model, Tokenizer()) as session:
        chunks = stream(family, model, 2)
        cache = run(session, chunks)
        held, peak = cache.kv_bytes(), Peak(monkeypatch)
        probe = 3 if session.planners.policy.queries == "text" else 0  # forgotten before the next layer runs
        for _ in range(198 if policy == "keydiff" else 30):
            cache = session.extend(chunks[1], cache)
    assert cache.kv_bytes() == held
    assert peak.layer <= BUDGET + 2 + CHUNK + probe
    assert cache.get_seq_length() == 2 + CHUNK * (200 if policy == "keydiff" else 32)


def test_the_markers_of_a_stream_age_with_it() -> None:
    """Every chunk of this family has begin and end tokens: kept as text they would pile up."""
    family = FAMILIES["qwen2_5_omni"]
    model = family.build()
    with KVCompressor("keydiff", budget=BUDGET)(model) as session:
        chunks = stream(family, model, 8)
        kept = run(session, chunks)
        aged = run(session, chunks, keep_text=False)
    assert [layer.physical for layer in compressed_layers(kept)] == [BUDGET + 2 + 4 * 8] * 3
    assert [layer.physical for layer in compressed_layers(aged)] == [BUDGET] * 3


def test_a_ratio_keeps_its_share_of_every_chunk(decoder: Built) -> None:
    family, model = decoder
    with KVCompressor("keydiff", ratio=0.1)(model) as session:
        for count in (1, 2, 5, 9):
            kept = run(session, stream(family, model, count)).kept_entries().sum()
            assert kept == int(0.1 * family.layers * CHUNK * count + 1e-9)


@pytest.mark.parametrize("options", [{"budget": BUDGET}, {"ratio": 0.3}])
@pytest.mark.parametrize("heads", ["equal", "joint"])
def test_a_stream_in_a_batch(decoder: Built, options: dict[str, Any], heads: Any) -> None:
    """Two streams side by side, one of which goes quiet sooner, equal each alone."""
    family, model = decoder
    rows = [
        [family.context(model, seed=10 * row + n, frames=1, sounds=3 - row, intro=()) for n in range(4)]
        for row in (0, 1)
    ]
    question = torch.tensor([[20, 21]])
    with KVCompressor("acckv", head_budgets=heads, **options)(model, Tokenizer()) as session:
        batch = run(session, [family.collate([rows[0][n], rows[1][n]]) for n in range(4)])
        together = session.answer(batch, question.expand(2, -1), max_new_tokens=5, do_sample=False, num_beams=2)
        for row, chunks in enumerate(rows):
            alone = session.answer(run(session, chunks), question, max_new_tokens=5, do_sample=False, num_beams=2)
            assert torch.equal(together[row], alone[0])


class Ranked(KeyDiff):
    """A policy that must see all layers first."""

    cross_layer = True


@pytest.mark.parametrize("name", ["keydiff", "acckv"])
def test_prefill_peaks_at_one_full_layer(built: Built, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each layer is evicted before the next one runs, and the result is that of a shared prefill."""
    family, model = built
    inputs, ratio = family.context(model, frames=6, sounds=16), 0.2
    compressor = KVCompressor(name, ratio=ratio)
    with compressor(model, Tokenizer()) as session:
        expected = session.compress(session.prefill(**inputs))
        peak = Peak(monkeypatch)
        cache = session.compress(**inputs)
        full = cache.get_seq_length() + (3 if name == "acckv" else 0)
        rest = [layer.physical for layer in compressed_layers(cache)]
        assert peak.layer == full and peak.together <= full + sum(rest[:-1]) + 1
        for one, other in zip(compressed_layers(cache), compressed_layers(expected), strict=True):
            assert torch.allclose(one.keys, other.keys, atol=1e-5)
            assert torch.equal(not_none(one.labels), not_none(other.labels))


def test_policies_across_layers_wait_for_the_last(decoder: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    family, model = decoder
    inputs = family.context(model, frames=6, sounds=16)
    compressor = KVCompressor("keydiff", ratio=0.2)
    with compressor(model) as session:
        expected = session.compress(**inputs)
        compressor.planners.default.policy = Ranked()
        peak = Peak(monkeypatch)
        cache = session.compress(**inputs)
    assert peak.together == family.layers * cache.get_seq_length()
    for one, other in zip(compressed_layers(cache), compressed_layers(expected), strict=True):
        assert torch.equal(one.keys, other.keys)
    compressor = KVCompressor("keydiff", budget=BUDGET)
    compressor.planners.default.policy = Ranked()
    with compressor(model) as session, pytest.raises(InputError, match="cannot go on within an absolute budget"):
        run(session, stream(family, model, 2))
