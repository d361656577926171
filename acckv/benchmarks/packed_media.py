"""Media that lie inside parquet files, written out once so that they can be decoded like any other file."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from acckv.data.synthetic.clips import default_root
from acckv.errors import InputError
from acckv.io.fields import Fields
from acckv.io.files import whole_file

SIGNATURES = {
    b"\x89PNG": ".png",
    b"\xff\xd8": ".jpg",
    b"RIFF": ".wav",
    b"ID3": ".mp3",
    b"\xff\xfb": ".mp3",
    b"\xff\xf3": ".mp3",
}
"""Start of a file -> its ending; anything else is taken for a video."""


class PackedMedia:
    """The media of a data set, in a folder of the user's cache.

    Args:
        name: of the benchmark.
        root: of the data set; those of the same name in two places do not share a folder.
    """

    def __init__(self, name: str, root: Path) -> None:
        self.root = root
        self.folder = default_root().parent / name / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:12]

    def file(self, fields: Fields, field: str, value: Any, record: str) -> Path:
        """The file of a path, of bytes, or of both as `datasets` writes them: `{"bytes": .., "path": ..}`.

        Args:
            fields, field: that `value` is from, for messages.
            record: name that no other record of the data set has.

        Raises:
            InputError: another kind of value, or a folder that cannot be written.
        """
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, str):
            return self.root / value
        if not isinstance(value, bytes):
            raise fields.error(field, f"expected bytes or a path, got {type(value).__name__}")
        ending = next((ending for start, ending in SIGNATURES.items() if value.startswith(start)), ".mp4")
        file = self.folder / (re.sub(r"[^\w-]", "_", f"{record}_{field}") + ending)
        try:
            if not file.is_file() or file.stat().st_size != len(value):
                file.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(file) as partial:
                    partial.write_bytes(value)
        except OSError as error:
            raise InputError(f"media inside the parquet files cannot be written here ({error})", source=file) from error
        return file
