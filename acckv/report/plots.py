"""Plots of an evaluation: accuracy over kept share, and where a budget went."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from torch import Tensor

from acckv.evaluation.results import CALIBRATED, Results, Row
from acckv.io.files import whole_file

_DPI = 150
_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b4c9a", "#8c564b", "#7f7f00")
_CALIBRATED_COLOUR = "#D55E00"
_MARKERS = "sD^vPX*<"
_LINES = ("-", "--", ":")  # the next for each round of the colours
_ANNOTATED = 12  # more layers than this: colours only, numbers would not be legible


def plot_pareto(path: str | Path, results: Results) -> None:
    """Write a PNG: accuracy over the share of audio and video entries that was really kept (log axis).

    A line a policy with 95 % intervals; the full cache and the control (every audio and video entry evicted) are
    horizontal lines with their intervals as bands. Rows that keep nothing cannot be placed on a log axis and are
    left to the table.
    """
    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axes = figure.subplots()
    _reference(axes, results.full, "full cache", "#222222", "-")
    _reference(axes, results.control, "control: all evicted", "#999999", "--")
    names = results.policies
    shown: set[float] = set()
    for i, name in enumerate(names):
        rows = sorted((r for r in results.rows if r.policy == name and r.kept_entries > 0), key=lambda r: r.ratio)
        rows = [row for row in rows if row.full_entries > 0]
        shown |= {row.ratio for row in rows}
        axes.errorbar(
            [spread(row.kept_entries / row.full_entries, i, len(names)) for row in rows],
            [100 * row.accuracy for row in rows],
            yerr=_bars(rows),
            label=name,
            elinewidth=0.9,
            capsize=2,
            **line_style(name, i),
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(shown)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted(shown), [f"{100 * ratio:g} %" for ratio in sorted(shown)])
    axes.set_ylim(0, 102)
    axes.set_xlabel("kept audio and video entries (share of the full cache)")
    axes.set_ylabel("accuracy in %")
    axes.set_title(f"{results.benchmark}, when: {results.when}", loc="left", fontsize=11)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, format="png")


def line_style(name: str, index: int) -> dict[str, Any]:
    """Options of a policy's curve: the calibrated one stands out, the others take their turn by `index`."""
    if name == CALIBRATED:
        line = {"color": _CALIBRATED_COLOUR, "marker": "o", "linestyle": "-"}
        return {**line, "markersize": 6, "linewidth": 2.4, "zorder": 4}
    line = {
        "color": _COLOURS[index % len(_COLOURS)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "linestyle": _LINES[index // len(_COLOURS) % len(_LINES)],
    }
    return {**line, "markersize": 4.5, "linewidth": 1.3, "zorder": 3}


def plot_budgets(path: str | Path, budgets: Mapping[float, Tensor], full: Tensor, title: str) -> None:
    """Write a PNG: which share of each layer's video and audio entries was kept, one panel a ratio.

    Args:
        path: the file.
        budgets: ratio -> [layers, 2] mean kept entries (video, audio), merged entries included.
        full: [2] mean entries (video, audio) before compression.
        title: over all panels; usually the compressor's name.

    Raises:
        ValueError: no budgets.
    """
    if not budgets:
        raise ValueError("no budgets to plot")
    layers = len(next(iter(budgets.values())))
    row_height = 0.34 if layers <= _ANNOTATED else 0.16
    size = (max(4.5, 1.6 + 1.55 * len(budgets)), 1.6 + row_height * max(6, layers))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    shares = {ratio: 100 * kept.double().cpu() / full.double().cpu().clamp_min(1e-9) for ratio, kept in budgets.items()}
    ramp = matplotlib.colormaps["viridis"]
    for axes, (ratio, share) in zip(panels, shares.items(), strict=True):
        # A scale of its own for each ratio: what matters is how one budget is spread.
        top = max(float(share.max()), 1e-9)
        axes.imshow(share.numpy(), aspect="auto", cmap=ramp, vmin=0, vmax=top)
        axes.set_title(f"ratio {ratio:g}", fontsize=10)
        axes.set_xticks([0, 1], ["video", "audio"])
        axes.set_yticks(_layer_ticks(layers))
        axes.tick_params(length=0)
        if layers <= _ANNOTATED:
            for layer in range(layers):
                for modality in range(2):
                    value = float(share[layer, modality])
                    dark = value < 0.6 * top
                    text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
                    colour = "white" if dark else "black"
                    axes.text(modality, layer, text, ha="center", va="center", fontsize=9, color=colour)
        axes.set_xlabel(f"brightest: {top:.3g} %", fontsize=8)
    panels[0].set_ylabel("layer")
    figure.suptitle(f"{title}: kept share of a layer's entries in %", fontsize=11, x=0.01, ha="left")
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, format="png")


def plot_budget_history(path: str | Path, steps: Sequence[int], ratios: Sequence[float], shares: Tensor) -> None:
    """Write a PNG: the learned budget of each layer over training, a row a modality, a column a ratio (log axis).

    Args:
        path: the file.
        steps: that were noted.
        ratios: kept shares.
        shares: [steps, ratios, layers, 2] times the preset's budget (video, audio).
    """
    layers = shares.shape[2]
    size = (1.4 + 2.1 * len(ratios), 4.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(2, len(ratios), sharex=True, sharey=True, squeeze=False)
    ramp = matplotlib.colormaps["viridis"]
    for row, modality in enumerate(("video", "audio")):
        for column, ratio in enumerate(ratios):
            axes = panels[row, column]
            for layer in range(layers):
                values = shares[:, column, layer, row].double().clamp_min(1e-3).tolist()
                colour = ramp(layer / max(1, layers - 1) * 0.92)
                axes.plot(steps, values, color=colour, linewidth=1.2, label=f"{layer}")
            axes.set_yscale("log")
            axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
            axes.spines[["top", "right"]].set_visible(False)
            if row == 0:
                axes.set_title(f"ratio {ratio:g}", fontsize=10)
            else:
                axes.set_xlabel("step", fontsize=9)
        panels[row, 0].set_ylabel(f"{modality}, x preset", fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    shown = _layer_ticks(layers)
    figure.legend(
        [handles[layer] for layer in shown],
        [labels[layer] for layer in shown],
        title="layer",
        loc="outside right upper",
        frameon=False,
        fontsize=8,
    )
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=_DPI, format="png")


def _reference(axes: Axes, row: Row | None, label: str, colour: str, style: str) -> None:
    if row is None:
        return
    axes.axhline(100 * row.accuracy, color=colour, linestyle=style, linewidth=1.4, label=label, zorder=2)
    axes.axhspan(100 * row.ci95[0], 100 * row.ci95[1], color=colour, alpha=0.08, linewidth=0, zorder=1)


def _bars(rows: list[Row]) -> list[list[float]]:
    """Distances from accuracy down and up to the ends of the interval, in points."""
    down = [max(0.0, 100 * (row.accuracy - row.ci95[0])) for row in rows]
    up = [max(0.0, 100 * (row.ci95[1] - row.accuracy)) for row in rows]
    return [down, up]


def spread(share: float, index: int, count: int) -> float:
    """Shift a point by at most 3 % of its value so that intervals of several policies do not hide each other."""
    return share * math.exp(0.03 * (2 * index / max(1, count - 1) - 1))


def _layer_ticks(layers: int) -> list[int]:
    step = max(1, math.ceil(layers / 16))
    return list(range(0, layers, step))
