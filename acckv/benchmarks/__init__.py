"""Benchmarks as their authors distribute them: one file each, one record type, one way in.

records = load_benchmark("music_avqa", "MUSIC-AVQA/")
score("music_avqa", records[0], "left", mode="robust")
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from acckv.benchmarks.av_odyssey import AV_ODYSSEY
from acckv.benchmarks.avhbench import AVHBENCH
from acckv.benchmarks.avqa import AVQA
from acckv.benchmarks.avsd import AVSD
from acckv.benchmarks.base import Benchmark, Mode, Verdict
from acckv.benchmarks.custom import CUSTOM
from acckv.benchmarks.daily_omni import DAILY_OMNI
from acckv.benchmarks.hub import local_folder
from acckv.benchmarks.music_avqa import MUSIC_AVQA
from acckv.benchmarks.mvbench import MVBENCH
from acckv.benchmarks.omnibench import OMNIBENCH
from acckv.benchmarks.video_mme import VIDEO_MME
from acckv.benchmarks.worldsense import WORLDSENSE
from acckv.data.records import Record
from acckv.errors import InputError

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        MUSIC_AVQA,
        AVQA,
        AVHBENCH,
        AVSD,
        MVBENCH,
        WORLDSENSE,
        DAILY_OMNI,
        OMNIBENCH,
        AV_ODYSSEY,
        VIDEO_MME,
        CUSTOM,
    )
}

__all__ = ["BENCHMARKS", "Benchmark", "Mode", "Verdict", "find_benchmark", "judge", "load_benchmark", "score"]


def find_benchmark(name: str) -> Benchmark:
    """A benchmark by its name; case, blanks, `-` and `_` do not matter.

    Raises:
        InputError: an unknown name.
    """
    for known, benchmark in BENCHMARKS.items():
        if _plain(name) in (_plain(known), _plain(benchmark.title)):
            return benchmark
    raise InputError(f"{name!r} is not one of {', '.join(BENCHMARKS)}", field="benchmark")


def load_benchmark(name: str, root: str | Path, split: str | None = None, subset: str | None = None) -> list[Record]:
    """The questions of a benchmark, in file order.

    Args:
        name: of the benchmark.
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
    """What a benchmark's parser makes of one answer."""
    if mode not in ("official", "robust"):
        raise InputError(f"{mode!r} is neither 'official' nor 'robust'", field="mode")
    return find_benchmark(name).judge(record, answer, mode)


def score(name: str, record: Record, answer: str, mode: Mode = "official") -> float:
    """One answer's score, 0..1."""
    return judge(name, record, answer, mode).score


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
