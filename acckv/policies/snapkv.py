"""SnapKV (arXiv 2404.14469): attention of an observation window, pooled over neighbours."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch.nn.functional as F

from acckv.errors import InputError
from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerScore
from acckv.method.scoring import Observation, heavy_hitter_score
from acckv.policies.base import Policy
from acckv.policies.registry import register_policy


@register_policy("snapkv")
@dataclass(frozen=True)
class SnapKV(Policy):
    """The entries that the last `window_size` queries attend to; max-pooling keeps the neighbourhood of a hit.

    Deviation from arXiv 2404.14469: the window itself, which the paper always keeps, is text here, which is kept anyway
    and counts in no budget.
    """

    window_size: int = field(
        default=32, metadata={"help": "Observed queries at the end of what was prefilled.", "low": 1}
    )
    kernel_size: int = field(
        default=5, metadata={"help": "Width of the max-pooling over scores; odd, in entries.", "low": 1}
    )

    queries = "window"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel_size % 2 == 0:
            raise InputError(f"{self.kernel_size} is even; the pooling window needs a middle", field="kernel_size")

    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        score = self.shared(heavy_hitter_score(observation))
        return LayerScore(F.max_pool1d(score, self.kernel_size, stride=1, padding=self.kernel_size // 2), None)
