"""Changes to single values of a benchmark's files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

AV_PART = "av_odyssey_part1.parquet"
MME_TABLE = "videomme/test-00000-of-00001.parquet"


QA, LINES = "qa.json", "dataset/batch-5_1142_20240817.jsonl"
SENSE, COUNT = "worldsense_qa.json", "json/action_count.json"


def edit_json(file: Path, path: list[Any], value: Any) -> None:
    """Set a value deep in a JSON file, or in a line of a `.jsonl` file; `...` takes it away."""
    lines = file.suffix == ".jsonl"
    text = file.read_text()
    data = [json.loads(line) for line in text.splitlines()] if lines else json.loads(text)
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    if value is ...:
        del place[path[-1]]
    file.write_text("\n".join(map(json.dumps, data)) if lines else json.dumps(data))


def edit_table(file: Path, index: int, **values: Any) -> None:
    """Set values of a row of a parquet file."""
    table = parquet.read_table(file)
    rows = table.to_pylist()
    rows[index] |= values
    parquet.write_table(pyarrow.Table.from_pylist(rows, schema=table.schema), file)
