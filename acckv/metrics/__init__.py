"""Accuracy over questions, and its intervals."""

from acckv.metrics.grouped import GroupedAccuracy
from acckv.metrics.intervals import (
    Interval,
    bootstrap_difference,
    bootstrap_mean,
    bootstrap_ratio,
    clustered_standard_error,
    wilson,
)
from acckv.metrics.words import word_accuracy

__all__ = [
    "GroupedAccuracy",
    "Interval",
    "bootstrap_difference",
    "bootstrap_mean",
    "bootstrap_ratio",
    "clustered_standard_error",
    "wilson",
    "word_accuracy",
]
