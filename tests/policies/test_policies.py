"""Every policy against an independent slow implementation written from its paper; exact budgets; padding; eviction."""

from __future__ import annotations

import cmath
import copy
import math
from functools import cache
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from acckv import CompressionConfig, InputError, KVCompressor
from acckv.cache.cache import compressed_layers
from acckv.config import PolicyName
from acckv.method.modality import Modality, ModalityMap
from acckv.method.plan import MergedInto
from acckv.method.rotary import RotaryLayout, Rotation, rotate, unrotate
from acckv.method.scoring import Observation
from acckv.models.batching import DecoderInputs
from acckv.planner import Planner
from acckv.policies import POLICIES
from acckv.policies.expected_attention import SINKS
from acckv.policies.look_m import pivotal_merging
from acckv.runtime.context_reconstruction import LEAD_IN, chunks, moved_positions, reconstruction_attention
from lightning_modules.evaluation.options import EvaluationOptions
from tests import tiny_omni
from tests.pairwise import by_turns
from tests.runtime.test_equivalence import QUESTION

SEEDS = st.integers(0, 10_000)
LAYERS, ENTRIES, PADDING, KV_HEADS, HEADS, SIZE = 4, 24, 5, 2, 4, 6
COMPRESSING = [name for name in get_args(PolicyName) if name != "full"]
ATTENTION = ["sdpa", "eager"]
FREQUENCIES = [0.9, 0.2, 0.03]


# ------------------------------------------------------------------ random layers


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
        tensors = [torch.randn(2, heads, ENTRIES, SIZE, generator=generator) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        repetition = torch.rand(2, KV_HEADS, ENTRIES, generator=generator)
        columns = torch.arange(ENTRIES).expand(2, -1)
        real = labels != Modality.PADDING
        observations.append(Observation(*tensors, columns, real, real, 0.4, rotation, repetition))
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
        seen.row_valid[1:, PADDING:],
        seen.real[1:, PADDING:],
        seen.scaling,
        rotation,
        seen.reconstruction[1:, :, PADDING:],
    )


def watched(seen: Observation, policy: str, window: int) -> Observation:
    """The rows that a session would hand to the policy."""
    if POLICIES[policy].rows != "window":
        return seen
    last = torch.arange(seen.row_valid.shape[1]) >= seen.row_valid.shape[1] - window
    return seen.rows(last.expand_as(seen.row_valid))


def attention(seen: Observation, b: int, h: int, i: int) -> list[float]:
    """Softmax of row i over all entries, in floats."""
    key_head = h // (HEADS // KV_HEADS)
    row = int((seen.row_positions[b] == i).nonzero())
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


def compressor_of(policy: str, **options: Any) -> KVCompressor:
    return KVCompressor(CompressionConfig(policy=policy, **options))  # type: ignore[arg-type]


def totals(labels: ModalityMap, ratio: float) -> list[int]:
    return [math.floor(ratio * LAYERS * n + 1e-9) for n in labels.counts().sum(-1).tolist()]


# ------------------------------------------------------------------ one policy after the other


@given(seed=SEEDS)
@settings(max_examples=3, deadline=None)
def test_pyramidkv_scores_as_snapkv(seed: int) -> None:
    observations, labels = layers_of(seed)
    window, kernel = 5, 3
    seen = watched(observations[0], "pyramidkv", window)
    score = compressor_of("pyramidkv", window=window, kernel=kernel).planners.default.scores([seen], labels)[0].score
    for b in range(2):
        for k in range(KV_HEADS):
            plain = received(seen, b, k, list(range(ENTRIES - window, ENTRIES)))
            for j in range(ENTRIES):
                pooled = max(plain[max(j - 1, 0) : j + 2])
                assert float(score[b, k, j]) == pytest.approx(pooled, abs=1e-5)


