"""KV heads that hold different entries, each as a row of its own: what a policy can score without knowing of it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from acckv.pipeline import LayerPlan
from acckv.rotary import Rotation
from acckv.scoring import Observation


def heads_as_rows(seen: Observation) -> Observation:
    """An observation of B rows and K KV heads as one of B * K rows with a single head."""
    batch, heads = seen.keys.shape[:2]

    def by_row(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(heads, dim=0)

    def by_head(tensor: Tensor) -> Tensor:
        return tensor.reshape(batch * heads, tensor.shape[1] // heads, *tensor.shape[2:])

    rotation = seen.rotation
    if rotation is not None:
        parts = (rotation.cos, rotation.sin, rotation.ahead_cos, rotation.ahead_sin)
        rotation = Rotation(*(by_row(part.expand(batch, *part.shape[1:])) for part in parts))
    return replace(
        seen,
        queries=by_head(seen.queries),
        keys=by_head(seen.keys),
        values=by_head(seen.values),
        row_positions=by_row(seen.row_positions),
        row_valid=by_row(seen.row_valid),
        real=by_row(seen.real),
        rotation=rotation,
        repetition=None if seen.repetition is None else by_head(seen.repetition),
    )


def rows_as_heads(plan: LayerPlan, heads: int) -> LayerPlan:
    """The plan of B * K such rows as one of B rows and K heads."""

    def back(tensor: Tensor) -> Tensor:
        return tensor.reshape(tensor.shape[0] // heads, heads, *tensor.shape[2:])

    pivots = plan.pivots
    if pivots is not None:
        pivots = replace(pivots, index=back(pivots.index), keys=back(pivots.keys), values=back(pivots.values))
    return LayerPlan(back(plan.log_gates), back(plan.keys), back(plan.values), back(plan.bias), pivots)
