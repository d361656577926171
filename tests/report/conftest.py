"""The results that tables, plots and cards are made from."""

from __future__ import annotations

import pytest

from acckv.evaluation.results import Results
from tests.report.rows import table_row


@pytest.fixture
def results() -> Results:
    rows = [
        table_row("full", 1.0, 0.96),
        table_row("control", 0.0, 0.18),
        table_row("snapkv", 0.2, 0.62),
        table_row("snapkv", 0.05, 0.41),
        table_row("acckv-calibrated", 0.2, 0.95),
        table_row("acckv-calibrated", 0.05, 0.92),
    ]
    return Results("tiny", "generated-clips/test", "context", 7, rows)
