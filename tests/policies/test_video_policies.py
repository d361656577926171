"""InfiniPot-V and TGV-KV against slow ones written from their papers and code."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from acckv import InputError
from acckv.method.modality import Modality, ModalityMap
from acckv.method.scoring import Observation
from acckv.models.batching import observed_queries
from acckv.policies import InfiniPotV, make_policy
from tests.policies.random_layers import (
    ENTRIES,
    HEADS,
    KV_HEADS,
    SEEDS,
    attention,
    compressor_of,
    layers_of,
)

PATCHES = 3


def clip_of(seed: int, frames: int, sound: int) -> tuple[Observation, ModalityMap]:
    """Frames of three patches with some sound behind each, between text, behind padding in the second row."""
    one = [Modality.VIDEO] * PATCHES + [Modality.AUDIO] * sound
    row = torch.tensor([[Modality.TEXT] * 2 + one * frames + [Modality.TEXT]]).repeat(2, 1)
    labels = torch.nn.functional.pad(row, (2, 0), value=Modality.TEXT)
    labels[1, :2] = Modality.PADDING
    real, entries = labels != Modality.PADDING, labels.shape[1]
    draw = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, KV_HEADS, entries, 6, generator=draw) for _ in range(2))
    queries, columns = torch.randn(2, HEADS, entries, 6, generator=draw), torch.arange(entries).expand(2, -1)
    return Observation(queries, keys, values, columns, real, real, 0.4), ModalityMap(labels)


def frames_of(labels: Tensor, frame_size: int | None) -> list[list[int]]:
    """The frames of a row's video: runs of its entries, or so many of them; single entries where it is one run."""
    runs: list[list[int]] = []
    for j, kind in enumerate(labels.tolist()):
        if kind == Modality.VIDEO:
            if j and labels[j - 1] == Modality.VIDEO:
                runs[-1].append(j)
            else:
                runs.append([j])
    size = frame_size or (1 if len(runs) == 1 else None)
    return runs if size is None else [run[i : i + size] for run in runs for i in range(0, len(run), size)]


def redundancy(keys: Tensor, frames: list[list[int]], recent_frames: float) -> dict[int, float]:
    """Of each entry, minus the mean cosine similarity to the same patch of the last frames."""
    recent = frames[-max(int(recent_frames * len(frames)), 1) :]
    found = {}
    for frame in frames:
        for patch, j in enumerate(frame):
            alike = [float(torch.cosine_similarity(keys[j], keys[f[patch]], dim=0)) for f in recent if patch < len(f)]
            found[j] = -sum(alike) / len(alike) if alike else 0.0
    return found


def placed(lists: list[tuple[dict[Any, float], float]]) -> dict[Any, tuple[float, float]]:
    """The share of all entries at which a budget takes each in, as the first so many of each list: from, and to.

    What scores alike up to rounding may stand in either order.
    """
    found = {}
    for j in lists[0][0]:
        low, high = [], []
        for score, share in lists:
            if share > 0:
                low.append((1 + sum(s > score[j] + 1e-5 for s in score.values())) / share / len(score))
                high.append(sum(s > score[j] - 1e-5 for s in score.values()) / share / len(score))
        found[j] = min(low), min(high)
    return found


