"""The frozen decoder's weights split over processes (FSDP2), what is trained whole on each."""

from __future__ import annotations

from typing import Any

import torch.distributed
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard


def shard_frozen(module: nn.Module, decoder: Any, mesh: Any) -> None:
    """Split the frozen weights of each decoder layer; a layer's are gathered while it runs.

    The few trained weights stay as they are, so that checkpoints and the export need no gathering: their values are
    made equal here, and :class:`lightning_modules.calibration.step_mean.StepMean` averages their gradients.

    Args:
        module: whose trained weights are made equal; decoder: with its `layers`; mesh: of the data-parallel processes.
    """
    for parameter in module.parameters():
        if parameter.requires_grad:
            torch.distributed.broadcast(parameter.data, 0)
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, ignored_params={p for p in layer.parameters() if p.requires_grad})


def is_sharded(module: nn.Module) -> bool:
    """Whether a forward needs every process."""
    # Not by its parameters: a layer that has just run may hold them whole.
    return any(isinstance(part, FSDPModule) for part in module.modules())
