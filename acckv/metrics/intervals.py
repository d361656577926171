"""95 % intervals for scores whose items come several to a clip.

Questions about one clip share its encoding and its evicted entries, so their errors are correlated: an interval that
takes questions for independent draws is too narrow. Here *clips* are drawn with replacement, each with all its
questions (cluster bootstrap, percentile method; Efron & Tibshirani, "An Introduction to the Bootstrap", 1993).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 2000
_Z95 = 1.959963984540054  # 97.5 % point of the standard normal
_DRAWS_AT_ONCE = 4_000_000  # clip indices held in memory together


class Interval(NamedTuple):
    """Lower and upper end of a 95 % interval; the unit is that of the score."""

    low: float
    high: float


def wilson(successes: float, n: int) -> Interval:
    """Wilson score interval of a proportion.

    Args:
        successes: number of right items, 0..n; may be fractional (items scored by their share of right words).
        n: number of independent items.

    Raises:
        ValueError: `n` is not positive or `successes` is outside 0..n.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"wilson needs 0 <= successes <= n and n > 0, got {successes} of {n}")
    p = successes / n
    z2 = _Z95 * _Z95
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At 0 and 1 the formula gives the bound itself; rounding may miss it by an ulp.
    return Interval(0.0 if p == 0 else centre - half, 1.0 if p == 1 else centre + half)


def bootstrap_mean(scores: Tensor, clips: Tensor, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """95 % interval of a mean score by drawing clips with replacement.

    Where every clip has the same mean (all right, all wrong, or one clip only), resampling sees no spread and would
    claim certainty; the Wilson interval with n = number of clips is given instead, which is wider than the truth.

    Args:
        scores: [items] float in 0..1.
        clips: [items] integer clip label of each item.
        seed: of the draws; the same input and seed give the same interval.

    Raises:
        ValueError: no items, or lengths that differ.
    """
    sums, counts = _per_clip(scores, clips)
    means = sums / counts
    if bool((means - means[0]).abs().max() < 1e-9):
        mean = min(max(float(means[0]), 0.0), 1.0)
        return wilson(mean * means.numel(), means.numel())
    return _percentiles(_resampled_quotient(sums, counts, resamples, seed))


def bootstrap_ratio(
    scores: Tensor, reference: Tensor, clips: Tensor, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """95 % interval of mean(scores) / mean(reference), both on the same items.

    Each draw takes the same clips for numerator and denominator (paired), so what makes a clip hard for both cancels
    and the interval is narrower than one made of two separate ones.

    Args:
        scores: [items] float in 0..1, the policy measured.
        reference: [items] float in 0..1, the full cache on the same items in the same order.
        clips: [items] integer clip label of each item.

    Raises:
        ValueError: no items, lengths that differ, or a reference that is 0 everywhere.
    """
    sums, _ = _per_clip(scores, clips)
    reference_sums, _ = _per_clip(reference, clips)
    if float(reference_sums.sum()) <= 0:
        raise ValueError("the reference is 0 on every item: a share of it is not defined")
    quotients = _resampled_quotient(sums, reference_sums, resamples, seed)
    return _percentiles(quotients[torch.isfinite(quotients)])


def bootstrap_difference(
    scores: Tensor, other: Tensor, clips: Tensor, *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """95 % interval of mean(scores) - mean(other), both on the same items, paired by clip.

    Shapes and errors as `bootstrap_ratio`.
    """
    sums, counts = _per_clip(scores - other, clips)
    return _percentiles(_resampled_quotient(sums, counts, resamples, seed))


def clustered_standard_error(scores: Tensor, clips: Tensor) -> float:
    """Standard error of a mean score whose items come several to a clip, without resampling.

    The cluster-robust ("sandwich") error: the root of `clips / (clips - 1) * sum_c (sum_i in c (score_i - mean))^2`,
    over the number of items (Liang & Zeger, Biometrika 1986; for evaluations of language models Miller,
    arXiv 2411.00640). With one item a clip it is the usual standard error of a mean.

    Args:
        scores: [items] float.
        clips: [items] integer clip label of each item.

    Returns:
        In the unit of the scores; nan where there are fewer than two clips, which show no spread.

    Raises:
        ValueError: no items, or lengths that differ.
    """
    sums, counts = _per_clip(scores, clips)
    number = sums.numel()
    if number < 2:
        return math.nan
    residuals = sums - counts * (sums.sum() / counts.sum())
    return float((number / (number - 1) * residuals.square().sum()).sqrt() / counts.sum())


def _per_clip(scores: Tensor, clips: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of scores and number of items of each clip, [clips] float64 each."""
    if scores.numel() == 0 or scores.shape != clips.shape or scores.dim() != 1:
        raise ValueError(
            f"scores and clips must be equally long and not empty, got {tuple(scores.shape)}, {tuple(clips.shape)}"
        )
    _, index = clips.unique(return_inverse=True)
    number = int(index.max()) + 1
    sums = torch.zeros(number, dtype=torch.float64).index_add_(0, index.cpu(), scores.double().cpu())
    counts = torch.bincount(index.cpu(), minlength=number).double()
    return sums, counts


def _resampled_quotient(numerator: Tensor, denominator: Tensor, resamples: int, seed: int) -> Tensor:
    """[resamples] sum(numerator) / sum(denominator) over clips drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    number = numerator.numel()
    step = max(1, _DRAWS_AT_ONCE // number)
    parts = []
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = torch.randint(number, (rows, number), generator=generator)
        parts.append(numerator[drawn].sum(1) / denominator[drawn].sum(1))
    return torch.cat(parts)


def _percentiles(values: Tensor) -> Interval:
    low, high = torch.quantile(values, torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return Interval(low, high)
