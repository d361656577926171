"""Files and folders of benchmarks, by the names that they may have."""

from __future__ import annotations

from pathlib import Path


def video_folder(root: Path, *names: str) -> Path:
    """The first of some folders of `root` that is there, or `root` itself where videos lie beside the questions."""
    return next((root / name for name in names if (root / name).is_dir()), root)


def first_file(root: Path, *names: str) -> Path:
    """The first of some files of `root` that is there; the first name where none is, for the message."""
    return next((root / name for name in names if (root / name).is_file()), root / names[0])