@given(seed=SEEDS, ratio=st.floats(0.01, 0.99), beta=st.sampled_from([1.0, 2.0, 20.0]))
@settings(max_examples=20, deadline=None)
def test_pyramidkv_budgets_fall_on_a_line(seed: int, ratio: float, beta: float) -> None:
    observations, labels = layers_of(seed)
    compressor = compressor_of("pyramidkv", ratio=ratio, steepness=beta)
    budgets = layer_budgets(compressor.planners.default, observations, labels)
    for b, total in enumerate(totals(labels, ratio)):
        average = total / LAYERS
        smallest = average / beta
        largest = 2 * average - smallest
        available = int(labels.counts()[b].sum())
        if largest > available:
            largest, smallest = available, 2 * average - available
        step = (largest - smallest) / (LAYERS - 1)
        for layer in range(LAYERS):
            assert abs(int(budgets[b, layer]) - (largest - layer * step)) <= 1 + 1e-3
        assert int(budgets[b].sum()) == total


@given(seed=SEEDS)
@settings(max_examples=3, deadline=None)
def test_knorm_is_minus_the_norm_of_the_key(seed: int) -> None:
    observations, labels = layers_of(seed)
    score = compressor_of("knorm").planners.default.scores(observations, labels)[2].score
    for b in range(2):
        for k in range(KV_HEADS):
            for j in range(ENTRIES):
                norm = math.sqrt(sum(float(x) ** 2 for x in observations[2].keys[b, k, j]))
                assert float(score[b, k, j]) == pytest.approx(-norm, abs=1e-5)


@given(seed=SEEDS)
@settings(max_examples=3, deadline=None)
def test_fastv_ranks_by_the_last_row_of_layer_k(seed: int) -> None:
    observations, labels = layers_of(seed)
    seen = [watched(part, "fastv", 7) for part in observations]
    scores = compressor_of("fastv", dense_layers=3).planners.default.scores(seen, labels)
    for b in range(2):
        rows = [attention(seen[2], b, h, ENTRIES - 1) for h in range(HEADS)]
        mean = [sum(column) / HEADS for column in zip(*rows, strict=True)]
        for layer in range(LAYERS):
            assert scores[layer].score[b, 0].tolist() == pytest.approx(mean, abs=1e-5)


@given(seed=SEEDS, ratio=st.floats(0.01, 0.99), dense=st.integers(1, LAYERS + 1))
@settings(max_examples=20, deadline=None)
def test_fastv_budgets(seed: int, ratio: float, dense: int) -> None:
    """The first K layers keep everything, as long as that is no more than half of all."""
    observations, labels = layers_of(seed)
    compressor = compressor_of("fastv", ratio=ratio, dense_layers=dense)
    budgets = layer_budgets(compressor.planners.default, observations, labels)
    below = min(dense, LAYERS)
    for b, total in enumerate(totals(labels, ratio)):
        available = int(labels.counts()[b].sum())
        assert int(budgets[b].sum()) == total
        if below == LAYERS:
            expected = [total / LAYERS] * LAYERS
        else:
            first = min(available, total / 2 / below)
            rest = (total - below * first) / (LAYERS - below)
            if rest > available:  # the other layers are full, the first ones get what is left
                first, rest = (total - available * (LAYERS - below)) / below, available
            expected = [first] * below + [rest] * (LAYERS - below)
        for layer in range(LAYERS):
            assert abs(int(budgets[b, layer]) - expected[layer]) <= 1 + 1e-3
        if below < LAYERS and below * available <= total / 2:
            assert budgets[b, :below].tolist() == [available] * below


