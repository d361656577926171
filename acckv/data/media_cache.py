"""Decoded clips kept on disk, so that a file is decoded once for many runs."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from acckv.data.media import read_media, read_record_media
from acckv.data.records import Record
from acckv.io.files import whole_file
from acckv.models.clips import Media

FORMAT = 3
"""Of the cached files; to be raised when the reader gives something else for the same file."""
_log = logging.getLogger(__name__)


class MediaCache:
    """A folder with one safetensors file a clip.

    A clip is known by the path, size and time of the last change of each of its files, and by the options it was read
    with; a file that has changed is decoded anew. Cached files are written as a whole and checked by a checksum when
    they are read: one that is damaged is decoded anew and replaced. Several processes may share a folder. Errors are
    not cached; warnings are, and come again with the clip.

    Args:
        folder: made when the first clip is written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def read_media(self, path: str | Path, *, audio: str | Path | None = None, **options: Any) -> Media:
        """As :func:`acckv.data.media.read_media`."""
        files = [Path(path)] if audio is None else [Path(path), Path(audio)]
        return self._read(files, {"call": "media", **options}, lambda: read_media(path, audio=audio, **options))

    def read_record_media(self, record: Record, **options: Any) -> Media:
        """As :func:`acckv.data.media.read_record_media`."""
        files = [record.video, *([record.audio] if record.audio else []), *record.attachments]
        call = {"call": "record", "audio": record.audio is not None, "start": record.start, "end": record.end}
        return self._read(files, {**call, **options}, lambda: read_record_media(record, **options))

    def _read(self, files: Sequence[Path], options: dict[str, Any], read: Callable[[], Media]) -> Media:
        if not all(file.is_file() for file in files):
            return read()  # raises the error that names the file
        key = _key(files, options)
        kept = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        if kept.exists():
            try:
                clip, said = _load(kept, key)
            except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
                _log.warning("%s: damaged (%s); decoding %s anew", kept, error, files[0])
            else:
                _repeat(said)
                return clip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            clip = read()
        said = [str(each.message) for each in caught if each.category is UserWarning]
        _repeat(said)
        with whole_file(kept) as temporary:
            _save(temporary, key, clip, said)
        return clip


def _key(files: Sequence[Path], options: dict[str, Any]) -> str:
    stamps = []
    for file in files:
        status = file.stat()
        stamps.append([str(file.absolute()), status.st_size, status.st_mtime_ns])
    return json.dumps([FORMAT, stamps, sorted(options.items())])


def _repeat(said: Sequence[str]) -> None:
    for message in said:
        warnings.warn(message, stacklevel=4)


def _save(path: Path, key: str, clip: Media, said: Sequence[str]) -> None:
    tensors = {name: value.contiguous() for name, value in vars(clip).items() if isinstance(value, Tensor)}
    values = {name: value for name, value in vars(clip).items() if name not in tensors and value is not None}
    about = json.dumps({**values, "path": str(clip.path), "warnings": said})
    metadata = {"key": key, "clip": about, "checksum": str(_checksum(about, tensors))}
    save_file(tensors, path, metadata=metadata)


def _load(path: Path, key: str) -> tuple[Media, list[str]]:
    """The clip in a file, and the warnings that it was read with.

    Raises:
        ValueError, KeyError, SafetensorError, TypeError: it is damaged, or holds something else.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if metadata["key"] != key:
        raise ValueError("it holds another clip")
    if metadata["checksum"] != str(_checksum(metadata["clip"], tensors)):
        raise ValueError("its checksum is wrong")
    values = {**dict.fromkeys(("frames", "audio")), **json.loads(metadata["clip"]), **tensors}
    values["path"] = Path(values["path"])
    return Media(**{field.name: values[field.name] for field in fields(Media)}), values["warnings"]


def _checksum(text: str, tensors: dict[str, Tensor]) -> int:
    value = zlib.crc32(text.encode())
    for name in sorted(tensors):
        value = zlib.crc32(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode(), value)
        value = zlib.crc32(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data, value)
    return value
