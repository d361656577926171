"""Benchmarks as their authors distribute them: one file each, one record type, one way in.

records = load_benchmark("music_avqa", "MUSIC-AVQA/")
score("music_avqa", records[0], "left", mode="robust")
"""

from acckv.benchmarks import (
    av_odyssey,
    avhbench,
    avqa,
    avsd,
    custom,
    daily_omni,
    music_avqa,
    mvbench,
    omnibench,
    video_mme,
    worldsense,
)
from acckv.benchmarks.base import Benchmark, Mode, Verdict
from acckv.benchmarks.protocols import judge_protocol
from acckv.benchmarks.registry import BENCHMARKS, find_benchmark, judge, load_benchmark, register_benchmark, score

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "Mode",
    "Verdict",
    "find_benchmark",
    "judge",
    "judge_protocol",
    "load_benchmark",
    "register_benchmark",
    "score",
]

_OWN = (
    *(av_odyssey, avhbench, avqa, avsd, custom, daily_omni),
    *(music_avqa, mvbench, omnibench, video_mme, worldsense),
)
for _file in _OWN:
    register_benchmark(_file.BENCHMARK)
