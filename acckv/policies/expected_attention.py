"""Expected attention (arXiv 2510.00636): what queries to come will attend to, if they are like those that came."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from acckv.errors import InputError
from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.rotary import Rotation, rotate, unrotate
from acckv.method.scoring import Observation
from acckv.policies.base import Policy
from acckv.policies.registry import register_policy


@register_policy("expected_attention")
@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """A Gaussian of the queries before position embedding, turned to the next `n_future_positions` positions.

    A key k then gets exp(s k.mean + s^2 k.cov.k / 2) of the attention, s being the scaling; the score is the softmax of
    that, averaged over the query heads of a KV head, times the norm of the entry's value.

    As in kvpress, and so without the term that arXiv 2510.00636 adds before the value norm. The positions to come are
    those of text. Where a model normalises queries, it is the normalised ones that are Gaussian.
    """

    n_future_positions: int = field(
        default=512, metadata={"help": "Positions to come that the queries are averaged over.", "low": 1}
    )
    n_sink: int = field(
        default=4,
        metadata={
            "help": "First entries of a prompt: they stay, and count neither in the statistics nor in the softmax.",
            "low": 0,
        },
    )

    queries = "all"

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        keys, scaling = observation.keys.float(), observation.scaling
        place = observation.real.cumsum(-1)
        counted = (observation.real & (place > self.n_sink))[:, None, None].to(keys.device)
        mean, covariance = _future_queries(observation, place, self.n_sink)
        logits = scaling * torch.einsum("bkgd,bknd->bkgn", mean, keys)
        for head in range(mean.shape[2]):  # one query head at a time: memory is entries x head size
            spread = ((keys @ covariance[:, :, head]) * keys).sum(-1)
            logits[:, :, head] += scaling**2 / 2 * spread
        expected = logits.masked_fill(~counted, torch.finfo(logits.dtype).min).softmax(dim=-1).mean(dim=2)
        score = expected * observation.values.float().norm(dim=-1)
        sinks = (observation.real & (place <= self.n_sink))[:, None].to(keys.device)
        return LayerScore(self.shared(torch.where(sinks, score.amax(-1, keepdim=True) + 1, score)), None)


def _future_queries(observation: Observation, place: Tensor, n_sink: int) -> tuple[Tensor, Tensor]:
    """Mean ``[B, K, G, D]`` and covariance ``[B, K, G, D, D]`` of the queries at positions to come."""
    if observation.rotation is None:
        raise InputError("needs the rotary embedding of its queries", field="observation")
    rotation: Rotation = observation.rotation
    layout = rotation.layout
    batch, _, count, size = observation.queries.shape
    kv_heads = observation.keys.shape[1]
    at = observation.query_positions.to(rotation.cos.device)[..., None].expand(-1, -1, size)
    cos, sin = (part.gather(1, at)[:, None] for part in (rotation.cos, rotation.sin))
    queries = unrotate(observation.queries.float(), cos, sin, layout).view(batch, kv_heads, -1, count, size)
    counted = observation.query_valid & (place.gather(1, observation.query_positions) > n_sink)
    weight = (counted / counted.sum(-1, keepdim=True).clamp_min(1)).to(queries.device)[:, None, None, :, None]
    mean = (queries * weight).sum(dim=3)
    centred = (queries - mean[:, :, :, None]) * weight.sqrt()
    covariance = centred.transpose(-1, -2) @ centred
    cos, sin = (part[:, None, None] for part in (rotation.ahead_cos, rotation.ahead_sin))
    turned = rotate(covariance, cos[..., None, :], sin[..., None, :], layout).transpose(-1, -2)
    return rotate(mean, cos, sin, layout), rotate(turned, cos[..., None, :], sin[..., None, :], layout)
