"""The test matrix: ways of generating x families, with the policies and batches of each, from a run of the real tests.

    python -m benchmarks.test_matrix

A cell is the number of tests that passed, of those that ran where some did not. Tests outside the matrix (formats,
metrics, command lines, training) are run by plain `pytest`.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

FILES = ["families", "turns", "stream", "session", "compile"]
#: test -> (way of generating or None for its parameter `mode`, batch); tests of several are in several rows.
ROWS: dict[str, tuple[str | None, str]] = {
    "test_generation_equals_masked_full_attention": (None, "1"),
    "test_left_padded_batch_equals_single_rows": ("greedy", "3, left-padded"),
    "test_half_precision": ("bfloat16 and float16", "1"),
    "test_beams_samples_and_several_returns": ("beams and samples", "1"),
    "test_several_questions_in_one_call": ("several questions", "2 x 2, left-padded"),
    "test_generate_equals_compress_then_answer": ("compress, then answer", "1"),
    "test_evicting_while_prefilling_keeps_what_a_shared_prefill_keeps": ("evicting layer by layer", "1"),
    "test_questions_branch_without_copying": ("several questions", "1 and 3, left-padded"),
    "test_a_conversation_equals_one_masked_forward": ("several turns", "1"),
    "test_a_later_clip_under_plain_generate": ("several turns, generate", "1"),
    "test_a_later_clip_is_merged_into_itself": ("several turns", "1"),
    "test_clips_of_different_length_in_a_later_turn": ("several turns", "2, left-padded"),
    "test_a_stream_equals_one_masked_forward": ("stream", "1"),
    "test_a_stream_in_a_batch": ("stream", "2, left-padded"),
    "test_compiled_decoding": ("torch.compile", "1"),
}
FAMILIES = (
    "qwen2_5_omni",
    "qwen2_5_omni_interleaved",
    "qwen3_omni_moe",
    "gemma4",
    "gemma4_vision_bidirectional",
    "gemma4_unified",
    "videollama2",
    "avicuna",
)
#: Where a test has no parameter for it.
ONE_FAMILY = {"test_session": "qwen2_5_omni", "test_stream": "videollama2"}


class Matrix:
    """A pytest plugin that counts what passed."""

    def __init__(self) -> None:
        self.cells: dict[str, tuple[tuple[str, str], str]] = {}
        self.policies: dict[tuple[str, str], set[str]] = defaultdict(set)
        self.passed: dict[tuple[tuple[str, str], str], int] = defaultdict(int)
        self.ran: dict[tuple[tuple[str, str], str], int] = defaultdict(int)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [item for item in items if item.originalname in ROWS]
        for item in items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            mode, batch = ROWS[item.originalname]
            row = (mode or parameters["mode"], batch)
            families = [value for value in parameters.values() if value in FAMILIES]
            family = families[0] if families else ONE_FAMILY[item.path.stem]
            self.cells[item.nodeid] = (row, family)
            self.policies[row].add(parameters.get("policy", "keydiff"))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call":
            self.ran[self.cells[report.nodeid]] += 1
            self.passed[self.cells[report.nodeid]] += report.passed

    def table(self) -> Table:
        table = Table(title="tests passed")
        for name in ("generation", "batch", "policies", *FAMILIES):
            table.add_column(name, overflow="fold")
        for row in dict.fromkeys(row for row, _ in self.cells.values()):
            numbers = []
            for family in FAMILIES:
                passed, ran = self.passed[row, family], self.ran[row, family]
                numbers.append("" if not ran else str(passed) if passed == ran else f"[red]{passed} of {ran}[/red]")
            table.add_row(*row, str(len(self.policies[row])), *numbers)
        return table


def main() -> int:
    matrix, start = Matrix(), time.monotonic()
    files = [f"tests/test_{name}.py" for name in FILES]
    code = pytest.main(["-q", "-n0", "--no-header", "-m", "slow or not slow", *files, *sys.argv[1:]], plugins=[matrix])
    Console(width=150).print(matrix.table())
    print(f"{sum(matrix.passed.values())} of {sum(matrix.ran.values())} passed in {time.monotonic() - start:.0f} s")
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
