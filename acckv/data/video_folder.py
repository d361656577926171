"""Videos of a plain folder, and those of them that are held out for validation."""

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


def hold_out(
    folder: str | Path, videos: list[Path], share: float, remedy: str = "set data.validation_folder"
) -> tuple[list[Path], list[Path]]:
    """Split videos into (training, validation), each by a hash of its own name: no other video has an influence on it.

    So a video stays where it is whatever is added or removed; the share that is held out is about the one asked for.

    Args:
        folder: that the videos are in; where it lies has no influence.
        share: chance of a video to be held out, above 0 and below 1.
        remedy: what to do instead, for the message.

    Raises:
        InputError: one of both is empty, as may be in a small folder; the message has a share that fills both.
    """
    hashes = sorted(_hash(path.relative_to(folder)) for path in videos)
    validation = [path for path in videos if _hash(path.relative_to(folder)) < share]
    training = [path for path in videos if _hash(path.relative_to(folder)) >= share]
    if len(hashes) < 2:
        message = "holds one video, of which none can be held out; add more, or " + remedy
        raise InputError(message, source=folder, field="data.folder")
    if not validation or not training:
        what, other = ("all are", len(videos) - 1) if validation else ("none is", 1)
        fitting = _short_between(hashes[0], hashes[1]) if not validation else _short_between(hashes[-2], hashes[-1])
        message = (
            f"of {len(videos)} videos {what} held out at {share:g} (each by its name alone, so that none moves as "
            f"others come); {fitting} holds out {other}, or {remedy}"
        )
        raise InputError(message, source=folder, field="data.validation_share")
    return training, validation


def _hash(name: Path) -> float:
    """A number of 0..1 that a name alone decides on."""
    return int(hashlib.sha256(name.as_posix().encode()).hexdigest()[:13], 16) / 16**13


def _short_between(low: float, high: float) -> float:
    """A number above `low` and at most `high` with as few digits as can be."""
    for digits in range(1, 16):
        number = math.ceil(low * 10**digits) / 10**digits
        if low < number <= high and number < 1:
            return number
    return high
