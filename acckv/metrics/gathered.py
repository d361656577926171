"""Metrics that keep their items, and gather those of all processes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat


class GatheredMetric(Metric):
    """A metric whose states are lists of tensors that are joined along the first dimension.

    A process that has seen no item sends an empty tensor of the right type and shape; torchmetrics itself would send
    a float, which does not fit what the others send.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._empty: dict[str, Tensor] = {}

    def add_gathered(self, name: str, empty: Tensor) -> None:
        """A state of the name; `empty` is its value without items."""
        self._empty[name] = empty
        self.add_state(name, [], dist_reduce_fx="cat")

    def gathered(self, name: str) -> Tensor:
        """All items of a state so far, in the order of the updates."""
        parts = getattr(self, name)
        return dim_zero_cat(parts) if len(parts) else self._empty[name].to(self.device)

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        for name, empty in self._empty.items():
            if len(getattr(self, name)) == 0:
                setattr(self, name, [empty.to(self.device)])
        super()._sync_dist(*args, **kwargs)
