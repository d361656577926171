"""AccKV step 1, attention redistribution, and the other scores that the policies share.

Pure functions of tensors. ``B`` batch, ``H`` query heads, ``K`` KV heads, ``R`` observed queries, ``N`` prompt entries,
``D`` head size. Memory is queries x tokens, worked off in chunks of queries: nothing is ever tokens x tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from acckv.method.modality import VARIANCE_FLOOR, ModalityMap
from acckv.method.rotary import Rotation

#: Queries whose attention is held at once, and logits: what fits a processor's cache is worked off fastest.
QUERY_CHUNK, LOGITS = 256, 1 << 21


@dataclass(frozen=True)
class Observation:
    """Queries, keys and values of one layer as its attention saw them: all that a score may be computed from.

    Args:
        queries: ``[B, H, R, D]`` of the observed queries, after position embedding.
        keys: ``[B, K, N, D]`` of the prompt, after position embedding.
        values: ``[B, K, N, Dv]``.
        query_positions: int64 ``[B, R]``, on the CPU: index of each in the sequence (a probe query's is N or more).
        query_valid: bool ``[B, R]``, on the CPU: those that count.
        real: bool ``[B, N]``, on the CPU: entries that are no padding.
        scaling: factor of the dot product (Gemma 4's is 1, so it is never derived from D).
        rotation: the prompt's rotary embedding, for policies that take it off.
        reconstruction: ``[B, K, N]``, the most attention to each entry while the context was fed in again.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    query_positions: Tensor
    query_valid: Tensor
    real: Tensor
    scaling: float
    rotation: Rotation | None = None
    reconstruction: Tensor | None = None

    @cached_property
    def key_scale(self) -> Tensor:
        """float32 ``[B, K, N]``: one over the length of each key."""
        return inverse_norm(self.keys.float())

    def select(self, mask: Tensor) -> Observation:
        """Observation in which only the queries of `mask`, bool ``[B, R]``, count; others are cut where possible."""
        valid = self.query_valid & mask.to(self.query_valid.device)
        used = valid.any(dim=0).nonzero().flatten().tolist()
        first, last = (used[0], used[-1] + 1) if used else (0, 0)
        return replace(
            self,
            queries=self.queries[:, :, first:last],
            query_positions=self.query_positions[:, first:last],
            query_valid=valid[:, first:last],
        )


def attention_of_queries(observation: Observation, chunk: int | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Softmax attention of the observed queries over the prompt, a chunk of them at a time.

    Padding is masked before the softmax; queries that do not count give zeros.

    Args:
        chunk: queries at once; None takes as many as :data:`LOGITS` allows, at most :data:`QUERY_CHUNK`.

    Yields:
        the slice of queries and their attention ``[B, K, G, chunk, N]``, with G query heads to a KV head.
    """
    batch, heads, count, size = observation.queries.shape
    kv_heads, entries = observation.keys.shape[1:3]
    groups = heads // kv_heads
    chunk = chunk or min(max(LOGITS // max(batch * heads * entries, 1), 1), QUERY_CHUNK)
    queries = observation.queries.view(batch, kv_heads, groups, count, size)
    keys = observation.keys.transpose(-1, -2)
    # Most often every row sees all but the last few entries, and no mask is needed.
    hidden = 0 if not bool(observation.real.all()) else int(observation.query_positions.min()) + 1 if count else entries
    if hidden < entries:
        columns = torch.arange(hidden, entries, device=keys.device)
        positions, real = observation.query_positions.to(keys.device), observation.real[:, hidden:].to(keys.device)
    counted = None if bool(observation.query_valid.all()) else observation.query_valid.to(keys.device)
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        # Queries of all query heads of a KV head in one product: broadcasting would copy the keys for each.
        folded = queries[:, :, :, part].reshape(batch, kv_heads, -1, size)
        logits = (folded @ keys).view(batch, kv_heads, groups, -1, entries).float() * observation.scaling
        if hidden < entries:
            visible = (columns <= positions[:, part, None]) & real[:, None]
            logits[..., hidden:].masked_fill_(~visible[:, None, None], torch.finfo(logits.dtype).min)
        weights = logits.softmax(dim=-1)
        if counted is not None:
            weights = weights * counted[:, None, None, part, None]
        yield part, weights


def redistribution_weights(
    query_positions: Tensor, real: Tensor, gamma: Tensor | float, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Weights ``((i + 1) / (N - j)) ** gamma`` of docs/method.md, step 1, as a row and a column factor.

    ``i + 1`` undoes the dilution of query i, ``N - j`` divides by the number of queries that can see column j.
    Padding counts in neither, so that a padded row equals the row alone; its columns get 0.

    Args:
        query_positions, real: of an :class:`Observation`.

    Returns:
        row factor ``[B, R]`` and column factor ``[B, N]``, on the device.
    """
    row = (query_positions + 1 - (~real).sum(-1, keepdim=True)).clamp_min(1).float()
    column = real.flip(-1).cumsum(-1).flip(-1).clamp_min(1).float()  # in a stream, padding may stand in the middle
    return row.to(device) ** gamma, column.to(device) ** -gamma * real.to(device)


def heavy_hitter_score(observation: Observation, gamma: Tensor | float = 0.0) -> Tensor:
    """Attention that each entry receives from the observed queries (docs/method.md, step 1; gamma 0 is plain H2O).

    Returns:
        float32 ``[B, K, N]``: sum over queries, mean over the query heads of a KV head; 0 for padding.
    """
    batch, kv_heads, entries = observation.keys.shape[:3]
    device = observation.keys.device
    row, column = redistribution_weights(observation.query_positions, observation.real, gamma, device)
    total = observation.keys.new_zeros(batch, kv_heads, entries, dtype=torch.float32)
    for part, weights in attention_of_queries(observation):
        groups = weights.shape[2]
        factor = (row[:, None, None, part] / groups).expand(-1, kv_heads, groups, -1)
        total = total + (factor.reshape(batch, kv_heads, 1, -1) @ weights.flatten(2, 3))[:, :, 0]
    return total * column[:, None, :]


def peak_attention(observation: Observation) -> Tensor:
    """The most attention that each entry receives from any observed row and query head: float32 ``[B, K, N]``."""
    peak = observation.keys.new_zeros(*observation.keys.shape[:3], dtype=torch.float32)
    for _, weights in attention_of_queries(observation):
        peak = torch.maximum(peak, weights.amax(dim=(2, 3)))
    return peak


def key_diversity(keys: Tensor, scale: Tensor, real: Tensor | None = None) -> Tensor:
    """Minus the cosine similarity of each key to the mean key of its head (KeyDiff, arXiv 2504.15364).

    Args:
        keys: ``[B, K, N, D]``; scale: one over their lengths, ``[B, K, N]``.
        real: bool ``[B, N]``, None where nothing is padding.

    Returns:
        float32 ``[B, K, N]`` in -1 to 1: the less a key is like the others, the higher.
    """
    keys = keys.float()
    # Products with a few directions and no unit vector of every key: nothing of the keys' size is made.
    counted = scale if real is None else scale * real[:, None]
    mean = F.normalize(counted.unsqueeze(2) @ keys, dim=-1)
    length = scale.flatten(0, 1)[..., None]
    against = torch.baddbmm(length, keys.flatten(0, 1), mean.flatten(0, 1).transpose(1, 2), beta=0, alpha=-1)
    return against.view_as(scale) * scale


def inverse_norm(vectors: Tensor) -> Tensor:
    """One over the length of ``[..., D]``, bounded for vectors of no length."""
    return torch.linalg.vector_norm(vectors, dim=-1).clamp_min(1e-12).reciprocal()


def standardise(score: Tensor, labels: ModalityMap, widest: float = torch.inf) -> Tensor:
    """Zero mean and unit deviation of a score inside each modality; the ranking inside a modality stays.

    Args:
        score: ``[B, K, N]``.
        widest: a score that deviates more than this is divided by no more than this, so it stays wider.

    Returns:
        ``[B, K, N]``, zero for entries of no modality.
    """
    centred, deviation = _centred(score, labels)
    if widest < torch.inf:
        deviation = deviation.clamp(max=widest)
    # What is of no modality is divided by infinity.
    return centred / torch.baddbmm(labels.outside, deviation, labels.masks)


def standardised_sum(scores: list[Tensor], weights: Tensor, labels: ModalityMap) -> Tensor:
    """A sum of standardised scores, weighted by score, head and modality.

    Args:
        scores: S times ``[B, K, N]``; weights: ``[S, K, 2]``.

    Returns:
        ``[B, K, N]``, zero for entries of no modality.
    """
    centred, deviation = _centred(torch.cat(scores, dim=1), labels)
    summands = centred * ((weights.flatten(0, 1) / deviation) @ labels.masks)
    return summands.unflatten(1, (len(scores), -1)).sum(1)


def _centred(score: Tensor, labels: ModalityMap) -> tuple[Tensor, Tensor]:
    """A score less its mean in each modality, and its deviation there, ``[B, K, 2]``.

    What the first holds at entries of no modality means nothing.
    """
    centred = torch.baddbmm(score, score @ labels.averaging, labels.masks, alpha=-1)
    variance = torch.baddbmm(labels.variance_floor, centred.square(), labels.averaging)
    return centred, variance.sqrt() + VARIANCE_FLOOR**0.5


def redundancy(score: Tensor, values: Tensor, labels: ModalityMap, width: int, softness: float = 0.2) -> Tensor:
    """Redundancy of each entry: the share of it that its neighbours hold, which makes the second best worth little.

    An entry counts every neighbour of its modality that scores higher, by how similar their values are (cosine, after
    the mean of the modality is taken off, and not below 0). "Higher" is soft, so that scores get gradients.

    Args:
        score: ``[B, K or 1, N]`` in standard deviations; values: ``[B, K, N, D]``, of all heads together where the
            heads share a score.
        width: neighbours on either side, in entries.
        softness: of "higher".

    Returns:
        ``[B, K or 1, N]``, 0 to twice `width`.
    """
    if score.shape[1] < values.shape[1]:
        values = values.transpose(1, 2).flatten(2)[:, None]
    if not score.shape[-1]:
        return torch.zeros_like(score)
    around = F.pad(score, (width, width)).unfold(-1, 2 * width + 1, 1)
    higher = torch.sigmoid((around - score[..., None]) / softness)
    alike = _similarity_around(values.float(), labels, width) * labels.alike_around(width)
    return (higher * alike).sum(-1)


def _similarity_around(values: Tensor, labels: ModalityMap, width: int) -> Tensor:
    """Cosine, not below 0, of each entry's value with those of its neighbours; of other modalities it means nothing.

    Args:
        values: ``[B, K, N, D]``.

    Returns:
        ``[B, K, N, 2 * width + 1]``, from the earliest neighbour to the latest.
    """
    batch, heads, entries, _ = values.shape
    mean = labels.averaging.transpose(1, 2)[:, None] @ values
    shares = labels.masks.transpose(1, 2)[:, None].expand(-1, heads, -1, -1)
    centred = torch.baddbmm(values.flatten(0, 1), shares.flatten(0, 1), mean.flatten(0, 1), alpha=-1)
    # Products of blocks of entries with all that are near one of the block; of those, the diagonals near its own.
    block = 4 * width
    padded = F.pad(F.normalize(centred, dim=-1), (0, 0, width, width + -entries % block))
    products = padded[:, width:-width].unflatten(1, (-1, block)) @ padded.unfold(1, block + 2 * width, block)
    *strides, row, column = products.stride()
    band = products.as_strided((*products.shape[:-1], 2 * width + 1), (*strides, row + column, column))
    return band.clamp_min(0).flatten(1, 2)[:, :entries].unflatten(0, (batch, heads))
