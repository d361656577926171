"""What a compressor learned, where a test is about one that did."""

from __future__ import annotations

from torch import Tensor

from acckv import KVCompressor
from acckv.export import LowRatio
from acckv.method.weights import CalibratedWeights

Learned = KVCompressor | LowRatio | None


def weights_of(learned: Learned) -> CalibratedWeights:
    """Its weights, LoRA left out."""
    assert learned is not None and learned.weights is not None
    return learned.weights


def lora_of(learned: Learned) -> dict[str, Tensor]:
    """The tensors of its LoRA, by name."""
    assert learned is not None and learned.lora is not None
    return learned.lora.tensors
