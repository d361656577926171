"""What is seen while an evaluation runs."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from acckv.data.records import Record
from acckv.metrics.judging import Judge
from lightning_modules.evaluation_journal import Batch, CellAnswers, Journal
from lightning_modules.evaluation_setup import Setup


class EvaluationProgress:
    """A progress bar, or a line every tenth where the output is no terminal, with running accuracies and bytes saved.

    Shown are the full cache and the last policy at its least ratio.

    Args:
        console: to print to; None shows nothing.
        judge: scores the answers; setup: what is evaluated.
    """

    def __init__(self, console: Console | None, judge: Judge, setup: Setup) -> None:
        self.console, self.judge, self.setup = console, judge, setup
        cells = setup.cells
        policy = cells[-1][0]
        least = min((ratio for name, ratio in cells if name == policy and ratio > 0), default=cells[-1][1])
        self._shown = {0: "full", cells.index((policy, least)): f"{policy} at {least:g}"}
        self._right = dict.fromkeys(self._shown, 0.0)
        self._asked = dict.fromkeys(self._shown, 0)
        self._bytes = dict.fromkeys(self._shown, 0)
        self._done = self._total = 0
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("answers"), TimeElapsedColumn(), TimeRemainingColumn())
        bar_shown = console is not None and console.is_terminal
        texts = (TextColumn("{task.description}"), *columns, TextColumn("{task.fields[state]}"))
        self._bar = Progress(*texts, console=console, disable=not bar_shown)
        self._task = self._bar.add_task("answering", total=None, state="")

    def __enter__(self) -> EvaluationProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def start(self, batches: Sequence[int], journal: Journal) -> None:
        """Set what is to come; what the journal holds of it counts as done.

        Args:
            batches: numbers of this process's batches.
        """
        if self.console is None:
            return
        clips = [self.setup.clips[clip] for number in batches for clip in self.setup.members(number)]
        self._total = sum(map(len, clips)) * len(self.setup.cells)
        self._bar.update(self._task, total=self._total)
        finished = journal.finished()
        for batch in (finished[number] for number in batches if number in finished):
            for part in batch.parts:
                records = [self.setup.clips[clip][place] for clip, place in part.questions]
                for cell, answers in enumerate(part.cells):
                    self.add(cell, records, answers)
            self.finish(batch)

    def add(self, cell: int, records: Sequence[Record], answers: CellAnswers) -> None:
        """Count the answers of a cell to the questions of a prefill."""
        if cell in self._shown and self.console is not None:
            judged = [self.judge(record, text) for record, text in zip(records, answers.texts, strict=True)]
            self._right[cell] += sum(one.score for one in judged)
            self._asked[cell] += len(judged)
            self._bytes[cell] += answers.kv_bytes
        self._advance(len(records))

    def finish(self, batch: Batch) -> None:
        """Count the questions about clips that could not be read: there will be no answers to them."""
        questions = sum(len(self.setup.clips[clip]) for clip, _ in batch.failed)
        self._advance(questions * len(self.setup.cells))

    def state(self) -> str:
        """Running accuracies, and how many of the full cache's bytes are saved."""
        parts = [f"{name} {self._right[n] / self._asked[n]:.1%}" for n, name in self._shown.items() if self._asked[n]]
        last = list(self._shown)[-1]
        if last and self._asked[last] == self._asked[0] and self._bytes[0]:
            parts.append(f"{1 - self._bytes[last] / self._bytes[0]:.0%} of KV bytes saved")
        return ", ".join(parts)

    def _advance(self, count: int) -> None:
        if self.console is None or not count:
            return
        before, self._done = self._done, self._done + count
        self._bar.update(self._task, advance=count, state=self.state())
        if not self.console.is_terminal and 10 * before // self._total < 10 * self._done // self._total:
            line = f"answered {self._done} of {self._total}: {self.state()}"
            self.console.print(line, highlight=False, soft_wrap=True)
