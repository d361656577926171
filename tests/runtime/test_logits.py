"""A long vocabulary is multiplied only where its logits are read, and they are those of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from acckv import KVCompressor
from acckv.data.batching import Question, pack_questions
from acckv.policies import AccKV
from tests.calibration.test_training import after
from tests.families import FAMILIES, Tokenizer
from tests.support import not_none
from tests.support.running import plain_inputs


@contextmanager
def positions_of_head(model: Any) -> Iterator[list[int]]:
    """Positions that the model's head is applied to, a number a call."""
    seen: list[int] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output[..., 0].numel()))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prefill_makes_the_last_logits_alone(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    inputs = family.collate([family.clip(model), family.clip(model, seed=1, frames=3, sounds=9)])
    with torch.no_grad():
        expected = model(**plain_inputs(inputs), use_cache=False).logits[:, -1]
    snapkv = KVCompressor("snapkv")(model, Tokenizer())
    with snapkv as session, torch.no_grad(), positions_of_head(model) as seen:
        prefill = session.prefill(**inputs)
        assert session.prefill(prefill.embedded).logits is None
        session.extend(inputs)
    assert seen == [2]
    assert torch.allclose(not_none(prefill.logits), expected, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_simulation_makes_the_logits_that_are_read(name: str) -> None:
    """Places count through the rows of a batch."""
    family = FAMILIES[name]
    model = family.build()
    rows = [family.context(model), family.context(model, seed=1)]
    with KVCompressor(AccKV.preset("context"), ratio=0.4)(model, Tokenizer()) as session:
        prefill = session.prefill(**family.collate(rows))
        plans = session.plan(prefill, temperature=0.5)
        inputs = after(session, prefill)
        whole = session.simulate(prefill, plans, **inputs)
        with positions_of_head(model) as seen:
            chosen = session.simulate(prefill, plans, logits_at=torch.tensor([1, 2, 3]), **inputs)
    assert seen == [3]
    assert torch.allclose(chosen, whole.flatten(0, 1)[1:4], atol=1e-5)


def test_positions_of_the_predictions_that_count() -> None:
    packed = pack_questions([[Question((0, 1, 2, 3), 1), Question((0, 1, 2), 0)], [Question((0, 1, 2), 1)]])
    assert packed.counted.tolist() == [1, 2, 4, 5, 8]
    assert torch.equal(packed.weight.flatten().nonzero()[:, 0], packed.counted)
