"""KVzip (arXiv 2505.23416): keep what the model needs to repeat its context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from acckv.errors import InputError
from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation
from acckv.policies.base import Policy
from acckv.policies.registry import register_policy


@register_policy("kvzip")
@dataclass(frozen=True)
class KVzip(Policy):
    """The most attention that an entry receives while the context is fed in again behind a repeat prompt.

    It asks for no question, with `when: prompt` too. How the context is repeated:
    :mod:`acckv.runtime.context_reconstruction`.

    With `head_budgets: joint` it keeps what arXiv 2505.23416 keeps: the best (head, entry) pairs of all layers
    together. With equal heads that ranking sets the budget of each layer alone.

    Deviations from the authors' code: it asks in the model's chat format (`repeat_in_chat`); for each later chunk of
    2000 tokens it names the last 8 tokens before in the request, where they stand behind it here; its softmax is over
    the chunk, its repetition and the system prompt, here over all that a query sees, as the paper defines it. The
    system prompt, its sinks, is text, which is kept anyway.
    """

    repeat_in_chat: bool = field(
        default=False,
        metadata={"help": "Ask for the repetition in the model's chat format: a user's request, then an answer."},
    )

    queries = "reconstruction"
    cross_layer = True

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        if observation.reconstruction is None:
            raise InputError("needs the attention of a repeated context", field="observation")
        return LayerScore(self.shared(observation.reconstruction), None)

    def layer_shares(
        self, scores: Sequence[LayerScore | None], labels: ModalityMap, total: Tensor, ratio: float
    ) -> Tensor:
        ranked = torch.stack([score.score for score in scores if score is not None], dim=1)
        heads = ranked.shape[2]
        ranked = ranked.masked_fill(~labels.media[:, None, None], -torch.inf).flatten(1)
        order = ranked.argsort(dim=-1, descending=True, stable=True)
        pairs = (heads * total.double()).round()[:, None].to(order.device)
        kept = torch.arange(order.shape[1], device=order.device) < pairs
        among = torch.zeros_like(ranked).scatter_(1, order, kept.to(ranked.dtype))
        return among.view(len(total), len(scores), -1).sum(-1)
