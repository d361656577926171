"""Fixtures in the official layout of a benchmark, to be changed by a test."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.paths import FIXTURES


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A copy of a fixture that may be written to; the user's cache is an empty folder."""
    monkeypatch.setenv("ACCKV_CACHE", str(tmp_path / "cache"))
    return lambda name: Path(shutil.copytree(FIXTURES / name, tmp_path / name))
