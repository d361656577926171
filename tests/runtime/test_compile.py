"""Decoding a compressed cache under torch.compile: no graph break, no new graph after the first steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from acckv import KVCompressor
from tests.families import FAMILIES
from tests.support.running import assert_close

QUICK = ["videollama2"]


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_compiled_decoding(name: str) -> None:
    """What is traced is what matters here: the backend that runs the graphs as they are."""
    family = FAMILIES[name]
    model = family.build()
    graphs = 0

    def backend(graph: Any, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    with KVCompressor("keydiff", ratio=0.4)(model) as session, torch.no_grad():
        cache = session.compress(**family.context(model))

        def decode(call: Any, steps: int) -> Tensor:
            """Logits of greedy steps ``[steps, vocabulary]``."""
            branch, token, logits = cache.branch(), torch.tensor([[20]]), []
            for step in range(steps):
                mask = torch.ones(1, branch.get_seq_length() + 1, dtype=torch.long)
                positions = session.adapter.text_positions(cache.next_position + step)
                out = call(input_ids=token, attention_mask=mask, position_ids=positions, cache=branch, use_cache=True)
                logits.append(out.logits[0, -1])
                token = out.logits[:, -1:].argmax(-1)
            return torch.stack(logits)

        expected = decode(model, 10)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend=backend, dynamic=True, fullgraph=True)
        first = decode(compiled, 5)
        made = graphs
        again = decode(compiled, 10)
    assert 1 <= made <= 3 and graphs == made
    assert_close(first, expected[:5])
    assert_close(again, expected)
