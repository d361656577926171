"""LOOK-M (arXiv 2406.18139): text first, heavy hitters of the rest, the evicted merged into the most similar kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from acckv.method.plan import LayerInputs, LayerPlan, MergedInto
from acckv.method.scoring import QUERY_CHUNK
from acckv.policies.h2o import H2O
from acckv.policies.registry import register_policy


@register_policy("look_m")
@dataclass(frozen=True)
class LookM(H2O):
    """Text-prior eviction by accumulated attention with pivotal merging, the paper's best variant.

    Deviations from arXiv 2406.18139: text is kept in any policy, so it needs no bonus on its score, and the paper's
    window of recent tokens is text. Merged into are the kept audio and video entries only, where the paper also merges
    into text: here text stays as it is, and with nothing kept nothing of the media is left. Soft gates evict nothing
    for good, so they merge nothing.
    """

    def plan(self, given: LayerInputs) -> LayerPlan:
        plan = super().plan(given)
        keys, values = given.observation.keys, given.observation.values
        stays = torch.isfinite(plan.log_gates).expand(keys.shape[:3])
        media = given.labels.media[:, None]
        return replace(plan, merged_into=pivotal_merging(keys, values, stays & media, ~stays & media))


def pivotal_merging(keys: Tensor, values: Tensor, kept: Tensor, lost: Tensor) -> MergedInto | None:
    """Merge every lost entry into the kept one whose key has the largest cosine similarity, its pivot.

    A pivot becomes the mean of itself and of its midpoints to each entry that it takes in. Lost entries are worked off
    in chunks, so memory is chunk x kept.

    Args:
        keys, values: ``[B, K, N, D]``; kept, lost: bool ``[B, K, N]``.

    Returns:
        None where nothing is kept.
    """
    width = int(kept.sum(-1).max())
    if width == 0:
        return None
    index = (~kept).to(torch.uint8).argsort(dim=-1, stable=True)[..., :width]
    real = kept.gather(-1, index)
    sources = (keys, values)
    pivots = [source.gather(2, index[..., None].expand(-1, -1, -1, source.shape[-1])).float() for source in sources]
    directions = F.normalize(pivots[0], dim=-1).transpose(-1, -2)
    sums, count = [torch.zeros_like(pivot) for pivot in pivots], torch.zeros_like(index, dtype=torch.float32)
    for start in range(0, keys.shape[2], QUERY_CHUNK):
        part = slice(start, start + QUERY_CHUNK)
        similarity = F.normalize(keys[:, :, part].float(), dim=-1) @ directions
        nearest = similarity.masked_fill(~real[:, :, None], -torch.inf).argmax(-1)
        gone = (lost[:, :, part] & real.any(-1, keepdim=True)).float()
        count.scatter_add_(-1, nearest, gone)
        for total, source in zip(sums, sources, strict=True):
            place = nearest[..., None].expand(-1, -1, -1, source.shape[-1])
            total.scatter_add_(2, place, source[:, :, part].float() * gone[..., None])
    share = count[..., None]
    merged = [(pivot * (1 + share / 2) + total / 2) / (1 + share) for pivot, total in zip(pivots, sums, strict=True)]
    return MergedInto(index, merged[0].to(keys.dtype), merged[1].to(values.dtype))
