"""Benchmarks by name, open to other packages: their questions, and the scores of answers to them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from acckv.benchmarks.base import Benchmark, Mode, Verdict
from acckv.benchmarks.hub import local_folder
from acckv.data.records import Record
from acckv.errors import InputError
from acckv.io.registry import Registry

BENCHMARKS: Registry[Benchmark] = Registry("benchmark", "acckv.benchmarks")
"""By name. Another package's entry point has the name of its benchmark; see docs/extending.md."""


def register_benchmark(benchmark: Benchmark) -> Benchmark:
    """Make a benchmark known by its name.

    Raises:
        InputError: another module has registered one of this name.
    """
    BENCHMARKS.register(benchmark.name, benchmark, benchmark.load.__module__)
    return benchmark


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by its name or title; case, blanks, `-` and `_` do not matter.

    Raises:
        InputError: an unknown name.
    """
    for known, benchmark in BENCHMARKS.items():
        if _plain(name) in (_plain(known), _plain(benchmark.title)):
            return benchmark
    return BENCHMARKS.find(name)


def load_benchmark(name: str, root: str | Path, split: str | None = None, subset: str | None = None) -> list[Record]:
    """The questions of a benchmark, in file order.

    Args:
        root: its folder, in the layout its authors distribute, or its hub id, `org/name` or `org/name@revision`.
        split: e.g. "test"; None is the benchmark's default.
        subset: a part of it, such as a subtask; None is all.

    Raises:
        InputError: an unknown name, split or subset, a missing file, or a malformed record, with file and field.
    """
    benchmark = find_benchmark(name)
    if split is not None and split not in benchmark.splits:
        known = ", ".join(benchmark.splits) or "nothing: it has no splits"
        raise InputError(f"{benchmark.title} has no split {split!r}; there is {known}", field="split")
    if subset is not None and benchmark.subsets and subset not in benchmark.subsets:
        known = ", ".join(benchmark.subsets)
        raise InputError(f"{benchmark.title} has no subset {subset!r}; there is {known}", field="subset")
    default, root = (benchmark.splits[0] if benchmark.splits else None), local_folder(root)
    records = benchmark.load(root, split or default, subset)
    if not records:
        raise InputError(f"no question of {benchmark.title} with split {split!r} and subset {subset!r}", source=root)
    name, times = Counter(record.id for record in records).most_common(1)[0]
    if times > 1:
        raise InputError(f"question {name!r} is there {times} times", source=root, field="id")
    return records


def judge(name: str, record: Record, answer: str, mode: Mode = "official") -> Verdict:
    """The verdict of a benchmark's parser on one answer."""
    if mode not in ("official", "robust"):
        raise InputError(f"{mode!r} is neither 'official' nor 'robust'", field="mode")
    return find_benchmark(name).judge(record, answer, mode)


def score(name: str, record: Record, answer: str, mode: Mode = "official") -> float:
    """One answer's score, 0..1."""
    return judge(name, record, answer, mode).score


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
