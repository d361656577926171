"""Peak memory of a long stream, as the operating system counts it: full cache, a ratio, a fixed budget.

    python -m benchmarks.stream_memory --output benchmarks/results/stream_memory.json

A decoder with random weights is fed an hour of audio and video tokens, chunk by chunk (:meth:`Session.extend`). Every
mode runs in a process of its own; its peak is what the kernel reports for that process (VmHWM). Time and content do not
matter here, only what is held.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from transformers import Qwen2Config, Qwen2ForCausalLM

from acckv import KVCompressor
from acckv.cache.cache import CompressedCache, compressed_layers
from acckv.io.files import whole_file
from acckv.policies import make_policy

FORMAT = 1
#: glibc keeps freed blocks below a threshold that it raises itself, and a cache that grows by concatenation never fits
#: into them again: without a fixed threshold the full cache's peak is many times what it holds.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
#: Audio and video tokens of one second.
VIDEO, AUDIO = 8, 8
HIDDEN = 128


@dataclass
class Row:
    """One mode.

    Attributes:
        mode: 'full', 'ratio' or 'budget', with its value.
        seconds: of the stream; entries: that it offered a layer; held: entries of the longest layer at the end.
        longest: entries of the longest layer at any moment; kv_bytes: of all keys and values at the end.
        rss_before, rss_peak: resident bytes before the stream, and the most there ever were.
        samples: (seconds of stream, resident bytes) along the way.
        took: seconds of work.
    """

    mode: str
    seconds: int
    entries: int
    held: int
    longest: int
    kv_bytes: int
    rss_before: int
    rss_peak: int
    took: float
    samples: list[tuple[int, int]] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write; a PNG of its name beside it")
    parser.add_argument("--seconds", type=int, default=3600, help="length of the stream")
    parser.add_argument("--chunk", type=int, default=8, help="seconds of a chunk")
    parser.add_argument("--ratio", type=float, default=0.05, help="kept share of the mode 'ratio'")
    parser.add_argument("--budget", type=int, default=512, help="entries a layer of the mode 'budget'")
    parser.add_argument("--policy", default="keydiff", help="policy of both")
    parser.add_argument("--quick", action="store_true", help="five minutes of stream instead of an hour")
    parser.add_argument("--mode", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.seconds = min(options.seconds, 300)
    if options.mode:
        print(json.dumps(asdict(stream(options))))
        return
    rows = []
    for mode in ("full", "ratio", "budget"):
        command = [sys.executable, "-m", "benchmarks.stream_memory", *sys.argv[1:], "--mode", mode]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, **ALLOCATOR})
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(line(rows[-1]), flush=True)
    with whole_file(options.output) as file:
        file.write_text(json.dumps({"format": FORMAT, "rows": rows}, indent=1) + "\n")
    plot(rows, options.output.with_suffix(".png"))


def line(row: dict[str, Any]) -> str:
    """A row of the table, sizes in MB."""
    grown = (row["rss_peak"] - row["rss_before"]) / 1e6
    return (
        f"{row['mode']:12} {row['entries']:7} entries a layer, {row['held']:6} held, at most {row['longest']:6}; "
        f"KV {row['kv_bytes'] / 1e6:7.1f}, peak resident {row['rss_peak'] / 1e6:7.1f} (+{grown:.1f}); "
        f"{row['took']:.0f} s"
    )


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Resident memory over the length of the stream."""
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        minutes = [second / 60 for second, _ in row["samples"]]
        axes.plot(minutes, [(held - row["rss_before"]) / 1e6 for _, held in row["samples"]], label=row["mode"])
    axes.set(xlabel="minutes of stream", ylabel="resident memory beyond the start, MB", ylim=(0, None))
    axes.legend()
    with whole_file(file) as partial:
        figure.savefig(partial, dpi=110, format="png")


def resident(name: str) -> int:
    """Bytes that the kernel reports for this process: VmRSS now, VmHWM at most."""
    for entry in Path("/proc/self/status").read_text().splitlines():
        if entry.startswith(name):
            return int(entry.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {name}; run this on Linux")


def decoder() -> Qwen2ForCausalLM:
    """2 layers of 4 heads of 64: 2 KB of keys and values a layer and entry in float32."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=64,  # type: ignore[call-arg]  # a config takes what its model reads
        max_position_embeddings=1 << 20,
    )
    return Qwen2ForCausalLM(config).eval()


def stream(options: argparse.Namespace) -> Row:
    """Feed the whole stream in one mode."""
    torch.set_num_threads(1)
    name = "full" if options.mode == "full" else options.policy
    policy = make_policy({"class_path": name, "init_args": {"share_heads": True}})
    kept: dict[str, Any] = {"full": {}, "ratio": {"ratio": options.ratio}, "budget": {"budget": options.budget}}
    value = {"full": "", "ratio": f" {options.ratio:g}", "budget": f" {options.budget}"}[options.mode]
    model, generator = decoder(), torch.Generator().manual_seed(1)
    kinds = torch.tensor([([1] * VIDEO + [2] * AUDIO) * options.chunk])
    before, start, longest = resident("VmRSS"), time.monotonic(), 0
    samples: list[tuple[int, int]] = []
    cache: CompressedCache | None = None
    with KVCompressor(policy, **kept[options.mode])(model) as session:
        for second in range(0, options.seconds, options.chunk):
            embeds = torch.randn(1, kinds.shape[1], HIDDEN, generator=generator)
            held = 0 if cache is None else max(layer.physical for layer in compressed_layers(cache))
            longest = max(longest, held + kinds.shape[1])
            cache = session.extend({"inputs_embeds": embeds, "modality_ids": kinds}, cache)
            if second // options.chunk % 15 == 0:
                samples.append((second, resident("VmRSS")))
    if cache is None:
        raise SystemExit("--seconds: the stream is empty")
    return Row(
        mode=options.mode + value,
        seconds=options.seconds,
        entries=cache.get_seq_length(),
        held=max(layer.physical for layer in compressed_layers(cache)),
        longest=longest,
        kv_bytes=cache.kv_bytes(),
        rss_before=before,
        rss_peak=resident("VmHWM"),
        took=round(time.monotonic() - start, 1),
        samples=samples,
    )


if __name__ == "__main__":
    main()
