"""Evicting while a prompt is prefilled: each layer as soon as its attention is done, wherever the policy allows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from acckv.cache.cache import compressed_layers
from acckv.errors import InputError
from acckv.method.budgets import total_budget
from acckv.method.heads import join_heads, one_head
from acckv.method.modality import Modality, ModalityMap
from acckv.method.plan import LayerPlan, LayerScore
from acckv.method.scoring import Observation
from acckv.models.base import AttentionLayer
from acckv.models.batching import DecoderInputs
from acckv.planner import Planner, Planners, effective_ratio
from acckv.policies.base import Policy
from acckv.runtime.observation import Observer
from acckv.runtime.policy_inputs import PolicyInputs, behind


class LayerEviction:
    """Scores, budgets and commits the layers of one prefill.

    With a ratio, only the new tokens are compressed: what was kept of earlier clips counts as text, and the whole stays
    within ``floor(ratio * L * all entries ever candidates)``. With an absolute budget, which does not grow, everything
    held competes anew: that is what bounds a stream.

    A layer's budget needs no score, so each layer is evicted before the next one runs and the peak is one full layer
    plus the compressed rest. Policies that weigh layers against each other (`Policy.cross_layer`) wait for the last,
    and look at the new tokens alone.

    Args:
        embedded: the tokens as they enter the decoder; policy_inputs: completes what was observed.
        ratio: kept share, replaces the config's ratio and budget.

    Raises:
        InputError: the policy cannot go on from what the cache holds.
    """

    def __init__(
        self,
        planners: Planners,
        cache: Cache,
        observer: Observer,
        embedded: DecoderInputs,
        policy_inputs: PolicyInputs,
        ratio: float | None,
    ) -> None:
        self.cache, self.observer = cache, observer
        self.embedded, self.policy_inputs = embedded, policy_inputs
        self.config = planners.config
        self.layers = compressed_layers(cache)
        for held in self.layers:
            held.unpack()  # what is observed is a rectangle; a commit packs it anew
        self.before = [layer.physical for layer in self.layers]
        self.competing = self.config.budget is not None and ratio is None
        self.ratio = self.config.ratio if ratio is None else ratio
        self._check(planners.policy)
        self.rotations = policy_inputs.rotations(embedded.position_ids)
        self.new = observer.labels.counts()
        self.held = self._held_labels()
        self.available = torch.stack([held.media_count for held in self.held], dim=1)
        self.total = self._total()
        if self.competing:
            self.ratio = effective_ratio(self.total, self._offered(), len(self.layers))
        self.is_low = planners.is_low(self.ratio)
        self.planner = planners.at(self.ratio)
        if not self.planner.policy.cross_layer:
            self.budgets = self._budgets([None] * len(self.layers))
        self.waiting: list[Observation] = []
        self._new: dict[torch.device, Tensor] = {}

    def _check(self, policy: Policy) -> None:
        if not any(self.before):
            return
        if policy.queries == "reconstruction":
            raise InputError(f"{policy.name} repeats a whole context and cannot go on from a compressed one")
        if policy.cross_layer and self.competing:
            raise InputError(
                f"{policy.name} weighs layers against each other and cannot go on within an absolute budget; "
                "set a ratio instead",
                field="budget",
            )

    def _held_labels(self) -> list[HeldLabels]:
        """By compressed layer; one for all of them where none holds anything yet."""
        if not any(self.before):
            new = self.observer.labels
            return [HeldLabels(new.host.labels[:, None], 0, [new])] * len(self.layers)
        device = self.embedded.embeds.device
        found = []
        for layer, before in zip(self.layers, self.before, strict=True):
            held = self.observer.held_labels(layer, before)
            planned = held if self.competing else _text_before(held, before)
            maps = [ModalityMap(planned[:, head]).to(device) for head in range(planned.shape[1])]
            found.append(HeldLabels(held, before, maps))
        return found

    def _offered(self) -> Tensor:
        """int64 ``[B, 2]`` entries that there have been to choose from in a layer, the new ones included."""
        before = self.layers[0].candidates
        return self.new if before is None else before.cpu() + self.new

    def _total(self) -> Tensor:
        """int64 ``[B]``: entries that all layers together may keep of those that compete now."""
        count, most = len(self.layers), self.available.sum(-1)
        if self.competing:
            return torch.minimum(torch.full_like(most, (self.config.budget or 0) * count), most)
        total = total_budget(self.ratio, None, count, self._offered())
        total = total - torch.stack([held.kept_before for held in self.held]).sum(0)
        return torch.minimum(total.clamp_min(0), most)

    def __call__(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        if layer.owner and layer.slot is not None:
            real = self.held[layer.slot].real
            observe = self.observer.observe_probe if self.observer.probe else self.observer.observe
            seen = observe(real, query, key, value, scaling)
            rotation = behind(self.rotations[layer.slot], self.before[layer.slot])
            seen = replace(seen, rotation=rotation and rotation.to(key.device))
            if self.planner.policy.cross_layer:
                self.waiting.append(self._new_alone(layer.slot, seen))
            else:
                self._commit(layer.slot, self._plan(layer.slot, seen))
                return
        self.observer.forget_probe(self.cache, layer)

    @cached_property
    def heads(self) -> list[Planner]:
        """The planner of each KV head where heads hold different entries; the same in all layers."""
        return [self.planner.head(index) for index in range(max(len(held.planned) for held in self.held))]

    def _plan(self, slot: int, seen: Observation) -> LayerPlan:
        """The plan of a layer whose budget is settled."""
        maps = [labels.to(seen.keys.device) for labels in self.held[slot].planned]
        if len(maps) == 1:
            return self.planner.compress_layer(slot, seen, maps[0], self.budgets[:, slot], self.ratio)
        # Heads hold different entries: each is planned as if the layer had no other.
        heads = [(self.heads[index], one_head(seen, index), labels) for index, labels in enumerate(maps)]
        budget = self.budgets[:, slot]
        return join_heads([head.compress_layer(slot, one, labels, budget, self.ratio) for head, one, labels in heads])

    def _budgets(self, scores: Sequence[LayerScore | None]) -> Tensor:
        """int64 ``[B, L]``: entries that each layer keeps of those that compete."""
        labels, available = self.observer.labels, self.available
        return self.planner.layer_budgets(scores, labels, self.total, available, self.ratio)

    def finish(self) -> None:
        """Evict what had to wait for the last layer."""
        if not self.waiting:
            return
        labels = self.observer.labels
        waiting = self.policy_inputs.complete(self.waiting, self.cache.layers, self.embedded, [])
        device = self.embedded.embeds.device
        scores = [score.to(device).on_host() for score in self.planner.scores(waiting, labels)]
        self.budgets = self._budgets(scores)
        for slot, seen in enumerate(waiting):
            budget = self.budgets[:, slot]
            plan = self.planner.compress_layer(slot, seen, labels, budget, self.ratio, scores[slot])
            self._commit(slot, self._behind(slot, plan))

    def _new_alone(self, slot: int, seen: Observation) -> Observation:
        """An observation of the new entries only, so that all layers have equally many."""
        first, rotation = self.before[slot], self.rotations[slot]
        return replace(
            seen,
            keys=seen.keys[:, :, first:],
            values=seen.values[:, :, first:],
            query_positions=seen.query_positions - first,
            real=seen.real[:, first:],
            rotation=rotation and rotation.to(seen.keys.device),
        )

    def _behind(self, slot: int, plan: LayerPlan) -> LayerPlan:
        """A plan of the new entries, behind those that stay."""
        first = self.before[slot]
        if not first:
            return plan
        stays = self.held[slot].planned[0].labels[:, None, :first] != Modality.PADDING
        stays = torch.where(stays.to(plan.log_gates.device), 0.0, -torch.inf).to(plan.log_gates)
        gates = torch.cat([stays.expand(-1, plan.log_gates.shape[1], -1), plan.log_gates], dim=-1)
        merged_into = (
            None if plan.merged_into is None else replace(plan.merged_into, index=plan.merged_into.index + first)
        )
        kept = None if plan.kept is None else plan.kept + self.held[slot].real[:, :first].sum(-1)
        return replace(plan, log_gates=gates, merged_into=merged_into, kept=kept)

    def _commit(self, slot: int, plan: LayerPlan) -> None:
        layer = self.layers[slot]
        layer.commit(plan, self.held[slot].on(layer.keys.device), self._new_on(layer.keys.device), self.is_low)

    def _new_on(self, device: torch.device) -> Tensor:
        if device not in self._new:
            self._new[device] = self.new.to(device)
        return self._new[device]


class HeldLabels:
    """The labels of what a layer holds and of the new tokens behind it.

    Args:
        labels: int64 ``[B, 1 or K, N]``, on the CPU; before: entries that the layer held before.
        planned: the labels that the policy sees, of all heads together or one a head.
    """

    def __init__(self, labels: Tensor, before: int, planned: list[ModalityMap]) -> None:
        self.labels, self.before, self.planned = labels, before, planned
        self._on: dict[torch.device, Tensor] = {}

    @cached_property
    def real(self) -> Tensor:
        """bool ``[B, N]``, on the CPU: which entries are no padding; the same in all heads."""
        return self.labels[:, 0] != Modality.PADDING

    @property
    def media_count(self) -> Tensor:
        """int64 ``[B]``: audio and video entries that compete; all heads hold equally many."""
        return self.planned[0].counts().sum(-1)

    @property
    def kept_before(self) -> Tensor:
        """int64 ``[B]``: audio and video entries among those that were held before."""
        return ModalityMap(self.labels[:, 0, : self.before]).counts().sum(-1)

    def on(self, device: torch.device) -> Tensor:
        """int8 ``[B, 1 or K, N]`` on a device."""
        if device not in self._on:
            self._on[device] = self.labels.to(torch.int8).to(device)
        return self._on[device]


def _text_before(labels: Tensor, before: int) -> Tensor:
    """Labels ``[B, 1, N]`` in which what was held before does not compete: it is text.

    Where only padding and text differ from it, all heads are alike.
    """
    old = labels[:, :1, :before]
    kept = (old == Modality.VIDEO) | (old == Modality.AUDIO)
    return torch.cat([old.masked_fill(kept, Modality.TEXT), labels[:, :1, before:]], dim=-1)