@given(seed=SEEDS, frames=st.integers(1, 9), sound=st.integers(0, 3), frame_size=st.sampled_from([None, 1, 2, 3]))
@settings(max_examples=8, deadline=None)
@pytest.mark.parametrize("shares", [(0.5, 0.33, 0.25), (0.5, 0.0, 0.25), (1.0, 0.0, 0.6), (0.0, 0.0, 0.1)])
def test_infinipot_v_merges_three_rankings(
    shares: tuple[float, float, float], seed: int, frames: int, sound: int, frame_size: int | None
) -> None:
    """Of each head and modality the latest, those least like the recent frames, and the largest values.

    A head's scores are its places among all heads, given out in the order of its own.
    """
    seen, labels = clip_of(seed, frames, sound)
    tar, latest, recent_frames = shares
    score = InfiniPotV(*shares, frame_size).score(0, seen, labels).score
    assert bool(torch.isfinite(score).all())
    for b in range(2):
        kinds = labels.labels[b]
        video = frames_of(kinds, frame_size)
        audio = [[j] for j in (kinds == Modality.AUDIO).nonzero().flatten().tolist()]
        own: list[dict[int, tuple[float, float]]] = [{} for _ in range(KV_HEADS)]
        among: list[list[tuple[float, float]]] = [[] for _ in range(KV_HEADS)]
        for group in filter(None, (video, audio)):
            lists = []
            for k in range(KV_HEADS):
                norms = {j: math.hypot(*seen.values[b, k, j].tolist()) for frame in group for j in frame}
                unlike = redundancy(seen.keys[b, k], group, recent_frames)
                lists.append([(norms, 1 - tar), (unlike, tar - latest), ({j: float(j) for j in norms}, latest)])
                own[k] |= placed(lists[k])
            joined = [
                ({(k, j): s for k in range(KV_HEADS) for j, s in lists[k][i][0].items()}, lists[0][i][1])
                for i in range(3)
            ]
            for (k, _), place in placed(joined).items():
                among[k].append(place)
        media = labels.media[b]
        for k in range(KV_HEADS):
            for i, j in itertools.permutations(own[k], 2):
                if own[k][i][1] < own[k][j][0] - 1e-6:
                    assert score[b, k, i] >= score[b, k, j]
            low, high = (torch.tensor(sorted(ends)) for ends in zip(*among[k], strict=True))
            given_out = -score[b, k][media].sort(descending=True).values
            assert bool(((low - 1e-5 <= given_out) & (given_out <= high + 1e-5)).all())
            assert score[b, k][~media].max() < score[b, k][media].min()


def test_infinipot_v_refuses_more_latest_than_its_share() -> None:
    with pytest.raises(InputError, match=r"recent_share: 0.6 is above tar_share, 0.5"):
        make_policy({"class_path": "infinipot_v", "init_args": {"recent_share": 0.6}})


@given(seed=SEEDS)
@settings(max_examples=4, deadline=None)
def test_tgv_kv_weighs_text_by_the_attention_that_it_gets(seed: int) -> None:
    """Entries by the weighted attention of the text after the media; layers by its plain attention to the media."""
    observations, labels = layers_of(seed)
    seen = [part.select(observed_queries(labels, "text", 1)) for part in observations]
    planner = compressor_of("tgv_kv", when="prompt").planners.default
    scores = planner.scores(seen, labels)
    shares = planner.policy.layer_shares(scores, labels, labels.counts().sum(-1), 1.0)
    for b in range(2):
        media = labels.media[b].nonzero().flatten().tolist()
        rows, asked = list(range(media[-1] + 1, ENTRIES)), []
        for layer, part in enumerate(seen):
            attended = {
                i: [sum(each) / HEADS for each in zip(*(attention(part, b, h, i) for h in range(HEADS)), strict=True)]
                for i in rows
            }
            weights = {i: sum(attended[later][i] for later in rows) / (ENTRIES - i) for i in rows}
            weighted = [sum(weights[i] * attended[i][j] for i in rows) for j in media]
            asked.append(sum(attended[i][j] for i in rows for j in media))
            expected = [one / sum(weighted) * asked[-1] for one in weighted]
            assert scores[layer].score[b, 0, media].tolist() == pytest.approx(expected, rel=1e-4)
        assert shares[b].tolist() == pytest.approx(asked, rel=1e-4)


def test_tgv_kv_weighs_a_probe_prompt_evenly() -> None:
    """Its tokens are no entries, so that nothing is known of the attention that they get."""
    observations, labels = layers_of(5)
    probe = replace(
        observations[0],
        queries=observations[0].queries[:, :, :3],
        query_positions=torch.arange(ENTRIES, ENTRIES + 3).expand(2, -1),
        query_valid=torch.ones(2, 3, dtype=torch.bool),
    )
    score = compressor_of("tgv_kv").planners.default.scores([probe], labels)[0].score
    for b in range(2):
        media = labels.media[b]
        total = torch.zeros(ENTRIES)
        for h in range(HEADS):
            logits = probe.queries[b, h] @ probe.keys[b, h // (HEADS // KV_HEADS)].T * probe.scaling
            total += logits.masked_fill(~probe.real[b], -torch.inf).softmax(-1).sum(0) / HEADS
        assert torch.allclose(score[b, 0, media], total[media], atol=1e-5)
