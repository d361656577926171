"""What is kept of clips between visits: in memory up to a limit, the rest in files that are read where they lie."""

from __future__ import annotations

import io
import os
import pickle
import tempfile
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from safetensors.torch import load_file, save_file
from torch import Tensor

from acckv.errors import InputError

GB = 1 << 30


class TeacherCache:
    """Prefills, embeddings, targets and outputs of clips, of any objects that hold tensors.

    What no longer fits in memory goes to memory-mapped safetensors files. They have no name: the system frees them as
    soon as the process ends, however it does.

    Args:
        limit: GB of memory, of all kinds together; folder: for the files.
    """

    def __init__(self, limit: float = float("inf"), folder: str | Path | None = None) -> None:
        self.limit, self.folder = limit * GB, Path(folder or tempfile.gettempdir())
        self._values: dict[tuple[str, Hashable], Any] = {}
        self._sizes: dict[tuple[str, Hashable], tuple[str, int]] = {}
        self._used = 0

    def put(self, kind: str, key: Hashable, value: Any) -> None:
        """Keep a value.

        Raises:
            InputError: it does not fit in memory, and the disk takes no more.
        """
        structure, tensors = _taken_apart(value)
        size = sum(tensor.nbytes for tensor in tensors)
        where = "memory"
        if self._used + size > self.limit:
            where = "on disk"
            if not any(place == where for place, _ in self._sizes.values()):
                limit = f"{self.limit / GB:g} GB of data.cache_memory_gb are full"
                rank_zero_only(print)(f"{limit}: what else is kept of clips goes to files in {self.folder}.")
            value = _put_together(structure, self._written(tensors))
        else:
            self._used += size
        self._values[kind, key], self._sizes[kind, key] = value, (where, size)

    def get(self, kind: str, key: Hashable) -> Any:
        return self._values[kind, key]

    def has(self, kind: str, key: Hashable) -> bool:
        return (kind, key) in self._values

    def clear(self, *kinds: str) -> None:
        """Forget all of some kinds."""
        for place in [place for place in self._values if place[0] in kinds]:
            del self._values[place]
            where, size = self._sizes.pop(place)
            self._used -= size if where == "memory" else 0

    def describe(self) -> str:
        """What is held where."""
        counts, sizes = Counter[str](), Counter[tuple[str, str]]()
        for (kind, _), (where, size) in self._sizes.items():
            counts[kind] += 1
            sizes[kind, where] += size
        parts = []
        for kind, count in counts.items():
            held = [f"{size / GB:.3g} GB {where}" for (of, where), size in sizes.items() if of == kind]
            parts.append(f"{kind} of {count} ({', '.join(held)})")
        return "; ".join(parts)

    def _written(self, tensors: list[Tensor]) -> list[Tensor]:
        """The same tensors, in a file."""
        handle, name = -1, ""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, prefix=".teacher-cache-", suffix=".safetensors")
            save_file({str(number): tensor.contiguous().clone() for number, tensor in enumerate(tensors)}, name)
            mapped = load_file(name)
        except Exception as error:  # safetensors has errors of its own for a full disk
            raise InputError(
                f"no room for what is kept of clips ({error}); raise it, or set data.cache to embeddings",
                source=self.folder,
                field="data.cache_memory_gb",
            ) from error
        finally:
            if name:
                os.close(handle)
                os.unlink(name)
        return [mapped[str(number)] for number in range(len(tensors))]


class _Pickler(pickle.Pickler):
    """Of everything but tensors."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: dict[int, tuple[int, Tensor]] = {}

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        return self.tensors.setdefault(id(value), (len(self.tensors), value))[0]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, number: Any) -> Tensor:
        return self.tensors[number]


def _taken_apart(value: Any) -> tuple[bytes, list[Tensor]]:
    """An object without its tensors, and these, each once."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), [tensor for _, tensor in pickler.tensors.values()]


def _put_together(structure: bytes, tensors: list[Tensor]) -> Any:
    return _Unpickler(io.BytesIO(structure), tensors).load()
