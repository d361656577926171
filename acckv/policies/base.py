"""What a compression method is: which rows it watches, and how it scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal

from torch import Tensor

from acckv.config import CompressionConfig
from acckv.modality import ModalityMap
from acckv.pipeline import LayerScore
from acckv.scoring import Observation

Rows = Literal["none", "window", "text", "all"]


class Policy(ABC):
    """A training-free method on the common pipeline.

    Attributes:
        rows: the rows whose attention it reads. 'text' are the text rows after the media, or the rows of a probe
            prompt where no text has been seen yet (`when: context`).
        cross_layer: whether a layer's score or budget depends on other layers' scores. Then nothing can be evicted
            before the last layer has run, and a prefill's peak is the full cache.
    """

    rows: Rows = "none"
    name: ClassVar[str]
    cross_layer: ClassVar[bool] = False

    def __init__(self, config: CompressionConfig) -> None:
        self.config = config

    @abstractmethod
    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        """Score every entry of one layer; higher is kept first."""

    def shared(self, score: Tensor) -> Tensor:
        """Mean over KV heads where the config wants one selection a layer."""
        return score.mean(dim=1, keepdim=True) if self.config.share_heads else score
