"""The learned weights of docs/method.md, each a residual over what the training-free preset measures."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from acckv.method.modality import SEGMENT_POSITIONS, ModalityMap

#: Ratio at which the slopes over log ratio have no effect.
REFERENCE_RATIO = 0.1
#: Order of the last axis of `signal_mix`.
SIGNALS = ("attention", "key_diversity", "probe", "saliency")
#: What can be learned, or left at the preset, together.
WEIGHT_GROUPS = {
    "budgets": ("layer_budget", "modality_budget", "head_budget"),
    "gains": ("redistribution", "modality_gain"),
    "probes": ("probe_queries", "signal_mix"),
    "scorer": ("saliency", "saliency_bias", "scorer_hidden", "scorer_bias", "scorer_output"),
    "positions": ("saliency_position",),
    "redundancy": ("redundancy",),
    "merging": ("merge_bias", "merge_gain"),
    "alignment": ("alignment_weight", "alignment_threshold"),
}
#: What an export leaves out where it is zero, as those do that are older than it.
MAY_BE_ABSENT = ("head_budget", "scorer_hidden", "scorer_bias", "scorer_output")


@dataclass(frozen=True)
class LayerWeights:
    """The learned weights of one layer, on the device of that layer's keys.

    Attributes: as those of :class:`CalibratedWeights`, without the first axis.
    """

    modality_budget: Tensor
    head_budget: Tensor
    redistribution: Tensor
    modality_gain: Tensor
    probe_queries: Tensor
    saliency: Tensor
    saliency_bias: Tensor
    saliency_position: Tensor
    scorer_hidden: Tensor
    scorer_bias: Tensor
    scorer_output: Tensor
    signal_mix: Tensor
    redundancy: Tensor
    merge_bias: Tensor
    merge_gain: Tensor
    alignment_weight: Tensor
    alignment_threshold: Tensor

    @cached_property
    def _made(self) -> dict[tuple[Any, ...], Tensor]:
        return {}

    def signal_weights(self, names: tuple[str, ...], base: str, share_heads: bool) -> Tensor:
        """``[S, K or 1, 2]``: the weight of each signal in the score of each head and modality.

        Args:
            base: the signal that the preset reads alone; share_heads: the mean over heads.
        """
        key = (*names, base, share_heads)
        if key not in self._made:
            gain = self.modality_gain.exp()
            gain = gain.mean(0, keepdim=True) if share_heads else gain
            mixed = {name: self.signal_mix[SIGNALS.index(name)].expand_as(gain) for name in names}
            self._made[key] = torch.stack([gain + mix if name == base else mix for name, mix in mixed.items()])
        return self._made[key]

    @cached_property
    def saliency_weight(self) -> Tensor:
        """Of the saliency in the score, a number."""
        return 1 + self.signal_mix[SIGNALS.index("saliency")]

    def scaled_probes(self, scaling: float) -> Tensor:
        """``[Hq, P, D]``: the probe queries times the scaling of attention."""
        if (scaling,) not in self._made:
            self._made[scaling,] = self.probe_queries * scaling
        return self._made[scaling,]

    @cached_property
    def least_square(self) -> Tensor:
        """``[1, 1, 1]``: least squared length of (key, value)."""
        return torch.full((1, 1, 1), 1e-6 * self.saliency.shape[-1], device=self.saliency.device)

    @cached_property
    def by_entry(self) -> Tensor:
        """``[K, 2 * D, 2]``: the linear scorers of (key, value) over their length, one column a modality."""
        return self.saliency.permute(1, 2, 0) * math.sqrt(self.saliency.shape[-1])

    @cached_property
    def scorer_input(self) -> Tensor:
        """``[K, 2 * D, U]``: the hidden layer of the scorer for (key, value) over their length."""
        return self.scorer_hidden * math.sqrt(self.scorer_hidden.shape[1])

    @cached_property
    def by_position(self) -> Tensor:
        """``[K, 8]``: weights of :attr:`ModalityMap.segment_positions`."""
        return torch.cat([self.saliency_position, self.saliency_bias[..., None]], dim=-1).transpose(0, 1).flatten(1)


class CalibratedWeights(nn.Module):
    """Everything that calibration learns besides LoRA; zero everywhere (but the probes) is the training-free preset.

    Args:
        layers: decoder layers L; kv_heads: K; query_heads: Hq; head_size: D; probes: learned queries a head, P;
            units: of the scorer's hidden layer, U.

    Attributes:
        layer_budget: ``[L, 2]`` log share of a layer in the budget, and its slope over log ratio.
        modality_budget: ``[L, 2, 2]`` log shares of (video, audio) inside a layer, and their slopes.
        head_budget: ``[L, 2, K, 2]`` log shares of the heads in each modality's budget, and their slopes.
        redistribution: ``[L]`` added to the exponent gamma.
        modality_gain: ``[L, K, 2]`` log factor on the base score of each modality.
        probe_queries: ``[L, Hq, P, D]`` queries in the space after position embedding.
        saliency: ``[L, 2, K, 2 * D]`` linear scorer on an entry's own (key, value), one for each modality.
        saliency_bias: ``[L, 2, K]``.
        saliency_position: ``[L, 2, K, 3]`` linear scorer on an entry's position in its segment.
        scorer_hidden, scorer_bias, scorer_output: ``[L, K, 2 * D, U]``, ``[L, K, U]`` and ``[L, K, U, 2]``, a network
            on the same (key, value) with an output for each modality, added to the linear scorer.
        signal_mix: ``[L, 4]`` added to the preset's mix of SIGNALS.
        redundancy: ``[L, 2]`` by modality, what a score loses for what better neighbours hold already.
        merge_bias, merge_gain: ``[L, K, 2]`` log mass and relative value gain of merged entries.
        alignment_weight, alignment_threshold: ``[L]``.
    """

    def __init__(
        self, layers: int, kv_heads: int, query_heads: int, head_size: int, probes: int, units: int = 0
    ) -> None:
        super().__init__()
        self.shape = (layers, kv_heads, query_heads, head_size, probes, units)

        def zeros(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*size))

        self.layer_budget = zeros(layers, 2)
        self.modality_budget = zeros(layers, 2, 2)
        self.head_budget = zeros(layers, 2, kv_heads, 2)
        self.redistribution = zeros(layers)
        self.modality_gain = zeros(layers, kv_heads, 2)
        # Drawn on the CPU whatever device is the default: the same start everywhere.
        generator = torch.Generator().manual_seed(0)
        queries = torch.randn(layers, query_heads, probes, head_size, generator=generator, device="cpu")
        self.probe_queries = nn.Parameter(queries.to(self.layer_budget.device))
        self.saliency = zeros(layers, 2, kv_heads, 2 * head_size)
        self.saliency_bias = zeros(layers, 2, kv_heads)
        self.saliency_position = zeros(layers, 2, kv_heads, SEGMENT_POSITIONS)
        hidden = torch.randn(layers, kv_heads, 2 * head_size, units, generator=generator, device="cpu")
        self.scorer_hidden = nn.Parameter(hidden.to(self.layer_budget.device) / math.sqrt(2 * head_size))
        self.scorer_bias = zeros(layers, kv_heads, units)
        self.scorer_output = zeros(layers, kv_heads, units, 2)
        self.signal_mix = zeros(layers, len(SIGNALS))
        self.redundancy = zeros(layers, 2)
        self.merge_bias = zeros(layers, kv_heads, 2)
        self.merge_gain = zeros(layers, kv_heads, 2)
        self.alignment_weight = zeros(layers)
        self.alignment_threshold = zeros(layers)
        self._copies: dict[tuple[int, torch.device], LayerWeights] = {}
        self._copies_of: tuple[list[tuple[int, int]], torch.device] | None = None

    def head(self, index: int) -> CalibratedWeights:
        """The weights of one KV head, as those of a model without another; a copy without gradients."""
        layers, kv_heads, query_heads, head_size, probes, units = self.shape
        group = query_heads // kv_heads
        alone = CalibratedWeights(layers, 1, group, head_size, probes, units)
        axes = dict.fromkeys(("modality_gain", "merge_bias", "merge_gain"), 1)
        axes |= dict.fromkeys(("scorer_hidden", "scorer_bias", "scorer_output"), 1)
        axes |= dict.fromkeys(("head_budget", "saliency", "saliency_bias", "saliency_position"), 2)
        for name, parameter in self.named_parameters():
            whole = parameter.detach()
            if name in axes:
                whole = whole.narrow(axes[name], index, 1)
            elif name == "probe_queries":
                whole = whole.narrow(1, index * group, group)
            alone.get_parameter(name).data = whole
        return alone

    def layer_shares(self, ratio: float, floor: float) -> Tensor:
        """Relative budget of each layer ``[L]``, mean 1: `floor` for every layer, the rest as learned.

        A floor keeps late layers from being starved (EffiVLM-Bench).
        """
        logits = self.layer_budget[:, 0] + self.layer_budget[:, 1] * log_ratio(ratio)
        return floor + (1 - floor) * logits.softmax(0) * logits.shape[0]

    def modality_shares(self, layer: int, measured: Tensor, ratio: float) -> Tensor:
        """The measured split ``[B, 2]`` of a layer's budget, moved by what was learned."""
        budget = self.layer(layer, measured.device).modality_budget
        learned = budget[:, 0] + budget[:, 1] * log_ratio(ratio)
        shares = measured * learned.exp()
        return shares / shares.sum(-1, keepdim=True).clamp_min(1e-12)

    def head_shares(self, layer: int, shares: Tensor, ratio: float) -> Tensor:
        """Relative budgets ``[B, K, 2]`` of a layer's heads and modalities, as learned.

        Args:
            shares: split over the modalities, ``[B, 2]`` or of each head ``[B, K, 2]``.
        """
        budget = self.layer(layer, shares.device).head_budget
        learned = (budget[0] + budget[1] * log_ratio(ratio)).exp()
        return shares.reshape(len(shares), -1, 2) * learned

    def saliency_score(self, layer: int, keys: Tensor, values: Tensor, labels: ModalityMap) -> Tensor:
        """Score of each entry's own key and value and of its position in its segment, ``[B, K, N]``.

        Args:
            keys, values: ``[B, K, N, D]``.
        """
        weights = self.layer(layer, keys.device)
        keys, values = keys.float(), values.float()
        batch, _, _, key_size = keys.shape
        of_key, of_value = torch.linalg.vector_norm(keys, dim=-1), torch.linalg.vector_norm(values, dim=-1)
        squares = torch.addcmul(torch.addcmul(weights.least_square, of_key, of_key), of_value, of_value)
        size = squares.rsqrt()  # the weights hold the square root of how many numbers there are

        def product(matrices: Tensor) -> Tensor:
            """``[B, K, N, X]``: (key, value) times ``[K, 2 * D, X]``; the two side by side would be a copy of both."""
            by_key, by_value = matrices.expand(batch, -1, -1, -1).flatten(0, 1).split([key_size, values.shape[-1]], 1)
            linear = torch.baddbmm(keys.flatten(0, 1) @ by_key, values.flatten(0, 1), by_value)
            return linear.unflatten(0, (batch, -1))

        by_modality = product(weights.by_entry)
        score = weights.by_position @ labels.segment_positions
        if weights.scorer_hidden.shape[-1]:
            scaled = product(weights.scorer_input) * size[..., None]
            hidden = F.gelu(scaled + weights.scorer_bias[:, None])
            score = score + self._of_modality(hidden @ weights.scorer_output, labels)
        return torch.addcmul(score, self._of_modality(by_modality, labels), size)

    @staticmethod
    def _of_modality(by_modality: Tensor, labels: ModalityMap) -> Tensor:
        """``[B, K, N]``: of ``[B, K, N, 2]`` that of each entry's own modality, 0 for others."""
        return (by_modality * labels.masks.transpose(1, 2)[:, None]).sum(-1)

    def layer(self, index: int, device: torch.device) -> LayerWeights:
        """The weights of one layer where that layer is.

        Weights that are trained are views, so that gradients reach them. Of weights that no longer change, copies and
        what is made of them are kept for each device.
        """
        parameters = list(self.parameters())
        if any(parameter.requires_grad or parameter.is_inference() for parameter in parameters):  # no count of changes
            return self._cut(index, device, copy=False)
        changes = [(parameter.data_ptr(), parameter._version) for parameter in parameters], parameters[0].device
        if self._copies_of != changes:
            self._copies, self._copies_of = {}, changes
        if (index, device) not in self._copies:
            self._copies[index, device] = self._cut(index, device, copy=True)
        return self._copies[index, device]

    def _cut(self, index: int, device: torch.device, copy: bool) -> LayerWeights:
        """Kept views would be references, with which torch cannot swap parameters when a module moves.

        What is computed with them is float32 at least, whatever type a user has put the weights in.
        """
        parts = {part.name: getattr(self, part.name)[index] for part in fields(LayerWeights)}
        kind = torch.promote_types(self.merge_bias.dtype, torch.float32)
        return LayerWeights(**{name: part.to(device, kind, copy=copy) for name, part in parts.items()})


def scaled_entries(keys: Tensor, values: Tensor) -> Tensor:
    """Inputs of the scorer ``[..., 2 * D]``: (key, value) of ``[..., D]`` each, over the root of their mean square."""
    entries = torch.cat([keys, values], dim=-1).float()
    return entries * (entries.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


def log_ratio(ratio: float) -> float:
    """Natural logarithm of the ratio over its reference; ratios below 1 in 1000 count as that."""
    return math.log(max(ratio, 1e-3) / REFERENCE_RATIO)
