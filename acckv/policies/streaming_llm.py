"""StreamingLLM (arXiv 2309.17453): attention sinks and the most recent entries."""

from __future__ import annotations

from dataclasses import dataclass, field

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation
from acckv.policies.base import Policy
from acckv.policies.registry import register_policy


@register_policy("streaming_llm")
@dataclass(frozen=True)
class StreamingLLM(Policy):
    """The first `n_sink` audio and video entries, then the latest ones.

    Deviations from arXiv 2309.17453: text, the first tokens of a prompt included, is kept anyway, so that the sinks
    counted here are those of the media; and kept entries keep their positions.
    """

    n_sink: int = field(default=4, metadata={"help": "First audio and video entries that are always kept.", "low": 0})

    ranks_by_head = False

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        order = labels.media.long().cumsum(-1)
        total = order[:, -1:]
        score = order.float()
        return LayerScore((score + (order <= self.n_sink) * (total + 1))[:, None], None)
