"""A plain folder of videos: which files count, and which are held out for validation."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

from acckv.errors import InputError

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp")


def list_videos(folder: str | Path, field: str = "data.folder") -> list[Path]:
    """The videos of a folder and its subfolders, in alphabetical order; hidden files are left out.

    Raises:
        InputError: no such folder, or no video in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("no such folder", source=folder, field=field)
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    videos = [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not videos:
        raise InputError(f"holds no video ({', '.join(SUFFIXES)})", source=folder, field=field)
    return videos


def hold_out(folder: str | Path, videos: list[Path], share: float) -> tuple[list[Path], list[Path]]:
    """Split videos into (training, validation), by a hash of their names: a video stays where it is as others come.

    Args:
        folder: that the videos are in; where it lies has no influence.
        share: of the videos that are held out, above 0 and below 1; at least one, and never all.

    Raises:
        InputError: one video only.
    """
    if len(videos) < 2:
        message = "holds one video, of which none can be held out; add more, or set data.validation_folder"
        raise InputError(message, source=folder, field="data.folder")
    count = min(max(1, math.floor(share * len(videos))), len(videos) - 1)

    def rank(path: Path) -> str:
        return hashlib.sha256(path.relative_to(folder).as_posix().encode()).hexdigest()

    held = set(sorted(videos, key=rank)[:count])
    return [path for path in videos if path not in held], [path for path in videos if path in held]
