"""Expected attention in complex numbers and sums; the rotation that is taken off the queries is the model's."""

from __future__ import annotations

import cmath
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from acckv.method.rotary import rotate, unrotate
from acckv.policies.expected_attention import ExpectedAttention
from tests import tiny_omni
from tests.policies.random_layers import (
    ENTRIES,
    FREQUENCIES,
    KV_HEADS,
    PADDING,
    SEEDS,
    SIZE,
    compressor_of,
    layers_of,
)
from tests.support import not_none

SINKS = ExpectedAttention.n_sink


@given(seed=SEEDS)
@settings(max_examples=3, deadline=None)
def test_expected_attention(seed: int) -> None:
    """With complex numbers for the pairs of the rotary embedding, and sums written out."""
    observations, labels = layers_of(seed)
    seen = observations[0]
    score = compressor_of("expected_attention").planners.default.scores([seen], labels)[0].score
    half = SIZE // 2
    for b, padding in ((0, 0), (1, PADDING)):
        rows = list(range(padding + SINKS, ENTRIES))
        for k in range(KV_HEADS):
            shares = [0.0] * ENTRIES
            for h in range(k * 2, k * 2 + 2):
                plain = []
                for i in rows:
                    q = seen.queries[b, h, i].tolist()
                    back = [cmath.exp(-1j * (i - padding) * f) for f in FREQUENCIES]
                    pairs = [complex(q[d], q[d + half]) * back[d] for d in range(half)]
                    plain.append([z.real for z in pairs] + [z.imag for z in pairs])
                mean = [sum(column) / len(rows) for column in zip(*plain, strict=True)]
                covariance = [
                    [sum((q[x] - mean[x]) * (q[y] - mean[y]) for q in plain) / len(rows) for y in range(SIZE)]
                    for x in range(SIZE)
                ]
                start = ENTRIES - padding
                turn = [sum(cmath.exp(1j * (start + s) * f) for s in range(5)) / 5 for f in FREQUENCIES]
                matrix = [[0.0] * SIZE for _ in range(SIZE)]
                for d in range(half):
                    matrix[d][d] = matrix[d + half][d + half] = turn[d].real
                    matrix[d][d + half], matrix[d + half][d] = -turn[d].imag, turn[d].imag
                ahead = [sum(matrix[x][y] * mean[y] for y in range(SIZE)) for x in range(SIZE)]
                logits = {}
                for j in rows:
                    key = seen.keys[b, k, j].tolist()
                    moved = [sum(matrix[x][y] * key[x] for x in range(SIZE)) for y in range(SIZE)]
                    spread = sum(moved[x] * covariance[x][y] * moved[y] for x in range(SIZE) for y in range(SIZE))
                    along = sum(key[x] * ahead[x] for x in range(SIZE))
                    logits[j] = seen.scaling * along + seen.scaling**2 * spread / 2
                total = sum(math.exp(logit) for logit in logits.values())
                for j, logit in logits.items():
                    shares[j] += math.exp(logit) / total / 2
            for j in rows:
                norm = math.sqrt(sum(float(x) ** 2 for x in seen.values[b, k, j]))
                assert float(score[b, k, j]) == pytest.approx(shares[j] * norm, rel=1e-3, abs=1e-6)
            for j in range(padding, padding + SINKS):
                assert float(score[b, k, j]) > float(score[b, k, padding + SINKS :].max())


def test_rotation_taken_off_is_what_the_projection_gave(model: Any) -> None:
    """With three-dimensional positions of interleaved media: post-rotary queries lose exactly their rotation."""
    projected: dict[str, Tensor] = {}
    attention = model.model.language_model.layers[1].self_attn
    handle = attention.q_proj.register_forward_hook(lambda *call: projected.update(q=call[-1]))
    with compressor_of("expected_attention", n_future_positions=3)(model) as session, torch.no_grad():
        prefill = session.prefill(**tiny_omni.context())
        seen = session.dispatcher.policy_inputs.complete(prefill.observations, [], prefill.embedded, [])[1]
        steps = prefill.next_position + torch.arange(3)
        layer = session.adapter.attention_layers[1]
        ahead = session.adapter.rotation(session.adapter.text_positions(steps), layer)
    handle.remove()
    rotation = seen.rotation
    assert rotation is not None
    plain = projected["q"].unflatten(-1, (4, 16)).transpose(1, 2)
    assert torch.allclose(unrotate(seen.queries, rotation.cos, rotation.sin, rotation.layout), plain, atol=1e-5)
    assert torch.allclose(rotate(plain, rotation.cos, rotation.sin, rotation.layout), seen.queries, atol=1e-5)
    assert torch.allclose(rotation.ahead_cos, not_none(ahead)[0].mean(1))
    assert not torch.allclose(rotation.ahead_sin, rotation.sin[:, -1])
