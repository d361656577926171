"""Items by name, open to other packages: what the policies, the model families and the benchmarks are kept in."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Generic, TypeVar

from acckv.errors import InputError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Items by name, in the order in which they were registered.

    Installed packages add theirs by an entry point, whose module registers the item of that name when it is imported.
    Entry points are loaded once, at the first look at the items.

    Args:
        kind: of the items, such as "policy": the option that names one, and the word in messages.
        group: of the entry points, such as "acckv.policies".
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind, self.group = kind, group
        self._items: dict[str, T] = {}
        self._origins: dict[str, str] = {}
        self._is_complete = False

    def register(self, name: str, item: T, origin: str) -> None:
        """Add an item; one of the same name and origin is replaced, as when a notebook's cell runs again.

        Args:
            origin: module that the item was written in.

        Raises:
            InputError: the name is taken.
        """
        other = self._origins.get(name, origin)
        if other != origin:
            raise InputError(f"{name!r} of {origin} is the name of one of {other}; choose another", field=self.kind)
        self._items[name], self._origins[name] = item, origin

    def find(self, name: str) -> T:
        """The item of a name.

        Raises:
            InputError: there is none; the message lists the names.
        """
        if name not in self:
            raise InputError(f"{name!r} is not one of {', '.join(self)}", field=self.kind)
        return self[name]

    def __getitem__(self, name: str) -> T:
        self._load()
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._items)

    def __len__(self) -> int:
        self._load()
        return len(self._items)

    def _load(self) -> None:
        if self._is_complete:
            return
        self._is_complete = True
        for point in entry_points(group=self.group):
            try:
                point.load()
            except Exception as error:  # another package's code: whatever it does, the other items are of use
                reason = f"{type(error).__name__}: {error}"
            else:
                reason = "" if point.name in self._items else f"{point.value} registers no {self.kind} of this name"
            if reason:
                warnings.warn(f"{self.kind} {point.name!r} of another package is left out ({reason})", stacklevel=3)


def load_plugins(names: str | Sequence[str]) -> None:
    """Import modules that register policies, families or benchmarks; more than once does no harm.

    Args:
        names: of modules, or paths of `.py` files, separated by commas or in a list. The folder of a file is put at the
            end of `sys.path`, so that the file can be imported by its stem, here and in worker processes.

    Raises:
        InputError: there is no such module or file, or another module has the file's name.
    """
    for name in names.split(",") if isinstance(names, str) else names:
        name = name.strip()
        file = Path(name).resolve() if name.endswith(".py") else None
        if file is not None and not file.is_file():
            raise InputError("no such file", source=name, field="plugins")
        if file is not None and str(file.parent) not in sys.path:
            sys.path.append(str(file.parent))
        module = name if file is None else file.stem
        try:
            spec = find_spec(module)
        except (ModuleNotFoundError, ValueError):  # its package is missing
            spec = None
        if spec is None:
            raise InputError(f"{name!r} is no module that can be imported, and no .py file", field="plugins")
        if file is not None and Path(spec.origin or "").resolve() != file:
            raise InputError(f"{spec.origin} has the name {module}, too; rename the file", source=name, field="plugins")
        import_module(module)
