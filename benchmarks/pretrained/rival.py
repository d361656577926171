"""Rows of kvpress, in an environment of its own: it asks for an older transformers than this package."""

from __future__ import annotations

import json
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path

from acckv.errors import InputError
from benchmarks.pretrained.clips import longest_answer, write_tokens
from benchmarks.pretrained.kinds import KINDS, SIZES
from benchmarks.pretrained.results import Row, append_rows
from benchmarks.pretrained.scoring import score
from benchmarks.pretrained.table import Measurement

PACKAGE = "kvpress==0.5.5"
SYSTEM = PACKAGE.replace("==", " ")
SCRIPT = Path(__file__).with_name("kvpress_answers.py")
READY = "ready"

PRESSES = {
    "kvzip": ("kvzip", "joint"),
    "kvzip_layerwise": ("kvzip, layers equal", "joint"),
    "keydiff": ("keydiff", "equal"),
    "adakv_keydiff": ("keydiff", "joint"),
    "snapkv": ("snapkv", "equal"),
    "adakv_snapkv": ("snapkv", "joint"),
    "expected_attention": ("expected_attention", "equal"),
    "adakv_expected_attention": ("expected_attention", "joint"),
}
"""Its presses, as the table names their policy and head budgets."""


def make_environment(folder: Path) -> Path:
    """The Python of an environment that has kvpress, which is made unless it is there.

    Raises:
        InputError: it cannot be installed.
    """
    python = folder / "bin" / "python"
    if not (folder / READY).exists():
        venv.create(folder, clear=True, with_pip=True)
        command = [str(python), "-m", "pip", "install", "--quiet", PACKAGE]
        if subprocess.run(command).returncode:
            raise InputError(f"cannot be installed by {' '.join(command)}", source=PACKAGE)
        (folder / READY).touch()
    return python


def measure_press(given: Measurement, kind: str, press: str, ratios: Sequence[float], python: Path) -> None:
    """Add the rows of a press that are missing, each as soon as it is there.

    Raises:
        InputError: kvpress fails; what it says stands above.
    """
    policy, heads = PRESSES[press]
    cells = given.missing(given.cell(kind, policy, heads, ratio, system=SYSTEM) for ratio in ratios if 0 < ratio < 1)
    if not cells:
        return
    size, tokenizer = SIZES[given.length], given.processor.tokenizer
    file = given.output / "clips" / f"{kind}-{given.length}-{given.clips}.jsonl"
    limit = longest_answer(kind, given.clips, size, tokenizer)
    clips = write_tokens(file, kind, given.clips, size, limit, tokenizer)
    by_ratio = {cell.ratio: cell for cell in cells}
    # -I: nothing that this process was told to import from.
    command = [str(python), "-I", str(SCRIPT), str(given.decoder.resolve()), str(file.resolve()), "--press", press]
    command += ["--ratios", ",".join(f"{ratio:g}" for ratio in by_ratio)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            found = json.loads(line)
            scores = [
                (number, score(KINDS[kind].scored, text, question.answer))
                for number, (clip, texts) in enumerate(zip(clips, found["answers"], strict=True))
                for question, text in zip(clip.questions, texts, strict=True)
            ]
            row = Row.of(by_ratio[found["ratio"]], scores, found["kept"], found["cut"], found["minutes"])
            append_rows(given.output, [row])
    if process.returncode:
        raise InputError(f"{press} ended with exit code {process.returncode}", source=SCRIPT)