@given(seed=SEEDS, ratio=st.floats(0.05, 0.95), coverage=st.sampled_from([0.3, 0.9, 1.0]))
@settings(max_examples=6, deadline=None)
def test_madakv(seed: int, ratio: float, coverage: float) -> None:
    observations, labels = layers_of(seed)
    window = 4
    seen = [watched(part, "madakv", window) for part in observations]
    compressor = compressor_of("madakv", ratio=ratio, window=window, coverage=coverage)
    planner = compressor.planners.default
    scores = planner.scores(seen, labels)
    by_layer = layer_budgets(planner, seen, labels)
    split = [planner.split(layer, score, by_layer[:, layer], labels, ratio) for layer, score in enumerate(scores)]
    budgets = torch.stack(split, dim=1)
    demands = compressor.policy.layer_shares(scores, labels, torch.tensor(totals(labels, ratio)))
    for b, total in enumerate(totals(labels, ratio)):
        members = [[j for j in range(ENTRIES) if labels.labels[b, j] == m] for m in (Modality.VIDEO, Modality.AUDIO)]
        assert int(budgets[b, :, 0].sum()) == total
        for layer in range(LAYERS):
            needed = []
            for k in range(KV_HEADS):
                importance = received(seen[layer], b, k, list(range(ENTRIES - window, ENTRIES)))
                assert scores[layer].score[b, k].tolist() == pytest.approx(importance, abs=1e-5)
                weight = [sum(importance[j] for j in part) for part in members]
                kept = int(budgets[b, layer, k].sum())
                assert kept == int(budgets[b, layer, 0].sum())
                wanted = kept * weight[0] / sum(weight)
                wanted = max(min(wanted, len(members[0])), kept - len(members[1]))
                assert abs(int(budgets[b, layer, k, 0]) - wanted) < 1 + 1e-3
                count = 0
                for part, whole in zip(members, weight, strict=True):
                    covered = 0.0
                    for value in sorted((importance[j] for j in part), reverse=True):
                        if covered >= coverage * whole - 1e-9:
                            break
                        covered, count = covered + value, count + 1
                needed.append(count)
            assert float(demands[b, layer]) == pytest.approx(sum(needed) / KV_HEADS, abs=1e-6)


@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_pivotal_merging(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, KV_HEADS, 11, SIZE, generator=generator) for _ in range(2))
    state = torch.randint(0, 3, (2, KV_HEADS, 11), generator=generator)
    state[0, 0] = torch.where(state[0, 0] == 0, 1, state[0, 0])  # a head that keeps nothing
    kept, lost = state == 0, state == 1
    pivots = pivotal_merging(keys, values, kept, lost)
    assert pivots is not None
    new = pivots.place(keys, values)
    for b in range(2):
        for k in range(KV_HEADS):
            inside = kept[b, k].nonzero().flatten().tolist()
            taken: dict[int, list[int]] = {c: [] for c in inside}
            for e in lost[b, k].nonzero().flatten().tolist():
                if inside:
                    cosine = {c: float(torch.cosine_similarity(keys[b, k, e], keys[b, k, c], dim=0)) for c in inside}
                    taken[max(cosine, key=lambda c: cosine[c])].append(e)
            for j in range(11):
                for before, after in zip((keys, values), new, strict=True):
                    group = [before[b, k, j]] + [(before[b, k, j] + before[b, k, e]) / 2 for e in taken.get(j, [])]
                    assert torch.allclose(after[b, k, j], torch.stack(group).mean(0), atol=1e-5)
    assert pivotal_merging(keys, values, torch.zeros_like(kept), lost) is None


@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_look_m_changes_kept_media_only(seed: int) -> None:
    observations, labels = layers_of(seed)
    compressor = compressor_of("look_m", ratio=0.3)
    scores = compressor.planners.default.scores(observations, labels)
    for seen, plan in zip(observations, compressor.planners.default.plan(observations, labels), strict=True):
        kept = torch.isfinite(plan.log_gates)
        keys, _, _ = plan.apply(seen.keys, seen.values)
        changed = (keys != seen.keys).any(-1)
        assert not bool((changed & ~(kept & labels.media[:, None])).any())
        assert bool(changed.any())
    nothing = compressor.planners.default.plan(observations, labels, ratio=0.0)
    assert all(plan.merged_into is None for plan in nothing)
    for row in received(observations[1], 1, 0, list(range(PADDING, ENTRIES))), scores[1].score[1, 0].tolist():
        assert row == pytest.approx(scores[1].score[1, 0].tolist(), abs=1e-5)


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
    with compressor_of("expected_attention", horizon=3)(model) as session, torch.no_grad():
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
    assert torch.allclose(rotation.ahead_cos, ahead[0].mean(1))
    assert not torch.allclose(rotation.ahead_sin, rotation.sin[:, -1])


