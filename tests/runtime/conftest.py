"""Tiny models that several tests of the runtime run."""

from __future__ import annotations

import pytest

from tests.families import FAMILIES, Built


@pytest.fixture(scope="module", params=list(FAMILIES))
def built(request: pytest.FixtureRequest) -> Built:
    return FAMILIES[request.param], FAMILIES[request.param].build()


@pytest.fixture(scope="module")
def decoder() -> Built:
    return FAMILIES["videollama2"], FAMILIES["videollama2"].build()
