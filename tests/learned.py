"""Compressors that learned: with random weights and LoRA, and what they hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from acckv import KVCompressor
from acckv.export import LowRatio
from acckv.method.weights import CalibratedWeights
from acckv.models import find_adapter
from acckv.policies import AccKV, Policy
from acckv.runtime.lora import AttachedLora, LoraWeights, lora_config

CONTEXT = AccKV.preset("context")
QV = ("q_proj", "v_proj")
Learned = KVCompressor | LowRatio | None


def random_lora(model: Any, rank: int = 2, scale: float = 0.1, targets: tuple[str, ...] = QV) -> LoraWeights:
    """Normal values of standard deviation `scale`."""
    adapter = find_adapter(model)
    settings = lora_config(adapter, rank, 2.0 * rank, targets, "tiny")
    attached = AttachedLora(adapter, settings)
    tensors = {name: scale * torch.randn(tensor.shape) for name, tensor in attached.tensors().items()}
    attached.remove()
    return LoraWeights(settings, tensors)


def calibrated(
    model: Any,
    policy: Policy = CONTEXT,
    noise: float = 0.0,
    rank: int = 0,
    targets: tuple[str, ...] = QV,
    **options: Any,
) -> KVCompressor:
    """A compressor with weights as at the start of training, or moved by `noise`, and LoRA if that has a rank."""
    sizes = find_adapter(model).dimensions
    weights = policy.new_weights(**sizes)
    torch.manual_seed(0)
    for parameter in weights.parameters():
        parameter.data += noise * torch.randn_like(parameter)
    lora = random_lora(model, rank, noise, targets) if rank else None
    return KVCompressor(policy, **options, weights=weights, lora=lora, base={"name": "tiny", **sizes}).eval()


def trained(model: Any) -> KVCompressor:
    """A compressor with weights and LoRA that are not at their start."""
    return calibrated(model, AccKV(n_probe_queries=2), noise=0.1, rank=2)


def with_low_ratio(wide: KVCompressor, low: KVCompressor, below: float) -> KVCompressor:
    """The first, with what the second learned for ratios below `below`."""
    low_ratio = LowRatio(below, low.weights, low.lora)
    parts: dict[str, Any] = {"weights": wide.weights, "lora": wide.lora, "base": wide.base, "low_ratio": low_ratio}
    return KVCompressor(wide.policy, **vars(wide.config), **parts).eval()


def weights_of(learned: Learned) -> CalibratedWeights:
    """Its weights, LoRA left out."""
    assert learned is not None and learned.weights is not None
    return learned.weights


def lora_of(learned: Learned) -> dict[str, Tensor]:
    """The tensors of its LoRA, by name."""
    assert learned is not None and learned.lora is not None
    return learned.lora.tensors