# ------------------------------------------------------------------ KVzip


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
    clips = [tiny_omni.context(1), tiny_omni.context(2, intro=(2, 10, 11, 12, 13))]
    prompt = [36, 33, 38]
    with compressor_of("kvzip")(eager, tiny_omni.Tokenizer()) as session, torch.no_grad():
        rows = [session.prefill(rows="none", **clip).embedded for clip in clips]
        batch = session.prefill(DecoderInputs.stack(rows), rows="none")
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


# ------------------------------------------------------------------ all of them


@given(seed=SEEDS, ratio=st.sampled_from([0.0, 0.07, 0.3, 0.62, 0.95]))
@settings(max_examples=5, deadline=None)
@pytest.mark.parametrize("share_heads", [False, True])
@pytest.mark.parametrize("policy", COMPRESSING)
def test_budgets_are_exact_and_text_stays(policy: str, share_heads: bool, seed: int, ratio: float) -> None:
    observations, labels = layers_of(seed)
    compressor = compressor_of(policy, ratio=ratio, share_heads=share_heads, window=6)
    seen = [watched(part, policy, 6) for part in observations]
    plans = compressor.planners.default.plan(seen, labels)
    kept = torch.stack([torch.isfinite(plan.log_gates).expand(-1, KV_HEADS, -1) for plan in plans], dim=1)
    media = torch.nn.functional.pad(labels.media, (0, kept.shape[-1] - ENTRIES), value=True)
    entries = (kept & media[:, None, None]).sum(-1)
    assert entries.sum(1).tolist() == [[total] * KV_HEADS for total in totals(labels, ratio)]
    assert bool((entries == entries[:, :, :1]).all()), "all heads of a layer keep equally many"
    assert bool(kept[..., :ENTRIES].masked_select(labels.text[:, None, None]).all())
    assert not bool(kept[..., :ENTRIES].masked_select(~labels.real[:, None, None]).any())


@given(seed=SEEDS, ratio=st.sampled_from([0.13, 0.5]))
@settings(max_examples=5, deadline=None)
@pytest.mark.parametrize("policy", [name for name in COMPRESSING if name != "random"])
def test_a_padded_row_is_planned_as_the_row_alone(policy: str, seed: int, ratio: float) -> None:
    compressor = compressor_of(policy, ratio=ratio, window=6)
    gates, entries = [], []
    for padded in (True, False):
        observations, labels = layers_of(seed, padded)
        first = PADDING if padded else 0
        seen = [watched(part, policy, 6) for part in observations]
        plans = compressor.planners.default.plan(seen, labels)
        gates.append([plan.log_gates[-1, ..., first:] for plan in plans])
        applied = [plan.apply(part.keys, part.values)[:2] for plan, part in zip(plans, seen, strict=True)]
        entries.append([torch.cat(pair, dim=-1)[-1, :, first:] for pair in applied])
    for one, other in zip(*gates, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(*entries, strict=True):
        assert torch.allclose(one, other, atol=1e-5), "padding was merged into what is kept"


def masked_full_attention(
    model: Any, inputs: dict[str, Any], keep: list[Tensor], merged: list[MergedInto | None]
) -> Tensor:
    """Logits of the question where every entry stays: what was evicted is masked, what was merged into is changed.

    Args:
        keep: by layer bool ``[B, K, N]``; merged: by layer the entries that the question reads changed.
    """
    length = inputs["input_ids"].shape[1]
    ids = torch.cat([inputs["input_ids"], QUESTION], dim=1)

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, scaling: float, **__: Any) -> Any:
        layer, groups, outputs = module.layer_idx, query.shape[1] // key.shape[1], []
        later_key, later_value = key.clone(), value.clone()
        if (into := merged[layer]) is not None:
            place = into.index[..., None].expand(-1, key.shape[1], -1, key.shape[-1])
            later_key.scatter_(2, place, into.keys.expand_as(place))
            later_value.scatter_(2, place, into.values.expand_as(place))
        for part, keys, values in ((query[:, :, :length], key, value), (query[:, :, length:], later_key, later_value)):
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
            logits = part @ keys.transpose(-1, -2) * scaling
            first = length if outputs else 0
            queries = torch.arange(first, first + part.shape[2])[:, None]
            visible = (torch.arange(keys.shape[2]) <= queries).expand_as(logits).clone()
            if outputs:
                visible[..., :length] &= keep[layer].repeat_interleave(groups, 1)[:, :, None]
            outputs.append(logits.masked_fill(~visible, -torch.inf).softmax(-1) @ values)
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None

    full = copy.deepcopy(model)
    full.model.language_model.config._attn_implementation = "spelled_out"
    ALL_ATTENTION_FUNCTIONS["spelled_out"] = attend
    try:
        return full(**inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, use_cache=False).logits[
            :, length:
        ]
    finally:
        del ALL_ATTENTION_FUNCTIONS["spelled_out"]


