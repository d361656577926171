"""A tiny model under each attention implementation."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from tests import tiny_omni


@cache
def tiny(implementation: str) -> Any:
    return tiny_omni.build(3, implementation)


@pytest.fixture(params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


@pytest.fixture
def eager() -> Any:
    return tiny("eager")
