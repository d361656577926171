"""ROUGE-L of one free text, and ROUGE-L, BLEU-4 and CIDEr of all, as COCO's caption evaluation defines them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.text import bleu_score
from torchmetrics.utilities import dim_zero_cat

from acckv.errors import InputError

_ROUGE_BETA = 1.2  # weight of recall in COCO's caption evaluation
_CLITIC = r"'(?:s|m|re|ve|ll|d)\b"
_TOKEN = re.compile(
    rf"-[lr][rsc]b-|\w+(?=n't\b)|n't\b|{_CLITIC}|\w+(?:(?:[-./]|(?<=\d),(?=\d)|(?!{_CLITIC})')\w+)*|[^\w\s.,?!:;'\"`\u2018\u2019\u201c\u201d\u2013\u2014-]"
)
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}


def caption_tokens(text: str) -> list[str]:
    """Lower-case words without punctuation, split as COCO's caption evaluation splits them (PTB's tokeniser, in Java).

    "Don't!" is "do", "n't"; "he's" is "he", "'s"; brackets are words such as "-lrb-".
    """
    plain = re.sub(r"\bcannot\b", "can not", text.lower().replace("\u2019", "'"))
    for bracket, name in _BRACKETS.items():
        plain = plain.replace(bracket, f" {name} ")
    return _TOKEN.findall(plain)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """ROUGE-L in 0..1: best precision and best recall of the longest common subsequence of words over references.

    Raises:
        ValueError: no references.
    """
    if not references:
        raise ValueError("ROUGE-L needs a reference")
    given = caption_tokens(prediction)
    wanted = [tokens for tokens in map(caption_tokens, references) if tokens]
    common = [_common_subsequence(given, tokens) for tokens in wanted]
    if not given or not any(common):
        return 0.0
    precision = max(common) / len(given)
    recall = max(length / len(tokens) for length, tokens in zip(common, wanted, strict=True))
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


class CaptionScores(Metric):
    """Scores of free texts against their references: `rouge_l` and `bleu_4` in 0..1, `cider` in 0..10.

    BLEU and CIDEr are of all texts together: a mean over parts of the data would be another number, so that the texts
    themselves are gathered from all processes.

    Args:
        cider: whether to give CIDEr, which needs `pip install 'acckv[captions]'`.

    Raises:
        InputError: CIDEr is asked for, but its library is not installed.
    """

    full_state_update = False
    lines: list[Tensor]

    def __init__(self, *, cider: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if cider and find_spec("pycocoevalcap") is None:
            raise InputError("CIDEr needs pycocoevalcap: pip install 'acckv[captions]'", field="cider")
        self.cider = cider
        self.add_state("lines", [], dist_reduce_fx="cat")

    def update(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
        """Add texts, each with its references.

        Raises:
            ValueError: numbers that differ, or a text without references.
        """
        for prediction, right in zip(predictions, references, strict=True):
            if not right:
                raise ValueError("every text needs a reference")
            line = json.dumps([prediction, list(right)]) + "\n"
            self.lines.append(torch.frombuffer(bytearray(line.encode()), dtype=torch.uint8).to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """`rouge_l`, `bleu_4`, and `cider` if asked for; all nan before the first update."""
        lines = bytes(dim_zero_cat(self.lines).cpu().tolist()) if len(self.lines) else b""
        items = [json.loads(line) for line in lines.splitlines()]
        names = ("rouge_l", "bleu_4", "cider") if self.cider else ("rouge_l", "bleu_4")
        if not items:
            return {name: torch.tensor(float("nan")) for name in names}
        predictions = [" ".join(caption_tokens(prediction)) for prediction, _ in items]
        references = [[" ".join(caption_tokens(text)) for text in right] for _, right in items]
        scores = {
            "rouge_l": torch.tensor([rouge_l(prediction, right) for prediction, right in items]).mean(),
            "bleu_4": bleu_score(predictions, references, n_gram=4),
        }
        return scores | {"cider": torch.tensor(_cider(predictions, references))} if self.cider else scores

    def _sync_dist(self, *args: Any, **kwargs: Any) -> None:
        if len(self.lines) == 0:  # torchmetrics would send a float, which does not fit what the other processes send
            self.lines = [torch.zeros(0, dtype=torch.uint8, device=self.device)]
        super()._sync_dist(*args, **kwargs)


def _cider(predictions: list[str], references: list[list[str]]) -> float:
    from pycocoevalcap.cider.cider import Cider

    texts = {index: [text] for index, text in enumerate(predictions)}
    score, _ = Cider().compute_score(dict(enumerate(references)), texts)
    return float(score)


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for word in first:
        above = row
        row = [0]
        for index, other in enumerate(second):
            row.append(above[index] + 1 if word == other else max(above[index + 1], row[index]))
    return row[-1]
