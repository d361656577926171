"""Where the tests find the checkout and their fixtures."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from tests.support import not_none

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures" / "benchmarks"


def module_at(path: str) -> ModuleType:
    """A script of the checkout that is in no package, as a module."""
    spec = not_none(importlib.util.spec_from_file_location(Path(path).stem, ROOT / path))
    module = importlib.util.module_from_spec(spec)
    not_none(spec.loader).exec_module(module)
    return module
