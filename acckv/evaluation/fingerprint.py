"""Digests of a model's and a compressor's weights: other weights have another digest."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

_SAMPLED = 64  # values of each tensor of a model


def model_digest(model: Any) -> str:
    """Of names, shapes and a sample of the values of all weights."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        _add(hashed, name, flat[:: max(1, flat.numel() // _SAMPLED)], tensor.shape)
    return hashed.hexdigest()[:16]


def compressor_digest(compressor: Any) -> str:
    """Of everything that a :class:`acckv.KVCompressor` decides by."""
    options = [repr(compressor.policy), asdict(compressor.config), compressor.lora_scope]
    hashed = hashlib.sha256(digest(options).encode())
    tensors = dict(compressor.state_dict())
    for part, one in (("", compressor), ("low_ratio.", compressor.low_ratio)):
        if one is not None and one.lora is not None:
            hashed.update(digest(one.lora.config.to_dict()).encode())
            tensors |= {f"{part}lora.{name}": tensor for name, tensor in one.lora.tensors.items()}
    hashed.update(str(compressor.planners.below).encode())
    for name, tensor in sorted(tensors.items()):
        _add(hashed, name, tensor, tensor.shape)
    return hashed.hexdigest()[:16]


def digest(values: Any) -> str:
    """Of JSON values, and of sets and what else reads as a text."""
    text = json.dumps(
        values, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _add(hashed: Any, name: str, values: Tensor, shape: torch.Size) -> None:
    hashed.update(f"{name} {tuple(shape)} {values.dtype}".encode())
    hashed.update(values.detach().double().cpu().contiguous().numpy().tobytes())
