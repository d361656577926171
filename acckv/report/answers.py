"""The answers of an evaluation, policy against full cache: shares with intervals, and the answers that flipped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from acckv.evaluation.results import FULL, Answer, Setting
from acckv.metrics.intervals import Interval, bootstrap_ratio


class Flip(NamedTuple):
    """An answer that is right from one of two caches only."""

    full: Answer
    compressed: Answer


class Flips(NamedTuple):
    """The answers of one setting that are right from the full cache only, and those from the compressed cache only."""

    lost: list[Flip]
    won: list[Flip]


class Answers:
    """All answers by setting and question's id, in the order they come in."""

    def __init__(self, answers: Iterable[Answer]) -> None:
        self.by_setting: dict[Setting, dict[str, Answer]] = {}
        for answer in answers:
            self.by_setting.setdefault(answer.setting, {})[answer.id] = answer

    @property
    def full(self) -> dict[str, Answer]:
        """The full cache's answers; empty where it was not measured."""
        return self.by_setting.get(Setting(FULL, 1.0), {})

    def share_of_full(self, setting: Setting, seed: int) -> Interval | None:
        """95 % interval of a setting's accuracy as a share of the full cache's, paired by clip.

        None where the setting has no answers or the full cache none that is right.
        """
        pairs = self._paired(setting)
        if not pairs or sum(full.score for full, _ in pairs) <= 0:
            return None
        scores = torch.tensor([compressed.score for _, compressed in pairs])
        reference = torch.tensor([full.score for full, _ in pairs])
        return bootstrap_ratio(scores, reference, torch.tensor([full.clip for full, _ in pairs]), seed=seed)

    def flips(self, setting: Setting) -> Flips:
        """The answers of a setting that are right where the full cache's are wrong, or the other way round."""
        found = [Flip(full, compressed) for full, compressed in self._paired(setting) if full.right != compressed.right]
        return Flips([flip for flip in found if flip.full.right], [flip for flip in found if flip.compressed.right])

    def _paired(self, setting: Setting) -> list[tuple[Answer, Answer]]:
        full = self.full
        return [(full[key], answer) for key, answer in self.by_setting.get(setting, {}).items() if key in full]
