"""The figures of :mod:`benchmarks.speed_memory` as tables and curves."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from acckv.io.files import whole_file

#: Around the table that ``--page`` writes.
MARKS = ("<!-- speed: written by benchmarks.speed_memory --page -->", "<!-- end of speed -->")


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    """The table of docs/speed.md, with the command that made it."""
    lines = [
        f"`{command}`\n",
        "| policy | context | batch | step / limit | step / full cache | prefill + | KV bytes | of the full cache |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        held, full = (f"{row[name] / 1e6:.1f} MB" for name in ("kv_bytes", "kv_bytes_full"))
        prefill = "" if row["prefill_overhead"] is None else f"{100 * row['prefill_overhead']:.2f} %"
        place = f"| {row['policy']} | {row['context']:,} | {row['batch']} "
        steps = f"| {row['decode_vs_limit']:.2f} | {row['decode_vs_full']:.2f} "
        lines.append(f"{place}{steps}| {prefill} | {held} | {full} |")
    return "\n".join(lines) + "\n"


def table(rows: list[dict[str, Any]]) -> Table:
    """The rows, sizes in MB."""
    shown = Table(title="medians; decode and prefill as ratios of the same run, sizes in MB")
    for name in (
        "policy",
        "context",
        "batch",
        "ratio",
        "/ limit",
        "/ full",
        "prefill +%",
        "KV",
        "full",
        "peak",
        "full",
    ):
        shown.add_column(name, justify="left" if name == "policy" else "right")
    for row in rows:
        sizes = [row[name] for name in ("kv_bytes", "kv_bytes_full", "peak_bytes", "peak_bytes_full")]
        shown.add_row(
            row["policy"],
            str(row["context"]),
            str(row["batch"]),
            f"{row['ratio']:g}",
            f"{row['decode_vs_limit']:.3f}",
            f"{row['decode_vs_full']:.3f}",
            "-" if row["prefill_overhead"] is None else f"{100 * row['prefill_overhead']:.2f}",
            *("-" if size is None else f"{size / 1e6:.1f}" for size in sizes),
        )
    return shown


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Decode step against limit and full cache, and what compression adds to a prefill, over the context."""
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    ratio = min(row["ratio"] for row in rows)
    rows = [row for row in rows if row["ratio"] == ratio]
    contexts = sorted({row["context"] for row in rows})

    def line(axis: Any, name: str, key: str, value: Any, unit: float = 1) -> None:
        """Median over everything else."""
        found = {at: [row[name] for row in rows if row["context"] == at and row[key] == value] for at in contexts}
        found = {at: [unit * number for number in some if number is not None] for at, some in found.items()}
        points = [(at, statistics.median(some)) for at, some in found.items() if some]
        axis.plot(*zip(*points, strict=True), "o-", label=f"batch {value}" if key == "batch" else value)

    for batch in sorted({row["batch"] for row in rows}):
        line(axes[0], "decode_vs_limit", "batch", batch)
        line(axes[1], "decode_vs_full", "batch", batch)
    for policy in dict.fromkeys(row["policy"] for row in rows):
        line(axes[2], "prefill_overhead", "policy", policy, 100)
    axes[0].axhline(1.05, color="grey", linestyle=":")
    axes[2].axhline(2, color="grey", linestyle=":")
    titles = (f"decode step / limit, ratio {ratio:g}", "decode step / full cache", "compression, % of a prefill")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(title=title, xlabel="context, tokens", xscale="log", ylim=(0, None))
        axis.set_xticks(contexts, [f"{context / 1024:g}k" for context in contexts])
        axis.minorticks_off()
        axis.legend(fontsize=8)
    with whole_file(file) as partial:
        figure.savefig(partial, dpi=110, format="png")
