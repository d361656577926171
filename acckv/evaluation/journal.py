"""What an evaluation has answered so far: one line a batch in the output folder, which survives a kill.

`run.json` says what is asked, of what, under which settings. `journal*.jsonl`, one file a process, gains a line when a
batch of clips is finished; results are made of these lines alone, in the order of the batches. So it does not matter
which process answered a batch, or how often an evaluation was cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from acckv.errors import InputError
from acckv.evaluation.setup import Setup
from acckv.io.files import whole_file

FORMAT = 2
RUN_FILE = "run.json"
JOURNALS = "journal*.jsonl"
_BLOCK = 1 << 16  # bytes


@dataclass(frozen=True)
class CellAnswers:
    """What one cell made of the questions of one prefill.

    Attributes:
        texts: an answer a question.
        kept: video and audio entries that each layer holds, [layers][2]; mean over rows.
        full: video and audio entries before compression, [2]; mean over rows.
        kv_bytes: of all keys and values held, over all rows.
        rows: clips, or with `when: prompt` questions, that were prefilled together.
        cut: of each answer, whether the limit of tokens ended it.
    """

    texts: list[str]
    kept: list[list[float]]
    full: list[float]
    kv_bytes: int
    rows: int
    cut: list[bool]


@dataclass(frozen=True)
class Part:
    """The questions of one prefill, each a clip and a place among its questions, and every cell's answers to them."""

    questions: list[tuple[int, int]]
    cells: list[CellAnswers]


@dataclass(frozen=True)
class Batch:
    """A finished batch.

    Attributes:
        number: of the batch.
        files: size and time of the last change of each clip's media files; a batch is answered anew if they change.
        failed: (clip, why) of each clip that could not be read.
        parts: what was answered.
    """

    number: int
    files: list[list[list[int] | None]]
    failed: list[tuple[int, str]]
    parts: list[Part]


class Journal:
    """The record of one evaluation in its output folder.

    Args:
        folder: output folder of the evaluation; setup: what is evaluated.
        writer: told apart by it are processes that write at the same time.
    """

    def __init__(self, folder: Path, setup: Setup, writer: str = "") -> None:
        self.folder, self.setup = folder, setup
        self.path = folder / f"journal{writer}.jsonl"

    def open(self, overwrite: bool = False) -> None:
        """Begin, or go on with what the folder holds. Call it in one process, before any appends.

        Batches whose media files have changed since are forgotten.

        Args:
            overwrite: discard an evaluation with other settings.

        Raises:
            InputError: the folder holds an evaluation with other settings, or a damaged one.
        """
        kept: list[Batch] = []
        if self.check(overwrite):
            found = read_batches(self.folder, self.setup)
            kept = [batch for batch in found if batch.files == self.setup.files(batch.number)]
            if len(kept) == len(found):
                return
        write_evaluation(self.folder, self.setup, kept)

    def check(self, overwrite: bool = False) -> bool:
        """Whether the folder holds this evaluation already.

        Raises:
            InputError: it holds an evaluation with other settings that is not to be overwritten.
        """
        if not (self.folder / RUN_FILE).exists():
            return False
        try:
            other = read_setup(self.folder).differences(self.setup)
        except InputError as error:
            if not overwrite:
                raise
            other = str(error)
        if other and not overwrite:
            remedy = "take another --output, or discard it with --overwrite true"
            raise InputError(f"holds an evaluation with other settings ({other}); {remedy}", source=self.folder)
        return not other

    def append(self, batch: Batch) -> None:
        """Add a batch; it is on the disk when this returns."""
        with self.path.open("a+b") as file:
            whole = _whole_lines(file)
            file.truncate(whole)  # a kill may have left half a line
            file.write(_line(batch).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())

    def remove_if_empty(self) -> None:
        """Leave nothing behind of an evaluation that came to no answer."""
        if not self.finished():
            for file in [self.folder / RUN_FILE, *self.folder.glob(JOURNALS)]:
                file.unlink()

    def finished(self) -> dict[int, Batch]:
        """Every finished batch by its number, in order, whoever wrote it.

        Raises:
            InputError: a journal is damaged.
        """
        return by_number(read_batches(self.folder, self.setup))


def read_setup(folder: Path) -> Setup:
    """What an output folder's evaluation is about.

    Raises:
        InputError: there is none, or it is of another version.
    """
    file = folder / RUN_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError("no such file; this is no output folder of an evaluation", source=file) from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read ({error}); remove the folder", source=file) from error
    if not isinstance(values, dict) or values.pop("format", None) != FORMAT:
        raise InputError("is of another version; remove the folder", source=file)
    return Setup.from_json(values, file)


def read_batches(folder: Path, setup: Setup) -> list[Batch]:
    """Every batch in an output folder, as written.

    Raises:
        InputError: a line is not what this evaluation writes. A line that was cut off at the end of a file is no error.
    """
    batches = []
    for file in sorted(folder.glob(JOURNALS)):
        *lines, _ = file.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                batch = _batch(json.loads(line))
                setup.check(batch.number, [part.questions for part in batch.parts], [clip for clip, _ in batch.failed])
                if any(len(part.cells) != len(setup.cells) for part in batch.parts):
                    raise ValueError("other rows")
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(f"line {number} is damaged ({error}); remove the file", source=file) from error
            batches.append(batch)
    return batches


def by_number(batches: Iterable[Batch]) -> dict[int, Batch]:
    """Batches in order; of one that was answered twice the later answers."""
    return dict(sorted({batch.number: batch for batch in batches}.items()))


def write_evaluation(folder: Path, setup: Setup, batches: Iterable[Batch]) -> None:
    """Make a folder's evaluation that of `setup` with these batches, in one file. What it held before is discarded."""
    with whole_file(folder / "journal.jsonl") as temporary:
        temporary.write_text("".join(map(_line, batches)), encoding="utf-8")
    for file in folder.glob(JOURNALS):
        if file.name != "journal.jsonl":
            file.unlink()
    with whole_file(folder / RUN_FILE) as temporary:
        values = {"format": FORMAT, **setup.as_json()}
        temporary.write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")


def failed_clips(batches: Iterable[Batch]) -> dict[int, str]:
    """Why each clip that could not be read was not, by clip in order."""
    return dict(sorted(failure for batch in batches for failure in batch.failed))


def _batch(values: dict[str, Any]) -> Batch:
    parts = [
        Part([(clip, place) for clip, place in part["questions"]], [CellAnswers(**cell) for cell in part["cells"]])
        for part in values["parts"]
    ]
    return Batch(values["number"], values["files"], [(clip, error) for clip, error in values["failed"]], parts)


def _line(batch: Batch) -> str:
    return json.dumps(asdict(batch), ensure_ascii=False, allow_nan=False) + "\n"


def _whole_lines(file: BinaryIO) -> int:
    """Bytes of a file up to the end of its last whole line."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK)
        file.seek(start)
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            return start + place + 1
        end = start
    return 0
