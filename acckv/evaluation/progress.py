"""The progress of an evaluation while it runs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from acckv.evaluation.journal import Batch, Journal
from acckv.evaluation.results import Answer, Setting
from acckv.evaluation.run_config import RunConfig
from acckv.evaluation.sizes import Sizes
from acckv.io.progress import Progress


class EvaluationProgress(Progress):
    """A progress bar, or a line every minute where the output is no terminal, with running accuracies and bytes saved.

    Shown are the full cache and the last policy at its least ratio; nothing without a console.
    """

    def __init__(self, console: Console | None, config: RunConfig) -> None:
        super().__init__("answering", 0, "answers", self._accuracies, console, shown=console is not None)
        self.config, self._is_silent = config, console is None
        full, last = config.settings[0], config.settings[-1]
        ratios = [each.ratio for each in config.settings if each.policy == last.policy and each.ratio > 0]
        self._last = Setting(last.policy, min(ratios, default=last.ratio))
        self._shown = {full: "full", self._last: str(self._last)} if self._last != full else {full: "full"}
        self._right = dict.fromkeys(self._shown, 0.0)
        self._asked = dict.fromkeys(self._shown, 0)
        self._bytes = dict.fromkeys(self._shown, 0)

    def start(self, batches: Sequence[int], journal: Journal) -> None:
        """Set this process's batches, which are to come; what the journal holds of them counts as done."""
        if self._is_silent:
            return
        clips = [self.config.clips[clip] for number in batches for clip in self.config.members(number)]
        self.begin(0, sum(map(len, clips)) * len(self.config.settings))
        finished = journal.finished()
        for batch in (finished[number] for number in batches if number in finished):
            for setting, sizes in zip(self.config.settings, batch.sizes, strict=False):
                self.add(setting, [answer for answer in batch.answers if answer.setting == setting], sizes)
            self.finish(batch)
        self.begin(self.done)

    def add(self, setting: Setting, answers: Sequence[Answer], sizes: Sizes) -> None:
        """Count a setting's answers, given from caches of these sizes."""
        if setting in self._shown:
            self._right[setting] += sum(answer.score for answer in answers)
            self._asked[setting] += len(answers)
            self._bytes[setting] += sizes.kv_bytes
        self.advance(len(answers))

    def finish(self, batch: Batch) -> None:
        """Count the questions about clips that could not be read: there will be no answers to them."""
        questions = sum(len(self.config.clips[clip]) for clip, _ in batch.failed)
        self.advance(questions * len(self.config.settings))

    def _accuracies(self) -> str:
        """Running accuracies, and how many of the full cache's bytes are saved."""
        parts = [
            f"{name} {self._right[one] / self._asked[one]:.1%}" for one, name in self._shown.items() if self._asked[one]
        ]
        full, last = next(iter(self._shown)), self._last
        if last != full and self._asked[last] == self._asked[full] and self._bytes[full]:
            parts.append(f"{1 - self._bytes[last] / self._bytes[full]:.0%} of KV bytes saved")
        return ", ".join(parts)
