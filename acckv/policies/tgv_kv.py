"""TGV-KV (arXiv 2606.03075): what the text attends to, most of all the text that text attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation, attention_of_queries, heavy_hitter_score
from acckv.policies.base import Policy
from acckv.policies.registry import register_policy


@register_policy("tgv_kv")
@dataclass(frozen=True)
class TGVKV(Policy):
    """Attention of the text after the media, each text query weighted by the attention that it gets itself.

    Text-weighted ranking: the weight of a text query is the attention that its token receives from the text, over the
    number of text queries that see it. One ranking for all heads of a layer, by the mean over its query heads.
    Text-vision budgeting: a layer's budget is in proportion to the attention that the media get from the text; the
    scores of a layer are scaled so that they sum to it. Text-prioritised retention: text is kept.

    Deviations from arXiv 2606.03075 and its code: audio is ranked with the video. Text counts in no budget; the paper
    takes it out of each layer's, and keeps no media where nothing is left. Entries are evicted once, after the prompt,
    and not while it answers. It is guided by a question, so `when: prompt` is its own setting: before a question, its
    text is the probe prompt, whose tokens are no entries, and all of its queries weigh the same.
    """

    queries = "text"
    cross_layer = True
    ranks_by_head = False

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        received = heavy_hitter_score(observation).mean(dim=1)
        weights = _text_weights(observation, received)
        weighted = torch.zeros_like(received)
        for part, attention in attention_of_queries(observation):
            weighted += (weights[:, None, part] @ attention.mean(dim=(1, 2)))[:, 0]
        weighted *= labels.media
        to_media = (received * labels.media).sum(-1, keepdim=True)
        smallest = torch.finfo(weighted.dtype).tiny
        score = weighted / weighted.sum(-1, keepdim=True).clamp_min(smallest) * to_media
        return LayerScore(score[:, None], None)

    def layer_shares(
        self, scores: Sequence[LayerScore | None], labels: ModalityMap, total: Tensor, ratio: float
    ) -> Tensor:
        return torch.stack([score.score[:, 0].sum(-1) for score in scores if score is not None], dim=1)


def _text_weights(observation: Observation, received: Tensor) -> Tensor:
    """``[B, R]``: mean attention to each observed query's own token from the observed queries that see it.

    Args:
        received: ``[B, N]``, the attention to each entry from all of them.
    """
    entries, valid = received.shape[1], observation.query_valid
    seen_by = valid.long().flip(-1).cumsum(-1).flip(-1).clamp_min(1)
    own = received.gather(1, observation.query_positions.clamp_max(entries - 1).to(received.device))
    weights = own / seen_by.to(received.device)
    return torch.where((observation.query_positions < entries).to(received.device), weights, 1.0)
