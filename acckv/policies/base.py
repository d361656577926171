"""The interface of a compression policy: the queries it observes, how it scores, how it shares a budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from acckv.config import check_options, option_fields
from acckv.errors import InputError
from acckv.method.modality import ModalityMap
from acckv.method.plan import LayerInputs, LayerPlan, LayerScore, plan_layer
from acckv.method.scoring import Observation
from acckv.method.weights import CalibratedWeights

Queries = Literal["none", "window", "text", "all", "reconstruction"]


@dataclass(frozen=True)
class Policy(ABC):
    """A method of compression; its options are the fields of its dataclass.

    A policy must say how it :meth:`score`\\ s entries. Budgets, the selection, batches, padding and eviction are common
    to all; the other methods have neutral defaults.

    Attributes:
        name: as it is registered.
        queries: those whose attention it reads. 'window' are the last `window_size` of the prompt. 'text' are those
            of the text after the media, or of a probe prompt where no text has been seen yet (`when: context`).
            'reconstruction' are queries of no prompt but of the context fed in again (see
            :mod:`acckv.runtime.context_reconstruction`).
        window_size: how many queries a 'window' has.
        n_future_positions: positions after the prompt whose rotary embedding it reads, with that of the prompt; 0 for
            a policy that reads neither.
        repeat_in_chat: whether the context is fed in again as the model's answer, in its chat format.
        keeps_all: whether it evicts nothing, whatever the ratio; None where the ratio decides.
        cross_layer: whether a layer's score or budget depends on other layers' scores. Then nothing can be evicted
            before the last layer has run, and a prefill's peak is the full cache.
        ranks_by_head: whether KV heads have scores of their own, unless `share_heads`; else they keep the same entries
            whatever the `head_budgets`.
        learns_heads: whether it has learned budgets of the KV heads (`head_budgets: learned`).

    Raises:
        InputError: an option is out of its range; the message names it.
    """

    share_heads: bool = field(
        default=False, kw_only=True, metadata={"help": "Keep the same tokens in all KV heads of a layer."}
    )

    name: ClassVar[str]
    queries: ClassVar[Queries] = "none"
    keeps_all: ClassVar[bool | None] = None
    cross_layer: ClassVar[bool] = False
    ranks_by_head: ClassVar[bool] = True
    learns_heads: ClassVar[bool] = False
    window_size = 1
    n_future_positions = 0
    repeat_in_chat = False

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def options(self) -> dict[str, Any]:
        """The options by name, as :func:`acckv.policies.make_policy` takes them."""
        return {name: getattr(self, name) for name in option_fields(type(self))}

    @property
    def label(self) -> str:
        """The name, with the options that are not the defaults: ``snapkv(window_size=64)``."""
        defaults = option_fields(type(self))
        changed = [f"{name}={value}" for name, value in self.options.items() if value != defaults[name].default]
        return f"{self.name}({', '.join(changed)})" if changed else self.name

    def new_weights(self, layers: int, kv_heads: int, query_heads: int, head_size: int) -> CalibratedWeights:
        """The weights that calibration begins with, for a decoder of these dimensions.

        Raises:
            InputError: this policy learns none.
        """
        raise self._learns_nothing()

    def calibrated(self, weights: CalibratedWeights) -> Policy:
        """This policy with learned weights.

        Raises:
            InputError: it has none.
        """
        raise self._learns_nothing()

    def _learns_nothing(self) -> InputError:
        return InputError(f"is {self.name!r}, which has no learned weights; leave them out", field="policy")

    def seeded(self, seed: int) -> Policy:
        """This policy with the seed of a run, where it draws anything and has no seed of its own."""
        return self

    def head(self, index: int) -> Policy:
        """This policy for one KV head, as of a model that has no other; it differs where weights were learned."""
        return self

    @abstractmethod
    def score(self, layer: int, observation: Observation, labels: ModalityMap) -> LayerScore:
        """The score of every entry of one layer; higher is kept first."""

    def scores(self, observations: list[Observation], labels: ModalityMap) -> list[LayerScore]:
        """The scores of every layer; overridden where one layer's score comes from another."""
        return [self.score(layer, seen, labels.to(seen.keys.device)) for layer, seen in enumerate(observations)]

    def layer_shares(
        self, scores: Sequence[LayerScore | None], labels: ModalityMap, total: Tensor, ratio: float
    ) -> Tensor:
        """The relative budget of each layer; it is scaled to the exact total, and no layer gets more than exists.

        Args:
            scores: one a layer; None where the policy is not `cross_layer` and nothing has been scored yet.
            total: ``[B]`` entries that all layers together keep, the share `ratio` of all; where heads keep different
                numbers, their mean over heads.

        Returns:
            float ``[L]`` or ``[B, L]``; equal unless overridden.
        """
        return torch.ones(1, len(scores), device=total.device)

    def modality_shares(self, layer: int, measured: Tensor, ratio: float) -> Tensor:
        """The split ``[B, 2]`` or ``[B, K, 2]`` of a layer's budget over (video, audio).

        Args:
            measured: `modality_shares` of the layer's score; returned as it is unless overridden.
        """
        return measured

    def head_shares(self, layer: int, shares: Tensor, ratio: float) -> Tensor:
        """The relative budgets ``[B, K, 2]`` of a layer's KV heads and modalities, with `head_budgets: learned`.

        Args:
            shares: as of :meth:`modality_shares`.

        Raises:
            InputError: this policy learns none.
        """
        raise self._learns_nothing()

    def plan(self, given: LayerInputs) -> LayerPlan:
        """The plan of one layer: the entries of largest score, unless overridden."""
        return plan_layer(given)

    def shared(self, score: Tensor) -> Tensor:
        """The mean of a score over KV heads where one selection serves all of a layer's."""
        return score.mean(dim=1, keepdim=True) if self.share_heads else score
