"""The learned weights of docs/method.md, each a residual over what the training-free preset measures."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
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
    "scorer": ("saliency", "saliency_bias"),
    "positions": ("saliency_position",),
    "redundancy": ("redundancy",),
    "merging": ("merge_bias", "merge_gain"),
    "alignment": ("alignment_weight", "alignment_threshold"),
}
#: What an export leaves out where it is zero, as those do that are older than it.
MAY_BE_ABSENT = ("head_budget",)


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
    def by_position(self) -> Tensor:
        """``[K, 8]``: weights of :attr:`ModalityMap.segment_positions`."""
        return torch.cat([self.saliency_position, self.saliency_bias[..., None]], dim=-1).transpose(0, 1).flatten(1)


class CalibratedWeights(nn.Module):
    """Everything that calibration learns besides LoRA; zero everywhere (but the probes) is the training-free preset.

    Args:
        layers: decoder layers L; kv_heads: K; query_heads: Hq; head_size: D; probes: learned queries a head, P.

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
        signal_mix: ``[L, 4]`` added to the preset's mix of SIGNALS.
        redundancy: ``[L, 2]`` by modality, what a score loses for what better neighbours hold already.
        merge_bias, merge_gain: ``[L, K, 2]`` log mass and relative value gain of merged entries.
        alignment_weight, alignment_threshold: ``[L]``.
    """

    def __init__(self, layers: int, kv_heads: int, query_heads: int, head_size: int, probes: int) -> None:
        super().__init__()
        self.shape = (layers, kv_heads, query_heads, head_size, probes)

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
        layers, kv_heads, query_heads, head_size, probes = self.shape
        group = query_heads // kv_heads
        alone = CalibratedWeights(layers, 1, group, head_size, probes)
        axes = {"modality_gain": 1, "merge_bias": 1, "merge_gain": 1}
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
        """Linear score of each entry's own key and value and of its position in its segment, ``[B, K, N]``.

        Args:
            keys, values: ``[B, K, N, D]``.
        """
        weights = self.layer(layer, keys.device)
        keys, values = keys.float(), values.float()
        batch, _, _, key_size = keys.shape
        of_key, of_value = torch.linalg.vector_norm(keys, dim=-1), torch.linalg.vector_norm(values, dim=-1)
        squares = torch.addcmul(torch.addcmul(weights.least_square, of_key, of_key), of_value, of_value)
        size = squares.rsqrt()  # the weights hold the square root of how many numbers there are
        # (key, value) side by side would be a copy of both.
        by_key, by_value = (
            weights.by_entry.expand(batch, -1, -1, -1).flatten(0, 1).split([key_size, values.shape[-1]], 1)
        )
        linear = torch.baddbmm(keys.flatten(0, 1) @ by_key, values.flatten(0, 1), by_value).unflatten(0, (batch, -1))
        linear = (linear * labels.masks.transpose(1, 2)[:, None]).sum(-1)
        return torch.addcmul(weights.by_position @ labels.segment_positions, linear, size)

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


def log_ratio(ratio: float) -> float:
    """Natural logarithm of the ratio over its reference; ratios below 1 in 1000 count as that."""
    return math.log(max(ratio, 1e-3) / REFERENCE_RATIO)
