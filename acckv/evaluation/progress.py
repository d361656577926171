"""What is seen while an evaluation runs."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from rich.console import Console

from acckv.benchmarks.judging import Judge
from acckv.data.records import Record
from acckv.evaluation.journal import Batch, CellAnswers, Journal
from acckv.evaluation.setup import Setup
from acckv.io.progress import Progress


class EvaluationProgress:
    """A progress bar, or a line every minute where the output is no terminal, with running accuracies and bytes saved.

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
        clips = [self.setup.clips[clip] for number in batches for clip in self.setup.members(number)]
        self._seen.begin(0, sum(map(len, clips)) * len(self.setup.cells))
        finished = journal.finished()
        for batch in (finished[number] for number in batches if number in finished):
            for part in batch.parts:
                records = [self.setup.clips[clip][place] for clip, place in part.questions]
                for cell, answers in enumerate(part.cells):
                    self.add(cell, records, answers)
            self.finish(batch)
        self._seen.begin(self._seen.done)

    def add(self, cell: int, records: Sequence[Record], answers: CellAnswers) -> None:
        """Count the answers of a cell to the questions of a prefill."""
        if cell in self._shown and self.console is not None:
            judged = [self.judge(record, text) for record, text in zip(records, answers.texts, strict=True)]
            self._right[cell] += sum(one.score for one in judged)
            self._asked[cell] += len(judged)
            self._bytes[cell] += answers.kv_bytes
        self._seen.advance(len(records))

    def finish(self, batch: Batch) -> None:
        """Count the questions about clips that could not be read: there will be no answers to them."""
        questions = sum(len(self.setup.clips[clip]) for clip, _ in batch.failed)
        self._seen.advance(questions * len(self.setup.cells))

    def state(self) -> str:
        """Running accuracies, and how many of the full cache's bytes are saved."""
        parts = [f"{name} {self._right[n] / self._asked[n]:.1%}" for n, name in self._shown.items() if self._asked[n]]
        last = list(self._shown)[-1]
        if last and self._asked[last] == self._asked[0] and self._bytes[0]:
            parts.append(f"{1 - self._bytes[last] / self._bytes[0]:.0%} of KV bytes saved")
        return ", ".join(parts)
