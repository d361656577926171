"""Plots of an evaluation: accuracy over size, and where a budget went; as PNG files, or as SVG in the report's page."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

from acckv.evaluation.results import FULL, REFERENCE_NAMES, Results, Row, Setting, is_calibrated
from acckv.io.files import whole_file

INK, MUTED, LINE = "#1c2128", "#57606a", "#d9dde2"
"""Of the report's page where it is light; in the page its own take their place, which may be dark."""
_PAGE_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)"}
_LEGEND_COLUMNS = 2
_COLOURS = ("#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b4c9a", "#8c564b", "#7f7f00")
_CALIBRATED_COLOUR = "#D55E00"
_MARKERS = "sD^vPX*<"
_LINES = ("-", "--", ":")  # the next for each round of the colours
_ANNOTATED = 12  # more layers than this: colours only, numbers would not be legible


def save_png(path: str | Path, figure: Figure) -> None:
    """Write a drawing as a PNG."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def inline_svg(figure: Figure, alt: str) -> Markup:
    """A drawing as an element of the page; `alt` is its text alternative, another one for each drawing."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(file, format="svg", facecolor="none", metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    for drawn, shown in _PAGE_COLOURS.items():
        text = text.replace(drawn, shown)
    # Nothing lies outside the axes, an element of HTML needs no name spaces, and groups have the same names everywhere.
    for spare in (
        r"<defs>\s*<clipPath.*?</defs>",
        r' clip-path="[^"]*"',
        r' xmlns(:\w+)?="[^"]*"',
        r' id="[\w.]+_\d+"',
    ):
        text = re.sub(spare, "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href")
    return Markup(text.replace("<svg", f'<svg class="figure" role="img" aria-label="{escape(alt)}"', 1))


def pareto(results: Results, intervals: Mapping[Setting, tuple[float, float]], by_bytes: bool = False) -> Figure:
    """Accuracy in % of the full cache's over the kept share of entries or over KV bytes (log axes).

    Rows that keep no entry cannot be placed on a log axis; the controls are horizontal lines.

    Args:
        intervals: 95 % interval of each setting's share of the full cache.
    """
    names, controls = results.policies, [row for row in results.references if row.policy != FULL]
    lines = len(names) + len(controls) + 1
    figure = Figure(figsize=(4.7, 3.9 + 0.22 * (-(-lines // _LEGEND_COLUMNS))), layout="constrained")
    axes = figure.subplots()
    _style(axes)
    axes.axhline(100, color=INK, linewidth=1.3, label=REFERENCE_NAMES[FULL])
    for row, style in zip(controls, ("--", ":", "-."), strict=False):
        label = REFERENCE_NAMES[row.policy].replace(" (control)", "")
        axes.axhline(100 * (row.relative or 0), color=MUTED, linestyle=style, linewidth=1.3, label=label)
    ticks: set[float] = set()
    for i, name in enumerate(names):
        rows = [row for row in results.rows if row.policy == name and row.kept_entries > 0 and row.relative is not None]
        rows.sort(key=lambda row: row.kept_entries)
        ticks |= {_size(row, by_bytes) if by_bytes else row.ratio for row in rows}
        shares = [100 * (row.relative or 0) for row in rows]
        ends = [intervals.get(row.setting, (row.relative or 0,) * 2) for row in rows]
        down = [max(0, share - 100 * low) for share, (low, _) in zip(shares, ends, strict=True)]
        up = [max(0, 100 * high - share) for share, (_, high) in zip(shares, ends, strict=True)]
        x = [_spread(_size(row, by_bytes), i, len(names)) for row in rows]
        axes.errorbar(x, shares, yerr=[down, up], label=name, elinewidth=0.9, capsize=2, **_line_style(name, i))
    axes.set_xscale("log")
    axes.margins(x=0.06)
    axes.set_ylim(0, max(104, axes.get_ylim()[1]))
    axes.set_ylabel("accuracy in % of the full cache's")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(_apart(sorted(ticks))))
    if by_bytes:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
        axes.set_xlabel("keys and values held for a clip")
    else:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.set_xlabel("kept audio and video entries, share of the full cache")
    look = {"ncols": _LEGEND_COLUMNS, "columnspacing": 1.2, "frameon": False, "fontsize": 9.5, "labelcolor": INK}
    figure.legend(loc="outside lower center", **look)
    return figure


def plot_pareto(path: str | Path, results: Results, intervals: Mapping[Setting, tuple[float, float]]) -> None:
    """Write `pareto` over the kept share of entries as a PNG."""
    figure = pareto(results, intervals)
    figure.suptitle(f"{results.benchmark}, when: {results.when}", fontsize=10)
    save_png(path, figure)


def _size(row: Row, by_bytes: bool) -> float:
    return row.kv_bytes if by_bytes else row.kept_entries / max(row.full_entries, 1e-9)


def _apart(values: list[float]) -> list[float]:
    """Of ascending values those that labels have room for on a log axis; the first and the last stay."""
    kept: list[float] = []
    for value in values:
        if not kept or value / kept[-1] > 1.25:
            kept.append(value)
    return kept


def _bytes(value: float) -> str:
    for unit in ("B", "kB", "MB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _style(axes: Axes) -> None:
    axes.set_facecolor("none")
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.yaxis.label.set_color(INK)
    axes.xaxis.label.set_color(INK)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)


def _line_style(name: str, index: int) -> dict[str, Any]:
    """Options of a policy's curve: the calibrated one stands out, the others take their turn by `index`."""
    if is_calibrated(name):
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
        budgets: ratio -> [layers, 2] mean kept entries (video, audio), merged entries included.
        full: [2] mean entries (video, audio) before compression.

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
            for (layer, modality), value in np.ndenumerate(share.numpy()):
                text = f"{value:.0f}" if value >= 9.95 else f"{value:.1f}"
                colour = "white" if value < 0.6 * top else "black"
                axes.text(modality, layer, text, ha="center", va="center", fontsize=9, color=colour)
        axes.set_xlabel(f"brightest: {top:.3g} %", fontsize=8)
    panels[0].set_ylabel("layer")
    figure.suptitle(f"{title}: kept share of a layer's entries in %", fontsize=11, x=0.01, ha="left")
    save_png(path, figure)


def plot_budget_history(path: str | Path, steps: Sequence[int], ratios: Sequence[float], shares: Tensor) -> None:
    """Write a PNG: the learned budget of each layer over training, a row a modality, a column a ratio (log axis).

    Args:
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
    save_png(path, figure)


def _spread(share: float, index: int, count: int) -> float:
    """Shift a point by at most 3 % of its value so that intervals of several policies do not hide each other."""
    return share * math.exp(0.03 * (2 * index / max(1, count - 1) - 1))


def _layer_ticks(layers: int) -> list[int]:
    step = max(1, math.ceil(layers / 16))
    return list(range(0, layers, step))
