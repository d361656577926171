"""Accuracy over size for the HTML report, as SVG in the colours of the page."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping

import matplotlib
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from acckv.evaluation.results import FULL, REFERENCE_NAMES, Results, Row, Setting
from acckv.metrics.intervals import Interval
from acckv.report.plots import line_style, spread

_COLUMNS = 2  # of the legend
INK, MUTED, LINE = "#010101", "#020202", "#030303"
"""Drawn with; the page's own colours take their place, so that a picture is light or dark as the page is."""
_PAGE_COLOURS = {INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)"}


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


# ------------------------------------------------------------------ accuracy over size


def pareto(results: Results, intervals: Mapping[Setting, Interval], by_bytes: bool) -> Figure:
    """Accuracy in % of the full cache's over the kept share of entries or over KV bytes (log axes).

    Rows that keep no entry cannot be placed on a log axis; the controls are horizontal lines.
    """
    names = results.policies
    lines = len(names) + len(_controls(results)) + 1
    figure = Figure(figsize=(4.7, 3.9 + 0.22 * (-(-lines // _COLUMNS))), layout="constrained")
    axes = figure.subplots()
    _style(axes)
    axes.axhline(100, color=INK, linewidth=1.3, label=REFERENCE_NAMES[FULL])
    for row, style in zip(_controls(results), ("--", ":", "-."), strict=False):
        label = REFERENCE_NAMES[row.policy].replace(" (control)", "")
        axes.axhline(100 * (row.relative or 0), color=MUTED, linestyle=style, linewidth=1.3, label=label)
    ticks: set[float] = set()
    for i, name in enumerate(names):
        rows = [row for row in results.rows if row.policy == name and row.kept_entries > 0 and row.relative is not None]
        rows.sort(key=lambda row: row.kept_entries)
        ticks |= {_size(row, by_bytes) if by_bytes else row.ratio for row in rows}
        ends = [intervals.get(row.setting) for row in rows]
        shares = [100 * (row.relative or 0) for row in rows]
        down = [0 if end is None else max(0, share - 100 * end.low) for share, end in zip(shares, ends, strict=True)]
        up = [0 if end is None else max(0, 100 * end.high - share) for share, end in zip(shares, ends, strict=True)]
        x = [spread(_size(row, by_bytes), i, len(names)) for row in rows]
        axes.errorbar(x, shares, yerr=[down, up], label=name, elinewidth=0.9, capsize=2, **line_style(name, i))
    axes.set_xscale("log")
    axes.margins(x=0.06)
    axes.set_ylim(0, max(104, axes.get_ylim()[1]))
    axes.set_ylabel("accuracy in % of the full cache's")
    axes.xaxis.set_minor_locator(NullLocator())
    if by_bytes:
        axes.xaxis.set_major_locator(FixedLocator(_apart(sorted(ticks))))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _bytes(value)))
        axes.set_xlabel("keys and values held for a clip")
    else:
        axes.xaxis.set_major_locator(FixedLocator(_apart(sorted(ticks))))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        axes.set_xlabel("kept audio and video entries, share of the full cache")
    legend = figure.legend(loc="outside lower center", ncols=_COLUMNS, frameon=False, fontsize=9.5, columnspacing=1.2)
    for text in legend.get_texts():
        text.set_color(INK)
    return figure


def _controls(results: Results) -> list[Row]:
    return [row for row in results.rows if row.policy in REFERENCE_NAMES and row.policy != FULL]


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
