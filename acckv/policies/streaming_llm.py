"""StreamingLLM (arXiv 2309.17453): attention sinks and the most recent entries."""

from __future__ import annotations

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation
from acckv.policies.base import Policy


class StreamingLLM(Policy):
    """Keep the first `sinks` audio and video entries, then the latest ones. Text is kept anyway."""

    name = "streaming_llm"

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        order = labels.media.long().cumsum(-1)
        total = order[:, -1:]
        score = order.float()
        return LayerScore((score + (order <= self.config.sinks) * (total + 1))[:, None], None)
