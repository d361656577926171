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
from acckv.method.modality import Modality, ModalityMap
from acckv.method.plan import LayerPlan, LayerScore, alike
from acckv.method.scoring import Observation
from acckv.models.base import AttentionLayer
from acckv.models.batching import DecoderInputs
from acckv.planner import Planners, effective_ratio
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
        self.config, self.head_budgets = planners.config, planners.default.head_budgets
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
        if self.competing:
            heads = planners.default.heads(max(len(held.planned) for held in self.held))
            total = self._total(heads, self._available(heads))
            self.ratio = effective_ratio(total, self._offered(), len(self.layers) * heads)
        self.is_low = planners.is_low(self.ratio)
        self.planner = planners.at(self.ratio)
        self.budgets: Tensor | None = None
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
            if self.head_budgets == "equal" and bool((planned == planned[:, :1]).all()):
                planned = planned[:, :1]  # heads that came to hold the same are planned as one
            maps = [ModalityMap(planned[:, head]).to(device) for head in range(planned.shape[1])]
            found.append(HeldLabels(held, before, maps))
        return found

    def _offered(self) -> Tensor:
        """int64 ``[B, 2]`` entries that there have been to choose from in a layer, the new ones included."""
        before = self.layers[0].candidates
        return self.new if before is None else before.cpu() + self.new

    def _available(self, heads: int) -> Tensor:
        """int64 ``[B, L]``: entries that compete in each layer; (head, entry) pairs of more than one of `heads`."""
        return torch.stack([held.competing(heads) for held in self.held], dim=1)

    def _total(self, heads: int, available: Tensor) -> Tensor:
        """int64 ``[B]``: entries that all layers together may keep of those that compete now."""
        count, most = len(self.layers) * heads, available.sum(-1)
        if self.competing:
            return torch.minimum(torch.full_like(most, (self.config.budget or 0) * count), most)
        total = total_budget(self.ratio, None, count, self._offered())
        total = total - torch.stack([held.kept_before(heads) for held in self.held]).sum(0)
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
    def _policies(self) -> list[Policy]:
        """The policy of each KV head where heads hold different entries; the same in all layers."""
        return [self.planner.policy.head(index) for index in range(max(len(held.planned) for held in self.held))]

    def _plan(self, slot: int, seen: Observation) -> LayerPlan:
        """The plan of a layer that need not wait for the others."""
        kv_heads = seen.keys.shape[1]
        if self.budgets is None:
            self.kv_heads, self.budgets = kv_heads, self._budgets([None] * len(self.layers), kv_heads)
        self.planner.heads(self.kv_heads, kv_heads)  # refuses a layer that has others
        labels = self.held[slot].planned
        policies = self._policies if len(labels) > 1 else ()
        return self.planner.compress_layer(slot, seen, labels, self.budgets[:, slot], self.ratio, policies=policies)

    def _budgets(self, scores: Sequence[LayerScore | None], *kv_heads: int) -> Tensor:
        """int64 ``[B, L]``: entries that each layer keeps of those that compete, as of `layer_budgets`."""
        heads = self.planner.heads(*kv_heads)
        available = self._available(heads)
        total = self._total(heads, available)
        return self.planner.layer_budgets(scores, self.observer.labels, total, available, self.ratio, heads)

    def finish(self) -> None:
        """Evict what had to wait for the last layer."""
        if not self.waiting:
            return
        labels = self.observer.labels
        waiting = self.policy_inputs.complete(self.waiting, self.cache.layers, self.embedded, [])
        device = self.embedded.embeds.device
        scores = [score.to(device).on_host() for score in self.planner.scores(waiting, labels)]
        budgets = self._budgets(scores, *(seen.keys.shape[1] for seen in waiting))
        for slot, seen in enumerate(waiting):
            plan = self.planner.compress_layer(slot, seen, [labels], budgets[:, slot], self.ratio, scores[slot])
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
        held = self.held[slot].labels[..., :first] != Modality.PADDING
        stays = torch.where(held.to(plan.log_gates.device), 0.0, -torch.inf).to(plan.log_gates)
        heads = max(stays.shape[1], plan.log_gates.shape[1])
        gates = torch.cat([part.expand(-1, heads, -1) for part in (stays, plan.log_gates)], dim=-1)
        merged_into = (
            None if plan.merged_into is None else replace(plan.merged_into, index=plan.merged_into.index + first)
        )
        kept = None if plan.kept is None else alike(plan.kept.view(len(held), -1) + held.sum(-1))
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
        """bool ``[B, N]``, on the CPU: which entries are no padding; of the first head, where heads differ."""
        return self.labels[:, 0] != Modality.PADDING

    def competing(self, heads: int) -> Tensor:
        """int64 ``[B]``: audio and video entries that compete; (head, entry) pairs of more than one of `heads`."""
        return _over(heads, torch.stack([one.counts().sum(-1) for one in self.planned], dim=1))

    def kept_before(self, heads: int) -> Tensor:
        """int64 ``[B]``: audio and video entries among those that were held before, counted alike."""
        return _over(heads, _is_media(self.labels[..., : self.before]).sum(-1))

    def on(self, device: torch.device) -> Tensor:
        """int8 ``[B, 1 or K, N]`` on a device."""
        if device not in self._on:
            self._on[device] = self.labels.to(torch.int8).to(device)
        return self._on[device]


def _text_before(labels: Tensor, before: int) -> Tensor:
    """Labels ``[B, 1 or K, N]`` in which what was held before does not compete: it is text."""
    was_kept = _is_media(labels)
    was_kept[..., before:] = False
    return labels.masked_fill(was_kept, Modality.TEXT)


def _is_media(labels: Tensor) -> Tensor:
    return (labels == Modality.VIDEO) | (labels == Modality.AUDIO)


def _over(heads: int, counts: Tensor) -> Tensor:
    """The sum of counts ``[B, 1 or K]`` over heads that have budgets of their own; of one, since they are alike."""
    return counts[:, 0] if heads == 1 else counts.expand(-1, heads).sum(-1)
