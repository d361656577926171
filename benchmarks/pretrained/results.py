"""The file of results: a row a line, added when it is measured, and tables of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich import box
from rich.table import Table

from acckv.io.json_files import read_json_lines
from acckv.io.typed import Amount, Count, Share, from_json
from acckv.metrics.intervals import bootstrap_mean

FILE = "results.jsonl"


@dataclass(frozen=True)
class Cell:
    """What a row is measured of; each is measured once.

    Attributes:
        decoder: digest of its weights.
        kind, length: of the clips, in tokens; clips: how many.
        system: who compressed, with its release; policy: its method.
        head_budgets: how the heads of a layer share its entries; empty where nothing is chosen or it is not known.
        calibrated_on: the calibration, in words; export: digest of what it learned. Empty where nothing was learned.
        ratio: kept share of the entries that stand for video and audio.
        seed: of random eviction and of the interval.
    """

    decoder: str
    kind: str
    length: Count
    clips: Count
    system: str
    policy: str
    head_budgets: str
    calibrated_on: str
    export: str
    ratio: Share
    seed: Count


@dataclass(frozen=True)
class Row:
    """A measured cell.

    Attributes:
        n: questions.
        accuracy: mean score, 0..1; ci95: its 95 % interval, whole clips drawn with replacement.
        kept: entries held, text included; mean over layers, heads and clips.
        cut: answers that the limit of tokens ended; a plain decoder seldom ends one itself.
        minutes: of its run, shared out evenly over the run's rows.
    """

    cell: Cell
    n: Count
    accuracy: Share
    ci95: tuple[float, float]
    kept: Amount
    cut: Count
    minutes: Amount

    @classmethod
    def of(cls, cell: Cell, scores: Sequence[tuple[int, float]], kept: float, cut: int, minutes: float) -> Row:
        """The row of a cell from (clip, score) of each question."""
        clips, values = zip(*scores, strict=True)
        low, high = bootstrap_mean(torch.tensor(values), torch.tensor(clips), seed=cell.seed)
        mean = sum(values) / len(values)
        return cls(cell, len(values), mean, (low, high), round(kept, 2), cut, round(minutes, 3))


def read_rows(folder: Path) -> list[Row]:
    """The rows that are there; none where there is no file."""
    file = folder / FILE
    return [from_json(Row, values, file) for _, values in read_json_lines(file)] if file.exists() else []


def append_rows(folder: Path, rows: Iterable[Row]) -> None:
    """Add the rows whose cells the file does not have yet."""
    known = {row.cell for row in read_rows(folder)}
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / FILE).open("a", encoding="utf-8") as file:
        for row in rows:
            if row.cell not in known:
                file.write(json.dumps(asdict(row)) + "\n")


def tables(rows: Sequence[Row], notes: Mapping[str, str]) -> list[Table]:
    """A table for each kind, length and decoder: a line a policy, a column a ratio, per cent right.

    Args:
        notes: by kind, in the order of the tables, a text for the title.
    """
    groups: dict[tuple[str, int, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.cell.kind, row.cell.length, row.cell.decoder), []).append(row)
    order = sorted(groups, key=lambda key: (list(notes).index(key[0]), *key))
    return [_table(groups[key], notes[key[0]]) for key in order]


def _table(rows: Sequence[Row], note: str) -> Table:
    first = rows[0].cell
    title = f"{first.kind}: {note}. {first.length} tokens, decoder {first.decoder}; % right, 95 % intervals over clips"
    made = Table(title=title, box=box.SIMPLE_HEAD)
    ratios = sorted({row.cell.ratio for row in rows}, reverse=True)
    for name in ("system", "policy", "head budgets", "calibrated on", "seed", "n"):
        made.add_column(name, no_wrap=True)
    for ratio in ratios:
        made.add_column(f"{ratio:g}", justify="right", no_wrap=True)
    lines: dict[Cell, dict[float, Row]] = {}
    for row in rows:
        lines.setdefault(replace(row.cell, ratio=0.0), {})[row.cell.ratio] = row
    for line, found in lines.items():
        n = next(iter(found.values())).n
        named = (line.system, line.policy, line.head_budgets, line.calibrated_on, str(line.seed), str(n))
        made.add_row(*named, *(_percent(found.get(ratio)) for ratio in ratios))
    return made


def _percent(row: Row | None) -> str:
    return "" if row is None else "{:.1f} ({:.0f}-{:.0f})".format(100 * row.accuracy, *(100 * end for end in row.ci95))
