"""Read parquet files of questions a few records at a time; every complaint names file, record and field.

Read with pyarrow's file reader. The library `datasets` streams parquet files through Arrow's dataset scanner, whose
threads can abort or hang a process that ends (apache/arrow#45214), after all its work was done.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow
from pyarrow import parquet

from acckv.errors import InputError
from acckv.io.fields import Fields

ROWS_AT_A_TIME = 16
"""Few, since a record may hold its media."""


def read_parquet(files: Sequence[Path], folder: Path, columns: Sequence[str] | None = None) -> Iterator[Fields]:
    """The records of parquet files, one file after the other.

    Args:
        files: to read, in order.
        folder: they were looked for in, for the message where there is none.
        columns: to read; None for all.

    Raises:
        InputError: no file, one that is no parquet file or is cut off, or a column that it lacks.
    """
    if not files:
        raise InputError("no parquet file", source=folder)
    for file in files:
        try:
            table = parquet.ParquetFile(file)
            if missing := set(columns or ()) - set(table.schema_arrow.names):
                raise InputError("no such column", source=file, field=", ".join(sorted(missing)))
            index = 0
            for batch in table.iter_batches(ROWS_AT_A_TIME, columns=columns and list(columns)):
                for values in batch.to_pylist():
                    yield Fields(file, f"record {index}", values)
                    index += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"not a readable parquet file ({error}); is it cut off?", source=file) from error
