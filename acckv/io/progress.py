"""Progress of something long: a bar on a terminal, elsewhere a line at least every minute."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

FIRST, EVERY = 10.0, 60.0  # seconds until the first line, and between lines


class Progress:
    """Progress of one task, while its context is open.

    On a terminal it is a bar. Where the output is none (nohup, a batch queue) a thread prints a line every minute, also
    while a single step takes longer than that. Of tasks within tasks the innermost prints.

    Args:
        what: is done, such as "training"; total: how often, None where that is not known.
        unit: what is counted, such as "steps".
        state: gives what else is worth knowing, in words; it is asked when something is shown.
        console: to print to; None is standard output.
        shown: False shows nothing.
        bar: False leaves a terminal to another bar.
        every: seconds between lines.
    """

    _open: list[Progress] = []  # noqa: RUF012 - of the process: the tasks within tasks

    def __init__(
        self,
        what: str,
        total: int | None = None,
        unit: str = "",
        state: Callable[[], str] = str,
        console: Console | None = None,
        shown: bool = True,
        bar: bool = True,
        every: float = EVERY,
    ) -> None:
        self.what, self.total, self.unit, self.state, self.every = what, total, unit, state, every
        self.console = console or Console()
        terminal = self.console.is_terminal
        self._has_bar, self._has_lines = shown and bar and terminal, shown and not terminal
        self.done = self._before = 0
        self._start = time.monotonic()
        self._printed = False
        self._ended = threading.Event()
        counts = (MofNCompleteColumn(), TextColumn(unit)) if total is not None else ()
        columns = (BarColumn(), *counts, TimeElapsedColumn(), TimeRemainingColumn())
        texts = (TextColumn("{task.description}"), *columns, TextColumn("{task.fields[state]}"))
        self._bar = Bar(*texts, console=self.console, disable=not self._has_bar, transient=True)
        self._task = self._bar.add_task(what, total=total, state="")

    def __enter__(self) -> Progress:
        self._start = time.monotonic()
        Progress._open.append(self)
        self._bar.start()
        if self._has_lines:
            threading.Thread(target=self._print_lines, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error is None)

    def close(self, ended_well: bool = True) -> None:
        """End it; more than once does no harm."""
        if self._ended.is_set():
            return
        self._ended.set()
        if self._has_bar:  # rich before 14 ends a bar that is not shown with an empty line
            self._bar.stop()
        Progress._open.remove(self)
        if self._printed and ended_well:
            self._print(self.line())

    def begin(self, done: int, total: int | None = None) -> None:
        """Set what was done before, which no time is measured of, and how much there is."""
        self.done = self._before = done
        self.total = self.total if total is None else total
        self._bar.update(self._task, total=self.total, completed=done)

    def advance(self, count: int = 1) -> None:
        self.done += count
        if self._has_bar:
            self._bar.update(self._task, completed=self.done, state=self.state())

    def line(self) -> str:
        """All of it in words."""
        seconds, done = time.monotonic() - self._start, self.done - self._before
        parts = []
        if self.total is not None:
            parts.append(" ".join(filter(None, (f"{self.done} of {self.total}", self.unit))))
        parts.append(self.state())
        if done:
            parts.append(f"{seconds / done:.3g} s each")
        if done and self.total is not None and self.done < self.total:
            parts.append(f"{in_words(seconds / done * (self.total - self.done))} left")
        parts += [f"{in_words(seconds)} so far", memory_in_words()]
        return f"{self.what}: {', '.join(filter(None, parts))}"

    def _print_lines(self) -> None:
        wait = min(FIRST, self.every)
        while not self._ended.wait(wait):
            wait = self.every
            if Progress._open and Progress._open[-1] is self:
                self._printed = True
                self._print(self.line())

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True, markup=False)
        self.console.file.flush()


def in_words(seconds: float) -> str:
    """A time, roughly."""
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"


def memory_in_words() -> str:
    """The most memory that this process has had, of a GPU where it uses one."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GB of GPU memory"
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GB of memory"
