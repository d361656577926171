"""Accuracy over questions, its intervals, and its share of the full cache."""

from acckv.metrics.grouped import GroupedAccuracy
from acckv.metrics.intervals import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    clustered_standard_error,
    wilson,
)
from acckv.metrics.relative import PairedComparison
from acckv.metrics.words import word_accuracy

__all__ = [
    "GroupedAccuracy",
    "Interval",
    "PairedComparison",
    "bootstrap_difference",
    "bootstrap_mean",
    "bootstrap_ratio",
    "clustered_standard_error",
    "wilson",
    "word_accuracy",
]
