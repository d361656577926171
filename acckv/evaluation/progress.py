"""The progress of an evaluation while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console

from acckv.evaluation.journal import Batch, Journal
from acckv.evaluation.results import Answer, Setting
from acckv.evaluation.run_config import RunConfig
from acckv.evaluation.sizes import Sizes
from acckv.io.progress import Progress


class EvaluationProgress:
    """A progress bar, or a line every minute where the output is no terminal, with running accuracies and bytes saved.

    Shown are the full cache and the last policy at its least ratio.

    Args:
        console: to print to; None shows nothing.
        config: of the evaluation.
    """

    def __init__(self, console: Console | None, config: RunConfig) -> None:
        self.console, self.config = console, config
        full, last = config.settings[0], config.settings[-1]
        ratios = [each.ratio for each in config.settings if each.policy == last.policy and each.ratio > 0]
        self._last = Setting(last.policy, min(ratios, default=last.ratio))
        self._shown = {full: "full", self._last: str(self._last)} if self._last != full else {full: "full"}
        self._right = dict.fromkeys(self._shown, 0.0)
        self._asked = dict.fromkeys(self._shown, 0)
        self._bytes = dict.fromkeys(self._shown, 0)
        self._seen = Progress("answering", 0, "answers", self.state, console, shown=console is not None)

    def __enter__(self) -> EvaluationProgress:
        self._seen.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seen.__exit__(kind, error, trace)

    def start(self, batches: Sequence[int], journal: Journal) -> None:
        """Set what is to come; what the journal holds of it counts as done.

        Args:
            batches: numbers of this process's batches.
        """
        if self.console is None:
            return
        clips = [self.config.clips[clip] for number in batches for clip in self.config.members(number)]
        self._seen.begin(0, sum(map(len, clips)) * len(self.config.settings))
        finished = journal.finished()
        for batch in (finished[number] for number in batches if number in finished):
            for setting, sizes in zip(self.config.settings, batch.sizes, strict=False):
                self.add(setting, [answer for answer in batch.answers if answer.setting == setting], sizes)
            self.finish(batch)
        self._seen.begin(self._seen.done)

    def add(self, setting: Setting, answers: Sequence[Answer], sizes: Sizes) -> None:
        """Count a setting's answers, given from caches of these sizes."""
        if setting in self._shown:
            self._right[setting] += sum(answer.score for answer in answers)
            self._asked[setting] += len(answers)
            self._bytes[setting] += sizes.kv_bytes
        self._seen.advance(len(answers))

    def finish(self, batch: Batch) -> None:
        """Count the questions about clips that could not be read: there will be no answers to them."""
        questions = sum(len(self.config.clips[clip]) for clip, _ in batch.failed)
        self._seen.advance(questions * len(self.config.settings))

    def state(self) -> str:
        """Running accuracies, and how many of the full cache's bytes are saved."""
        parts = [
            f"{name} {self._right[one] / self._asked[one]:.1%}" for one, name in self._shown.items() if self._asked[one]
        ]
        full, last = next(iter(self._shown)), self._last
        if last != full and self._asked[last] == self._asked[full] and self._bytes[full]:
            parts.append(f"{1 - self._bytes[last] / self._bytes[full]:.0%} of KV bytes saved")
        return ", ".join(parts)
