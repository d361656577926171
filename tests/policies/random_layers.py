"""Observations of random layers, and slow attention over them."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from acckv import KVCompressor
from acckv.config import HeadBudgets, When, option_fields
from acckv.method.modality import Modality, ModalityMap
from acckv.method.rotary import RotaryLayout, Rotation
from acckv.method.scoring import Observation
from acckv.planner import Planner
from acckv.policies import POLICIES, make_policy

SEEDS = st.integers(0, 10_000)
LAYERS, ENTRIES, PADDING, KV_HEADS, HEADS, SIZE = 4, 24, 5, 2, 4, 6
FREQUENCIES = [0.9, 0.2, 0.03]


def layers_of(seed: int, padded: bool = True) -> tuple[list[Observation], ModalityMap]:
    """All rows of two prompts watched in every layer, and what a repetition attended to; row 1 is padded.

    Unpadded, it is row 1 alone, without its padding.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (2, ENTRIES), generator=generator)
    labels[:, -6] = Modality.VIDEO
    labels[:, -5] = Modality.AUDIO
    labels[:, -4:] = Modality.TEXT
    labels[1, :PADDING] = Modality.PADDING
    positions = torch.arange(ENTRIES).expand(2, -1).clone()
    positions[1] -= PADDING
    angles = positions.clamp_min(0)[..., None].double() * torch.tensor([*FREQUENCIES, *FREQUENCIES])
    ahead = torch.arange(5)[:, None] + (positions[:, -1:] + 1)[..., None]
    ahead_angles = ahead.double() * torch.tensor([*FREQUENCIES, *FREQUENCIES])
    rotation = Rotation(
        angles.cos().float(),
        angles.sin().float(),
        ahead_angles.cos().mean(1).float(),
        ahead_angles.sin().mean(1).float(),
        RotaryLayout(SIZE, size=SIZE),
    )
    observations = []
    for _ in range(LAYERS):
        queries, keys, values = (
            torch.randn(2, heads, ENTRIES, SIZE, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)
        )
        repetition = torch.rand(2, KV_HEADS, ENTRIES, generator=generator)
        columns = torch.arange(ENTRIES).expand(2, -1)
        real = labels != Modality.PADDING
        observations.append(Observation(queries, keys, values, columns, real, real, 0.4, rotation, repetition))
    if padded:
        return observations, ModalityMap(labels)
    return [alone(seen) for seen in observations], ModalityMap(labels[1:, PADDING:])


def alone(seen: Observation) -> Observation:
    """Row 1 of an observation without its padding."""
    assert seen.rotation is not None
    assert seen.reconstruction is not None
    rotation = Rotation(
        seen.rotation.cos[1:, PADDING:],
        seen.rotation.sin[1:, PADDING:],
        seen.rotation.ahead_cos[1:],
        seen.rotation.ahead_sin[1:],
        seen.rotation.layout,
    )
    width = ENTRIES - PADDING
    return Observation(
        seen.queries[1:, :, PADDING:],
        seen.keys[1:, :, PADDING:],
        seen.values[1:, :, PADDING:],
        torch.arange(width)[None],
        seen.query_valid[1:, PADDING:],
        seen.real[1:, PADDING:],
        seen.scaling,
        rotation,
        seen.reconstruction[1:, :, PADDING:],
    )


def watched(seen: Observation, policy: str, window: int) -> Observation:
    """The rows that a session would hand to the policy."""
    if POLICIES[policy].queries != "window":
        return seen
    last = torch.arange(seen.query_valid.shape[1]) >= seen.query_valid.shape[1] - window
    return seen.select(last.expand_as(seen.query_valid))


def attention(seen: Observation, b: int, h: int, i: int) -> list[float]:
    """Softmax of row i over all entries, in floats."""
    key_head = h // (HEADS // KV_HEADS)
    row = int((seen.query_positions[b] == i).nonzero())
    logits = {
        j: seen.scaling
        * sum(float(q) * float(k) for q, k in zip(seen.queries[b, h, row], seen.keys[b, key_head, j], strict=True))
        for j in range(i + 1)
        if bool(seen.real[b, j])
    }
    total = sum(math.exp(logit) for logit in logits.values())
    return [math.exp(logits[j]) / total if j in logits else 0.0 for j in range(seen.keys.shape[2])]


def received(seen: Observation, b: int, k: int, rows: list[int]) -> list[float]:
    """Attention that each entry receives from rows, summed over them, mean over the query heads of KV head k."""
    group = HEADS // KV_HEADS
    score = [0.0] * seen.keys.shape[2]
    for h in range(k * group, (k + 1) * group):
        for i in rows:
            score = [old + new / group for old, new in zip(score, attention(seen, b, h, i), strict=True)]
    return score


def layer_budgets(planner: Planner, observations: list[Observation], labels: ModalityMap) -> Tensor:
    """int64 ``[B, L]``: what each layer keeps."""
    total = planner.total(labels, LAYERS)
    available = labels.counts().sum(-1, keepdim=True).expand(-1, LAYERS)
    return planner.layer_budgets(planner.scores(observations, labels), labels, total, available, planner.config.ratio)


def compressor_of(
    policy: str,
    ratio: float = 0.2,
    when: When = "context",
    head_budgets: HeadBudgets = "equal",
    budget: int | None = None,
    **options: Any,
) -> KVCompressor:
    """With those of the options that the policy has."""
    known = option_fields(POLICIES[policy])
    own = {name: value for name, value in options.items() if name in known}
    made = make_policy({"class_path": policy, "init_args": own})
    return KVCompressor(made, ratio=ratio, budget=budget, when=when, head_budgets=head_budgets)


def totals(labels: ModalityMap, ratio: float) -> list[int]:
    return [math.floor(ratio * LAYERS * n + 1e-9) for n in labels.counts().sum(-1).tolist()]
