"""Yes/no questions: what an answer says, and accuracy, precision, recall, F1 and the share of yes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

YesNo = Literal["yes", "no"]


def leading_yes_no(text: str) -> YesNo | None:
    """The yes or no that the first word says; None where it is neither yes nor no."""
    return _said(re.match(r"\W*(yes|no)\b", text, re.IGNORECASE))


def robust_yes_no(text: str) -> YesNo | None:
    """The first "yes" or "no" after the last `</think>`; None where there is neither."""
    return _said(re.search(r"\b(yes|no)\b", text.rpartition("</think>")[2], re.IGNORECASE))


def _said(found: re.Match[str] | None) -> YesNo | None:
    return None if found is None else "yes" if found[1].lower() == "yes" else "no"


class YesNoScores(Metric):
    """Accuracy, precision, recall, F1 (yes is positive) and the share of yes, over all items and by group.

    An answer that says neither is wrong and no yes: it lowers accuracy, and recall where yes was right.

    Args:
        groups: names of the groups, in the order of the columns of `members`.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, groups: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.groups = tuple(groups)
        # [all and each group, right answer (no, yes), answer given (no, yes, neither)]
        empty = torch.zeros(1 + len(self.groups), 2, 3, dtype=torch.long)
        self.add_state("counts", empty, dist_reduce_fx="sum")

    def update(self, answers: Sequence[YesNo | None], right: Sequence[YesNo], members: Tensor | None = None) -> None:
        """Add items.

        Args:
            answers: what each answer says.
            right: the right answers.
            members: [items, groups] bool, whether the item is in the group; None where there are no groups.

        Raises:
            ValueError: lengths that differ, or a word that is neither yes nor no.
        """
        members = torch.zeros(len(answers), 0, dtype=torch.bool) if members is None else members.bool().cpu()
        if members.shape != (len(answers), len(self.groups)):
            raise ValueError(f"expected members [{len(answers)}, {len(self.groups)}], got {tuple(members.shape)}")
        for answer, truth, inside in zip(answers, right, members, strict=True):
            if truth not in ("no", "yes") or answer not in ("no", "yes", None):
                raise ValueError(f"expected yes or no, got {answer!r} where {truth!r} is right")
            rows = torch.cat([torch.ones(1, dtype=torch.bool), inside]).to(self.counts.device)
            self.counts[rows, int(truth == "yes"), ("no", "yes", None).index(answer)] += 1

    def compute(self) -> dict[str, Tensor]:
        """`accuracy`, `precision`, `recall`, `f1`, `yes_rate`, `unparsed`, `n`, and `<group>/accuracy` and so on.

        A quotient whose denominator is 0 is nan.
        """
        result: dict[str, Tensor] = {}
        for row, prefix in zip(self.counts.double(), ("", *(f"{name}/" for name in self.groups)), strict=True):
            (true_no, false_yes, _), (false_no, true_yes, silent) = row
            n = row.sum()
            scores = {
                "accuracy": (true_no + true_yes) / n,
                "precision": true_yes / (true_yes + false_yes),
                "recall": true_yes / (true_yes + false_no + silent),
                "f1": 2 * true_yes / (2 * true_yes + false_yes + false_no + silent),
                "yes_rate": (true_yes + false_yes) / n,
                "unparsed": row[:, 2].sum() / n,
                "n": n.long(),
            }
            result |= {prefix + name: value for name, value in scores.items()}
        return result
