"""What a compression method is: which rows it watches, and how it scores."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from acckv.config import CompressionConfig
from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerPlan, LayerScore
from acckv.method.scoring import Observation

Rows = Literal["none", "window", "text", "all", "reconstruction"]


class Policy(ABC):
    """A training-free method on the common pipeline.

    Attributes:
        rows: the rows whose attention it reads. 'text' are the text rows after the media, or the rows of a probe
            prompt where no text has been seen yet (`when: context`). 'reconstruction' are rows of no prompt but of the
            context fed in again (see :mod:`acckv.runtime.context_reconstruction`).
        rotated: whether it needs the rotary embedding of its rows.
        keeps_all: whether it evicts nothing, whatever the ratio; None where the ratio decides.
        cross_layer: whether a layer's score or budget depends on other layers' scores. Then nothing can be evicted
            before the last layer has run, and a prefill's peak is the full cache.
    """

    rows: Rows = "none"
    rotated: ClassVar[bool] = False
    cross_layer: ClassVar[bool] = False
    keeps_all: ClassVar[bool | None] = None
    name: ClassVar[str]

    def __init__(self, config: CompressionConfig) -> None:
        self.config = config

    @abstractmethod
    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        """Score every entry of one layer; higher is kept first."""

    def scores(self, observations: list[Observation], labels: ModalityMap) -> list[LayerScore]:
        """Score every layer; overridden where one layer's score comes from another."""
        return [self.score(layer, seen, labels.to(seen.keys.device)) for layer, seen in enumerate(observations)]

    def layer_shares(self, scores: Sequence[LayerScore | None], labels: ModalityMap, total: Tensor) -> Tensor:
        """Relative budget of each layer; it is scaled to the exact total, and no layer gets more than exists.

        Args:
            scores: one a layer; None where the policy is not `cross_layer` and nothing has been scored yet.
            total: int64 ``[B]`` entries that all layers together keep.

        Returns:
            float ``[1 or B, L]``; equal unless overridden.
        """
        return torch.ones(1, len(scores), device=total.device)

    def fixed_plan(self, observation: Observation, labels: ModalityMap) -> LayerPlan | None:
        """The plan of a layer that no budget has a say in; None unless overridden.

        Args:
            labels: on the device of the observation's keys.
        """
        return None

    def merge(self, plan: LayerPlan, keys: Tensor, values: Tensor, labels: ModalityMap) -> LayerPlan:
        """The plan with evicted entries merged into kept ones; nothing is merged unless overridden.

        Args:
            keys, values: ``[B, K, N, D]`` of the prompt.
        """
        return plan

    def shared(self, score: Tensor) -> Tensor:
        """Mean over KV heads where the config wants one selection a layer."""
        return score.mean(dim=1, keepdim=True) if self.config.share_heads else score
