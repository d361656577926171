"""Accuracy over size for the HTML report: a picture in a light and a dark version, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from acckv.metrics.intervals import Interval
from acckv.report.plots import line_style, spread
from acckv.report.results import FULL, REFERENCE_NAMES, Results, Row

_DPI = 192
_COLUMNS = 2  # of the legend


@dataclass(frozen=True)
class Theme:
    """Colours of one version of a picture."""

    ink: str
    muted: str
    grid: str
    panel: str


LIGHT = Theme("#1c2128", "#656d76", "#e3e6ea", "#ffffff")
DARK = Theme("#e6edf3", "#9aa4b0", "#30363d", "#161b22")


@dataclass(frozen=True)
class Picture:
    """One picture as data URIs, with what it shows in words.

    Attributes:
        light, dark: data URIs; width, height: CSS pixels.
        alt: text alternative.
    """

    light: str
    dark: str
    width: int
    height: int
    alt: str


def picture(draw: Callable[[Theme], Figure], alt: str) -> Picture:
    """A drawing in both versions."""
    light, width, height = _encoded(draw(LIGHT), LIGHT)
    dark, _, _ = _encoded(draw(DARK), DARK)
    return Picture(light, dark, width, height, alt)


def _encoded(figure: Figure, theme: Theme) -> tuple[str, int, int]:
    file = io.BytesIO()
    figure.savefig(file, dpi=_DPI, format="webp", facecolor=theme.panel, pil_kwargs={"quality": 88, "method": 4})
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii"), width, height


# ------------------------------------------------------------------ accuracy over size


def pareto(results: Results, intervals: Mapping[tuple[str, float], Interval], by_bytes: bool, theme: Theme) -> Figure:
    """Accuracy in % of the full cache's over the kept share of entries or over KV bytes (log axes).

    Rows that keep no entry cannot be placed on a log axis; the controls are horizontal lines.
    """
    names = measured_policies(results)
    lines = len(names) + len(_controls(results)) + 1
    figure = Figure(figsize=(4.7, 3.9 + 0.22 * (-(-lines // _COLUMNS))), layout="constrained")
    axes = figure.subplots()
    _style(axes, theme)
    axes.axhline(100, color=theme.ink, linewidth=1.3, label=REFERENCE_NAMES[FULL])
    for row, style in zip(_controls(results), ("--", ":", "-."), strict=False):
        label = REFERENCE_NAMES[row.policy].replace(" (control)", "")
        axes.axhline(100 * (row.relative or 0), color=theme.muted, linestyle=style, linewidth=1.3, label=label)
    ticks: set[float] = set()
    for i, name in enumerate(names):
        rows = [row for row in results.rows if row.policy == name and row.kept_entries > 0 and row.relative is not None]
        rows.sort(key=lambda row: row.kept_entries)
        ticks |= {_size(row, by_bytes) if by_bytes else row.ratio for row in rows}
        ends = [intervals.get((row.policy, row.ratio)) for row in rows]
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
        text.set_color(theme.ink)
    return figure


def measured_policies(results: Results) -> list[str]:
    """Names of the policies that compress, in the order of the rows."""
    return list(dict.fromkeys(row.policy for row in results.rows if row.policy not in REFERENCE_NAMES))


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


def _style(axes: Axes, theme: Theme) -> None:
    axes.set_facecolor(theme.panel)
    axes.tick_params(colors=theme.muted, labelcolor=theme.ink, labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.muted)
    axes.yaxis.label.set_color(theme.ink)
    axes.xaxis.label.set_color(theme.ink)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