@pytest.mark.parametrize(
    ("model", "policy", "when", "ratio"),
    by_turns(ATTENTION, [name for name in COMPRESSING if name != "acckv"], ["context", "prompt"], [0.6, 0.2]),
    indirect=["model"],
)
def test_eviction_is_simulation_is_masking(model: Any, policy: str, when: Any, ratio: float) -> None:
    """The evicted cache, the gated full cache and masked full attention without a cache give the same logits."""
    inputs = tiny_omni.context() if when == "context" else tiny_omni.prompt()
    with compressor_of(policy, ratio=ratio, when=when)(model, tiny_omni.Tokenizer()) as session, torch.no_grad():
        prefill = session.prefill(**inputs)
        plans = session.plan(prefill)
        evicted_cache = session.compress(prefill)
        length = prefill.labels.labels.shape[1]
        after = {
            "input_ids": QUESTION,
            "attention_mask": torch.ones(1, length + QUESTION.shape[1], dtype=torch.long),
            "position_ids": session.adapter.text_positions(prefill.next_position + torch.arange(QUESTION.shape[1])),
        }
        simulated = session.simulate(prefill, plans, **after)
        evicted = model(cache=evicted_cache.branch(), use_cache=True, **after).logits
    keep = [torch.isfinite(plan.log_gates).expand(-1, 2, -1) for plan in plans]
    reference = masked_full_attention(model, inputs, keep, [plan.merged_into for plan in plans])
    assert (evicted - reference).abs().max() < 1e-5
    assert (simulated - evicted).abs().max() < 1e-5
    media = tiny_omni.VIDEO_TOKENS + tiny_omni.AUDIO_TOKENS
    assert float(evicted_cache.kept_entries().sum()) == int(ratio * 3 * media + 1e-9)


def test_kept_modalities_are_the_mean_over_heads(model: Any) -> None:
    with compressor_of("madakv", ratio=0.4)(model, tiny_omni.Tokenizer()) as session, torch.no_grad():
        prefill = session.prefill(**tiny_omni.context())
        plans, cache_ = session.plan(prefill), session.compress(prefill)
    for layer, plan in zip(compressed_layers(cache_), plans, strict=True):
        kept = torch.isfinite(plan.log_gates)[:, :, None] & prefill.labels.by_modality[:, None]
        assert torch.equal(layer.kept, kept.sum(-1).float().mean(1))


def test_every_policy_is_listed_where_a_user_looks() -> None:
    names = list(get_args(PolicyName))
    assert list(POLICIES) == names
    documented = " ".join((EvaluationOptions.__doc__ or "").split())
    assert all(f"{name}," in documented or f"{name} and" in documented for name in names)


@cache
def tiny(implementation: str) -> Any:
    return tiny_omni.build(3, implementation)


@pytest.fixture(params=ATTENTION)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


@pytest.fixture
def eager() -> Any:
    return tiny("eager")
