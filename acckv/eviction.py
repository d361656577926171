"""Evicting while a prompt is prefilled: each layer as soon as its attention is done, wherever the policy allows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from acckv.adapters.base import AttentionLayer
from acckv.cache import compressed_layers
from acckv.cache_layer import CompressedLayer
from acckv.errors import InputError
from acckv.focusing import total_budget
from acckv.modality import Modality, ModalityMap
from acckv.pipeline import LayerPlan
from acckv.scoring import Observation
from acckv.watch import Watch

if TYPE_CHECKING:
    from acckv.compressor import KVCompressor


class Eviction:
    """Scores, budgets and commits the layers of one prefill.

    With a ratio, only the new tokens are compressed: what was kept of earlier clips counts as text, and the whole stays
    within ``floor(ratio * L * all entries ever offered)``. With an absolute budget, which does not grow, everything
    held competes anew: that is what bounds a stream.

    A layer's budget needs no score, so each layer is evicted before the next one runs and the peak is one full layer
    plus the compressed rest. Policies that weigh layers against each other (`Policy.cross_layer`) wait for the last.

    Args:
        ratio: kept share, replaces the config's ratio and budget.
        by_probe: whether the policy reads the probe prompt's rows.
    """

    def __init__(
        self, compressor: KVCompressor, cache: Cache, watch: Watch, ratio: float | None, by_probe: bool
    ) -> None:
        self.compressor, self.cache, self.watch, self.by_probe = compressor, cache, watch, by_probe
        self.ratio = ratio
        self.layers = compressed_layers(cache)
        self.competing = compressor.config.budget is not None and ratio is None and compressor.config.policy != "full"
        self.labels = [watch.held_labels(layer, layer.physical) for layer in self.layers]
        self.new = watch.labels.counts()
        self.planning = [self._planning_labels(labels) for labels in self.labels]
        available = torch.stack([_media_count(labels) for labels in self.planning], dim=1)
        total = self._total(available)
        rate = compressor.effective_ratio(total, self._offered(), len(self.layers))
        self.rate = rate if self.competing else (compressor.config.ratio if ratio is None else ratio)
        self.totals = compressor.layer_totals(total, available, self.rate)
        self.waiting: list[Observation] = []

    def _offered(self) -> Tensor:
        """int64 ``[B, 2]`` entries that there have been to choose from in a layer, the new ones included."""
        before = self.layers[0].offered
        return self.new if before is None else before + self.new

    def _total(self, available: Tensor) -> Tensor:
        """int64 ``[B]``: entries that all layers together may keep of those that compete now."""
        count = len(self.layers)
        if self.competing:
            budget = self.compressor.config.budget or 0
            return torch.minimum(torch.full_like(available[:, 0], budget * count), available.sum(-1))
        ratio = self.compressor.config.ratio if self.ratio is None else self.ratio
        if self.compressor.config.policy == "full":
            ratio = 1.0
        kept = [_media_count(layer.labels) for layer in self.layers if layer.labels is not None]
        total = total_budget(ratio, None, count, self._offered())
        total = total - torch.stack(kept).sum(0) if kept else total
        return torch.minimum(total.clamp_min(0), available.sum(-1))

    def _planning_labels(self, labels: Tensor) -> Tensor:
        """The labels that the policy sees: entries that do not compete are text."""
        if self.competing:
            return labels
        old = labels[..., : labels.shape[-1] - self.watch.width]
        kept = (old == Modality.VIDEO) | (old == Modality.AUDIO)
        text = torch.cat([old.masked_fill(kept, Modality.TEXT), labels[..., old.shape[-1] :]], dim=-1)
        return text[:, :1]  # where only padding and text differ from it, all heads are alike

    def __call__(self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        if layer.owner and layer.slot is not None:
            real = self.labels[layer.slot][:, 0] != Modality.PADDING
            look = self.watch.observe_probe if self.by_probe else self.watch.observe
            seen = look(real, query, key, value, scaling)
            if self.compressor.policy.cross_layer:
                self.waiting.append(seen)
            else:
                self._commit(layer.slot, self._plan(layer.slot, seen))
                return
        self.watch.forget_probe(self.cache, layer)

    def finish(self) -> None:
        """Evict what had to wait for the last layer."""
        if not self.waiting:
            return
        if self.competing and self.layers[0].offered is not None:
            raise InputError(
                f"{self.compressor.config.policy} weighs layers against each other and cannot go on within an absolute "
                "budget; set a ratio instead",
                field="budget",
            )
        labels = [ModalityMap(labels[:, 0]) for labels in self.planning]
        scores = [self.compressor.score(slot, seen, labels[slot]) for slot, seen in enumerate(self.waiting)]
        budgets = self.compressor.budgets(scores, self.watch.labels, self.rate)
        for slot, seen in enumerate(self.waiting):
            plan = self.compressor.plan_one(slot, scores[slot], seen, labels[slot], budgets[:, slot])
            self._commit(slot, plan)

    def _plan(self, slot: int, seen: Observation) -> LayerPlan:
        labels, budget = self.planning[slot], self.totals[:, slot]
        heads = labels.shape[1]
        if heads > 1:
            # Heads hold different entries: each is a row of its own.
            if self.compressor.weights is not None:
                raise InputError(
                    "a calibrated compressor whose heads keep different entries cannot go on within an absolute "
                    "budget; set a ratio, or share_heads",
                    field="budget",
                )
            seen, labels, budget = _heads_as_rows(seen), labels.flatten(0, 1), budget.repeat_interleave(heads)
        else:
            labels = labels[:, 0]
        modalities = ModalityMap(labels)
        score = self.compressor.score(slot, seen, modalities)
        split = self.compressor.split(slot, score, budget, modalities.counts(), self.rate)
        plan = self.compressor.plan_one(slot, score, seen, modalities, split)
        return _rows_as_heads(plan, heads) if heads > 1 else plan

    def _commit(self, slot: int, plan: LayerPlan) -> None:
        held: CompressedLayer = self.layers[slot]
        held.commit(plan, self.labels[slot], self.new)


def _media_count(labels: Tensor) -> Tensor:
    """int64 ``[B]``: audio and video entries of the first head; all heads hold equally many."""
    return ModalityMap(labels[:, 0]).counts().sum(-1)


def _heads_as_rows(seen: Observation) -> Observation:
    """An observation of B rows and K heads as one of B * K rows with a single KV head."""
    batch, heads = seen.keys.shape[:2]

    def by_row(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(heads, dim=0)

    def by_head(tensor: Tensor) -> Tensor:
        return tensor.reshape(batch * heads, tensor.shape[1] // heads, *tensor.shape[2:])

    return Observation(
        by_head(seen.queries),
        by_head(seen.keys),
        by_head(seen.values),
        by_row(seen.row_positions),
        by_row(seen.row_valid),
        by_row(seen.real),
        seen.scaling,
    )


def _rows_as_heads(plan: LayerPlan, heads: int) -> LayerPlan:
    def back(tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0] // heads, heads, *tensor.shape[2:])

    return LayerPlan(back(plan.log_gates), back(plan.keys), back(plan.values), back(plan.bias))
