"""KV heads that hold different entries, each seen by itself: what a policy can score without knowing of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from acckv.method.plan import LayerPlan, LayerScore, MergedInto, alike
from acckv.method.scoring import Observation


def one_head(seen: Observation, head: int, real: Tensor) -> Observation:
    """An observation ``[B, K, ...]`` as if the layer had this KV head alone, with the query heads that read it.

    Args:
        real: bool ``[B, N]``, on the CPU: the entries of this head that are no padding.
    """
    group = seen.queries.shape[1] // seen.keys.shape[1]

    def cut(tensor: Tensor, width: int = 1) -> Tensor:
        return tensor[:, head * width : (head + 1) * width]

    return replace(
        seen,
        queries=cut(seen.queries, group),
        keys=cut(seen.keys),
        values=cut(seen.values),
        real=real,
        reconstruction=None if seen.reconstruction is None else cut(seen.reconstruction),
    )


def join_scores(scores: Sequence[LayerScore]) -> LayerScore:
    """The scores of single heads as the score of their layer, with a split of the budget for each head."""
    shares = [score.modality_shares for score in scores if score.modality_shares is not None]
    by_head = torch.stack([each.flatten(1) for each in shares], dim=1) if shares else None
    return LayerScore(torch.cat([score.score for score in scores], dim=1), by_head)


def join_heads(plans: Sequence[LayerPlan]) -> LayerPlan:
    """The plans of single heads as the plan of their layer."""

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(tensors), dim=1)

    merged_into = [plan.merged_into for plan in plans if plan.merged_into is not None]
    kept = [plan.kept for plan in plans if plan.kept is not None]
    return LayerPlan(
        joined([plan.log_gates for plan in plans]),
        joined([plan.merged_keys for plan in plans]),
        joined([plan.merged_values for plan in plans]),
        joined([plan.merged_bias for plan in plans]),
        MergedInto(*(joined([getattr(each, name) for each in merged_into]) for name in ("index", "keys", "values")))
        if merged_into
        else None,
        alike(torch.stack(kept, dim=1)) if kept else None,
    )
