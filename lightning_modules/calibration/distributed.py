"""A step over several processes: the means of one large batch, and the frozen weights split over them (FSDP2)."""

from __future__ import annotations

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard


class StepMean:
    """The weighted mean over all that an optimiser step reads: accumulated batches, and all processes.

    Lightning averages gradients over processes and batches. A loss that is a weighted mean over tokens would then give
    each part the same say, whatever its tokens weigh. So every batch brings weight x mean, and the gradients are
    divided by the weight of the whole step once, before they are clipped.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, weight: Tensor, loss: Tensor, **logged: Tensor) -> Tensor:
        """The loss of a batch as `training_step` returns it.

        Args:
            weight: scalar, of all counted tokens of the batch; loss: scalar, their weighted mean.
            logged: other weighted means over the same tokens.
        """
        for name, value in {"weight": torch.ones_like(weight), "loss": loss, **logged}.items():
            summed = value.detach().double() * weight.detach().double()
            self._sums[name] = self._sums[name] + summed if name in self._sums else summed
        return loss * weight

    def finish(self, module: LightningModule) -> dict[str, Tensor]:
        """Divide the gradients by the step's weight; gives the means over the whole step, by name.

        Call it in `on_before_optimizer_step`; it costs one reduction of a few numbers.
        """
        trainer: Any = module.trainer
        names = list(self._sums)
        totals = trainer.strategy.reduce(torch.stack([self._sums[name] for name in names]), reduce_op="sum")
        self._sums = {}
        sums = dict(zip(names, totals, strict=True))
        weight = sums.pop("weight")
        scale = trainer.accumulate_grad_batches * trainer.world_size / weight  # a number would wait for the device
        shards = is_sharded(module)
        for parameter in module.parameters():
            if parameter.grad is not None:
                if shards:  # DDP has averaged them already
                    parameter.grad = trainer.strategy.reduce(parameter.grad, reduce_op="mean")
                parameter.grad.mul_(scale)
        return {name: total / weight for name, total in sums.items()}


def over_processes(value: Tensor) -> Tensor:
    """Sum over all processes, without gradients."""
    value = value.detach().clone()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value


def shard_frozen(module: nn.Module, decoder: Any, mesh: Any) -> None:
    """Split the frozen weights of each decoder layer; a layer's are gathered while it runs.

    The few trained weights stay as they are, so that checkpoints and the export need no gathering: their values are
    made equal here, and :class:`StepMean` averages their gradients.

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
