"""SnapKV (arXiv 2404.14469): attention of an observation window, pooled over neighbours."""

from __future__ import annotations

import torch.nn.functional as F

from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation, heavy_hitter_score
from acckv.policies.base import Policy


class SnapKV(Policy):
    """Keep what the last `window` rows attend to; max-pooling keeps the neighbourhood of a hit."""

    name = "snapkv"
    rows = "window"

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        kernel = self.config.kernel
        score = self.shared(heavy_hitter_score(observation))
        return LayerScore(F.max_pool1d(score, kernel, stride=1, padding=kernel // 2), None)
