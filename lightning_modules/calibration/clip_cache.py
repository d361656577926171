"""The clip cache: what the teacher computed of clips, in memory up to a limit, the rest in files that are mapped."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from acckv.data.records import ClipKey
from acckv.errors import InputError
from lightning_modules.calibration.data_config import CacheKind

GB = 1 << 30
HOST = torch.device("cpu")
ClipName = tuple[str, ClipKey]
"""A clip of a split, "train" or "validation": the questions about it may differ."""
Kind = Literal["prefills", "embeddings", "targets"]


class ClipCache:
    """Prefills, embeddings and targets of clips, each an object that holds tensors.

    What no longer fits in memory goes to memory-mapped files. They have no name: the system frees them as soon as the
    process ends, however it does.

    Args:
        keep: data that is kept of a clip. With 'prefill' its targets are, too.
        top_p: share of the teacher's distributions that targets hold.
        limit: GB of memory, of all kinds together; folder: for the files.
        clips: number of clips by split; when all of one are kept, a line says how much that is.
    """

    def __init__(
        self,
        keep: CacheKind = "nothing",
        top_p: float = 1.0,
        limit: float = float("inf"),
        folder: str | Path | None = None,
        clips: dict[str, int] | None = None,
    ) -> None:
        self.keep: CacheKind = keep
        self.top_p, self.limit, self.folder = top_p, limit * GB, Path(folder or tempfile.gettempdir())
        self._untold = dict(clips or {})
        self._held: dict[tuple[Kind, ClipName], tuple[Any, str, int]] = {}  # the value, where it is, its bytes
        self._used = 0

    def holds(self, clips: Sequence[ClipName]) -> bool:
        """Whether clips need not be read again."""
        return self.has("prefills", clips) or self.has("embeddings", clips)

    def has(self, kind: Kind, clips: Sequence[ClipName]) -> bool:
        return all((kind, clip) in self._held for clip in clips)

    def get(self, kind: Kind, clips: Sequence[ClipName]) -> list[Any]:
        return [self._held[kind, clip][0] for clip in clips]

    def put(self, kind: Kind, clips: Sequence[ClipName], values: Sequence[Any]) -> None:
        """Keep a value of each clip.

        Raises:
            InputError: they do not fit in memory, and the disk takes no more.
        """
        for clip, value in zip(clips, values, strict=True):
            self._put(kind, clip, value)
        for split in {split for split, _ in clips}:
            last = {"prefill": "targets", "embeddings": "embeddings"}.get(self.keep)
            count = sum(found == last and clip[0] == split for found, clip in self._held)
            if kind == last and count == self._untold.get(split):
                del self._untold[split]
                rank_zero_only(print)(f"Kept of clips: {self.describe()}.")

    def forget_targets(self) -> None:
        """Forget what the teacher said; what it read stays."""
        for kind, clip in [key for key in self._held if key[0] == "targets"]:
            self._drop(kind, clip)

    def describe(self) -> str:
        """Number and size of what is held, by split and kind."""
        counts, sizes = Counter[str](), Counter[tuple[str, str]]()
        for (kind, (split, _)), (_, where, size) in self._held.items():
            counts[f"{split} {kind}"] += 1
            sizes[f"{split} {kind}", where] += size
        parts = []
        for name, count in counts.items():
            held = [f"{size / GB:.3g} GB {where}" for (of, where), size in sizes.items() if of == name]
            parts.append(f"{name} of {count} ({', '.join(held)})")
        return "; ".join(parts)

    def _put(self, kind: Kind, clip: ClipName, value: Any) -> None:
        self._drop(kind, clip)
        size, where = _tensor_bytes(value), "memory"
        if self._used + size > self.limit:
            where = "on disk"
            if not any(place == where for _, place, _ in self._held.values()):
                limit = f"{self.limit / GB:g} GB of data.cache_memory_gb are full"
                rank_zero_only(print)(f"{limit}: what else is kept of clips goes to files in {self.folder}.")
            value = self._on_disk(value)
        else:
            self._used += size
        self._held[kind, clip] = value, where, size

    def _drop(self, kind: Kind, clip: ClipName) -> None:
        _, where, size = self._held.pop((kind, clip), (None, "", 0))
        self._used -= size if where == "memory" else 0

    def _on_disk(self, value: Any) -> Any:
        """The same, with its tensors in a file."""
        name = ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".clip-cache-", suffix=".pt")
            os.close(handle)
            torch.save(value, name)
            return torch.load(name, mmap=True, weights_only=False)  # no one else had a chance to write it
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"no room for what is kept of clips ({error}); raise it, or set data.cache to embeddings",
                source=self.folder,
                field="data.cache_memory_gb",
            ) from error
        finally:
            if name:
                os.unlink(name)


class _TensorSizes(pickle.Pickler):
    """Meets each tensor of an object once."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.sizes: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.sizes[id(value)] = value.nbytes
        return id(value)


def _tensor_bytes(value: Any) -> int:
    pickler = _TensorSizes()
    pickler.dump(value)
    return sum(pickler.sizes.values())
