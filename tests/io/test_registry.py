"""A registry names what is known, refuses a taken name, and takes other packages in once, when it is looked at."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from acckv.errors import InputError
from acckv.io.registry import Registry, load_plugins

Install = Callable[[str, str], None]


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Writes an installed package with an entry point: its name, its code."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, code: str) -> None:
        (tmp_path / f"{name}.py").write_text(code)
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text(f"[acckv.sizes]\n{name} = {name}\n")
        importlib.invalidate_caches()

    yield install
    for name in ("shoe", "hat", "broken"):
        sys.modules.pop(name, None)


def test_items_are_found_by_name_and_an_unknown_name_lists_them() -> None:
    sizes = Registry[int]("size", "acckv.sizes")
    sizes.register("small", 1, "a")
    sizes.register("large", 9, "a")
    assert dict(sizes) == {"small": 1, "large": 9} and sizes.find("large") == 9
    with pytest.raises(InputError, match="size: 'huge' is not one of small, large"):
        sizes.find("huge")


def test_a_name_belongs_to_one_module_which_may_register_it_again() -> None:
    sizes = Registry[int]("size", "acckv.sizes")
    sizes.register("small", 1, "notebook")
    sizes.register("small", 2, "notebook")
    with pytest.raises(InputError, match="'small' of other is the name of one of notebook; choose another"):
        sizes.register("small", 3, "other")
    assert sizes["small"] == 2


def test_an_installed_package_is_loaded_at_the_first_look_and_once(
    package: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = Registry[int]("size", "acckv.sizes")
    module = ModuleType("sizes_registry")
    monkeypatch.setattr(module, "sizes", sizes, raising=False)
    monkeypatch.setitem(sys.modules, "sizes_registry", module)
    package("shoe", "from sizes_registry import sizes\nsizes.register('shoe', len(sizes) + 42, __name__)\n")
    assert "shoe" not in sys.modules
    assert sizes.find("shoe") == 42
    package("late", "raise RuntimeError('is loaded though the look was before')")
    assert list(sizes) == ["shoe"]


def test_a_package_that_breaks_or_registers_nothing_is_left_out_with_a_warning(package: Install) -> None:
    sizes = Registry[int]("size", "acckv.sizes")
    sizes.register("small", 1, "a")
    package("broken", "import no_such_library")
    package("hat", "")
    with pytest.warns(UserWarning) as seen:
        assert list(sizes) == ["small"]
    said = sorted(str(warning.message) for warning in seen)
    assert said[0].startswith("size 'broken' of another package is left out (ModuleNotFoundError: No module named 'no_")
    assert said[1] == "size 'hat' of another package is left out (hat registers no size of this name)"


def test_a_plugin_is_a_file_or_a_module_and_is_imported_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    file = tmp_path / "my_plugin_file.py"
    file.write_text(f"open({str(tmp_path / 'log')!r}, 'a').write('ran ')\n")
    load_plugins(str(file))
    load_plugins(["my_plugin_file", str(file)])
    load_plugins(f"{file}, my_plugin_file")
    assert (tmp_path / "log").read_text() == "ran "
    sys.modules.pop("my_plugin_file")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.py", "missing.py: plugins: no such file"),
        ("no_such_package.policies", "'no_such_package.policies' is no module that can be imported, and no .py file"),
        ("json.py", "json.py: plugins: .*json/__init__.py has the name json, too; rename the file"),
    ],
)
def test_a_plugin_that_cannot_be_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "json.py").write_text("")
    with pytest.raises(InputError, match=message):
        load_plugins(name)


def test_an_error_in_a_plugin_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_broken_plugin.py").write_text("1 / 0\n")
    with pytest.raises(ZeroDivisionError):
        load_plugins(str(tmp_path / "my_broken_plugin.py"))
