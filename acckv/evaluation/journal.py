"""The journal of an evaluation: one line a finished batch in the output folder, which survives a kill.

`run.json` holds the configuration. `journal*.jsonl`, one file a process, gains a line when a batch of clips is
finished; results are made of these lines alone, in the order of the batches. So it does not matter which process
answered a batch, or how often an evaluation was cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from mmap import ACCESS_READ, mmap
from pathlib import Path

from acckv.benchmarks import Mode
from acckv.errors import InputError
from acckv.evaluation.results import Answer
from acckv.evaluation.run_config import RunConfig
from acckv.evaluation.sizes import Sizes
from acckv.io.files import write_text
from acckv.io.typed import from_json, read_versioned, write_versioned

FORMAT = 3
RUN_FILE = "run.json"
JOURNALS = "journal*.jsonl"


@dataclass(frozen=True)
class Batch:
    """A finished batch of clips.

    Attributes:
        number: of the batch.
        files: size and time of the last change of each clip's media files; a batch is answered anew if they change.
        failed: (clip, why) of each clip that could not be read.
        answers: every setting's to every question about the other clips.
        sizes: of every setting's caches; none where no clip could be read.
    """

    number: int
    files: list[list[list[int] | None]]
    failed: list[tuple[int, str]]
    answers: list[Answer]
    sizes: list[Sizes]


class Journal:
    """The batches of one evaluation in its output folder.

    Args:
        folder: output folder of the evaluation; config: of the evaluation.
        writer: told apart by it are processes that write at the same time.
    """

    def __init__(self, folder: Path, config: RunConfig, writer: str = "") -> None:
        self.folder, self.config = folder, config
        self.path = folder / f"journal{writer}.jsonl"

    def open(self, overwrite: bool = False) -> None:
        """Begin, or go on with what the folder holds. Call it in one process, before any appends.

        Batches whose media files have changed since are forgotten, and answers that another parser judged are judged
        anew.

        Args:
            overwrite: discard an evaluation with other options.

        Raises:
            InputError: the folder holds an evaluation with other options, or a damaged one.
        """
        kept: list[Batch] = []
        if self.check(overwrite):
            found = read_batches(self.folder, self.config.score)
            kept = [batch for batch in found if batch.files == self.config.files(batch.number)]
            if len(kept) == len(found) and read_config(self.folder).score == self.config.score:
                return
        write_evaluation(self.folder, self.config, kept)

    def check(self, overwrite: bool = False) -> bool:
        """Whether the folder holds this evaluation already.

        Raises:
            InputError: it holds an evaluation with other options that is not to be overwritten.
        """
        if not (self.folder / RUN_FILE).exists():
            return False
        try:
            other = read_config(self.folder).differences(self.config)
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
            if file.seek(0, os.SEEK_END):  # a kill may have left half a line
                with mmap(file.fileno(), 0, access=ACCESS_READ) as held:
                    whole = held.rfind(b"\n") + 1
                file.truncate(whole)
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
        return by_number(read_batches(self.folder, self.config.score))


def read_config(folder: Path) -> RunConfig:
    """The configuration of an output folder's evaluation.

    Raises:
        InputError: there is none, or it is of another version.
    """
    file = folder / RUN_FILE
    if not file.exists():
        raise InputError("no such file; this is no output folder of an evaluation", source=file)
    return read_versioned(RunConfig, file, FORMAT, "remove the folder")


def read_batches(folder: Path, score: Mode | None = None) -> list[Batch]:
    """Every batch in an output folder, as written.

    Args:
        score: parser that the answers are judged by, anew where it is another; None leaves them as they are.

    Raises:
        InputError: a line is not what this evaluation writes. A line that was cut off at the end of a file is no error.
    """
    config = read_config(folder)
    batches = []
    for file in sorted(folder.glob(JOURNALS)):
        *lines, _ = file.read_bytes().split(b"\n")
        batches += [_batch(line, config, file, number) for number, line in enumerate(lines, start=1)]
    if score in (None, config.score):
        return batches
    config = replace(config, score=score)
    return [judged_by(config, batch) for batch in batches]


def judged_by(config: RunConfig, batch: Batch) -> Batch:
    """A batch with its answers judged by the parser of `config`."""
    judge = config.judge
    answers = [replace(each, **asdict(judge(config.record(each), each.prediction))) for each in batch.answers]
    return replace(batch, answers=answers)


def by_number(batches: Iterable[Batch]) -> dict[int, Batch]:
    """Batches in order; of one that was answered twice the later answers."""
    return dict(sorted({batch.number: batch for batch in batches}.items()))


def write_evaluation(folder: Path, config: RunConfig, batches: Iterable[Batch]) -> None:
    """Make a folder's evaluation that of `config` with these batches, in one file. What it held before is discarded."""
    write_text(folder / "journal.jsonl", "".join(map(_line, batches)))
    for file in folder.glob(JOURNALS):
        if file.name != "journal.jsonl":
            file.unlink()
    write_versioned(folder / RUN_FILE, config, FORMAT, default=str)


def _batch(line: bytes, config: RunConfig, file: Path, number: int) -> Batch:
    """A line of a journal."""
    try:
        batch = from_json(Batch, json.loads(line), file, f"line {number}")
        if not config.is_whole(batch.number, batch.answers, [clip for clip, _ in batch.failed]):
            raise ValueError("other questions")
        if len(batch.sizes) != (len(config.settings) if batch.answers else 0):
            raise ValueError("other rows")
    except ValueError as error:  # InputError is one
        raise InputError(f"line {number} is damaged ({error}); remove the file", source=file) from error
    return batch


def _line(batch: Batch) -> str:
    return json.dumps(asdict(batch), ensure_ascii=False, allow_nan=False) + "\n"
