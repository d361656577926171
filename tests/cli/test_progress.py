"""What is told while something long runs: a bar or lines, never both, and a line in time whatever a step takes."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from acckv.io.progress import Progress, in_words
from lightning_modules.calibration.progress import TrainingProgress
from tests.calibration.runs import fit


def written(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=200)


def told(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def wait_for(console: Console, start: str, count: int = 2) -> None:
    """Until so many lines begin so: a test that waits for ever fails by its time."""
    while told(console).count(f"{start}: ") < count:
        time.sleep(0.005)


def test_lines_come_by_the_clock_and_the_innermost_task_speaks() -> None:
    console = written(terminal=False)
    with Progress("training", unit="steps", state=lambda: "loss 0.5", console=console, every=0.02) as outer:
        outer.begin(3, 10)
        outer.advance(2)
        wait_for(console, "training")  # in a step that takes longer than a line may
        with Progress("validation", 4, "batches", console=console, every=0.02):
            wait_for(console, "validation")
            between = told(console).splitlines()
    first = re.compile(
        r"training: 5 of 10 steps, loss 0\.5, 0\.0\d+ s each, 0 s left, 0 s so far, \d+\.\d GB of memory"
    )
    kinds = [line.partition(":")[0] for line in between]
    assert kinds == sorted(kinds), "the outer task is silent while the inner one runs"
    assert all(first.fullmatch(line) for line in between if line.startswith("training"))
    assert between[-1].startswith("validation: 0 of 4 batches, ") and " each" not in between[-1]
    after = told(console).splitlines()
    time.sleep(0.05)
    assert after == told(console).splitlines(), "nothing is told after the end"
    assert first.fullmatch(after[-1]) and after[len(between)].startswith("validation: "), "the ends are told"


def test_a_terminal_has_a_bar_and_no_lines() -> None:
    console = written(terminal=True)
    with Progress("training", 2, "steps", console=console, every=0.01) as task:
        task.advance()
        time.sleep(0.05)
    shown = told(console)
    assert "1/2" in shown and "so far" not in shown
    other = written(terminal=True)
    with Progress("training", 2, console=other, every=0.01, bar=False), Progress("x", console=other, shown=False):
        time.sleep(0.05)
    assert told(other) == ""
    quick = written(terminal=False)
    with Progress("training", 2, console=quick):
        pass
    assert told(quick) == "", "what is over at once is not told"


def test_times_in_words() -> None:
    assert [in_words(seconds) for seconds in (3, 90, 5400)] == ["3 s", "1.5 min", "1.5 h"]


def test_a_calibration_tells_step_losses_and_validation(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = TrainingProgress(every_seconds=0.005)
    fit(tmp_path_factory.mktemp("clips"), tmp_path, steps=2, also=[lines], lora_rank=0, validate=1)
    said = [line for line in capsys.readouterr().out.splitlines() if "so far" in line]
    numbers = r"loss \d\S*, kl \d\S*, ratio [\d.]+"
    assert any(re.match(rf"training: [12] of 2 steps, {numbers}, \S+ s each, ", line) for line in said)
    assert any(re.match(r"validation at step 2: \d of 1 batches, ", line) for line in said)
    assert said[0].startswith("loading the model: ")
