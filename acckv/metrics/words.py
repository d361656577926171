"""Word accuracy of a description, position by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


def word_hits(prediction: str, reference: str) -> tuple[int, int]:
    """Words of the reference that the prediction has at the same position, and words of the reference.

    Words are split at white space and compared without regard to case. A word too many or too few shifts all that
    follows, which then counts as wrong: the descriptions measured here are read slot by slot.

    Raises:
        ValueError: the reference has no words.
    """
    expected = reference.lower().split()
    if not expected:
        raise ValueError("the reference description has no words")
    given = prediction.lower().split()
    return sum(a == b for a, b in zip(given, expected, strict=False)), len(expected)


def word_accuracy(prediction: str, reference: str) -> float:
    """Share (0..1) of the reference's words that the prediction has at the same position; see `word_hits`."""
    right, total = word_hits(prediction, reference)
    return right / total


class DescriptionWordAccuracy(Metric):
    """Share of all reference words that were right at their position, over all descriptions together.

    Long descriptions weigh more (micro average); for equally long ones it is the mean of `word_accuracy`.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    right: Tensor
    total: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("right", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Sequence[str], references: Sequence[str]) -> None:
        """Add descriptions.

        Raises:
            ValueError: numbers of predictions and references that differ, or a reference without words.
        """
        for prediction, reference in zip(predictions, references, strict=True):
            right, total = word_hits(prediction, reference)
            self.right += right
            self.total += total

    def compute(self) -> Tensor:
        """Share of words right, 0..1; nan before the first update."""
        return self.right / self.total
