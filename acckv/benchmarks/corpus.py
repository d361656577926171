"""Scores of all answers of one kind together, beside the accuracy that is a mean over single answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec

import torch

from acckv.benchmarks.base import Mode
from acckv.data.records import Record
from acckv.metrics.captions import CaptionScores
from acckv.metrics.yes_no import YesNo, YesNoScores, leading_yes_no, robust_yes_no

CIDER = "CIDEr"
CAPTIONS = {"bleu_4": "BLEU-4", "rouge_l": "ROUGE-L", "cider": CIDER}
YES_NO = {"accuracy": "accuracy", "precision": "precision", "recall": "recall", "f1": "F1", "yes_rate": "share of yes"}
"""Key of a metric's result -> name for readers."""


def corpus_scores(records: Sequence[Record], texts: Sequence[str], mode: Mode) -> dict[str, float | None]:
    """BLEU-4, ROUGE-L and CIDEr of the free texts, and what is usual for the yes/no questions, in all and by group.

    Args:
        records: the questions, of any protocol; texts: the answers to them.
        mode: the parser of yes/no answers.

    Returns:
        By name, in 0..1 (CIDEr in 0..10), None where a denominator is 0. Empty without such questions. CIDEr is left
        out where its library is not installed.
    """
    pairs = list(zip(records, texts, strict=True))
    free = [(record, text) for record, text in pairs if record.protocol == "text"]
    yes_no = [(record, text) for record, text in pairs if record.protocol == "yes_no"]
    scores = _captions(free) if free else {}
    scores |= _yes_no(yes_no, mode) if yes_no else {}
    return {name: None if math.isnan(value) else value for name, value in scores.items()}


def _captions(pairs: Sequence[tuple[Record, str]]) -> dict[str, float]:
    metric = CaptionScores(cider=find_spec("pycocoevalcap") is not None, sync_on_compute=False)
    metric.update([text for _, text in pairs], [record.references or (record.answer,) for record, _ in pairs])
    found = metric.compute()
    return {name: found[key].item() for key, name in CAPTIONS.items() if key in found}


def _yes_no(pairs: Sequence[tuple[Record, str]], mode: Mode) -> dict[str, float]:
    read = leading_yes_no if mode == "official" else robust_yes_no
    groups = list(dict.fromkeys(name for record, _ in pairs for name in record.groups))
    inside = torch.tensor([[name in record.groups for name in groups] for record, _ in pairs], dtype=torch.bool)
    right: list[YesNo] = ["yes" if record.answer == "yes" else "no" for record, _ in pairs]
    metric = YesNoScores(groups, sync_on_compute=False)
    metric.update([read(text) for _, text in pairs], right, inside.reshape(len(pairs), len(groups)))
    found = metric.compute()
    return {
        f"{shown}: {name}": found[start + key].item()
        for start, shown in (("", "yes/no"), *((f"{group}/", group) for group in groups))
        for key, name in YES_NO.items()
    }
