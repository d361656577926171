"""Pictures of the HTML report, each in a light and a dark version, as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from torch import Tensor

from acckv.metrics.intervals import Interval
from acckv.report.plots import line_style, spread
from acckv.report.results import FULL, REFERENCE_NAMES, Results, Row
from acckv.report.strip import KeptEntries, Strip

_DPI = 144
_MOST_BINS = 160  # stretches of time in a strip; more would be narrower than a pixel


@dataclass(frozen=True)
class Theme:
    """Colours of one version of a picture."""

    ink: str
    muted: str
    grid: str
    panel: str
    video: str
    audio: str


LIGHT = Theme("#1c2128", "#656d76", "#e3e6ea", "#ffffff", "#0060a8", "#b34700")
DARK = Theme("#e6edf3", "#9aa4b0", "#30363d", "#161b22", "#58b0f5", "#ff9d5c")


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
    figure = Figure(figsize=(6.6, 5.2), layout="constrained")
    axes = figure.subplots()
    _style(axes, theme)
    axes.axhline(100, color=theme.ink, linewidth=1.3, label=REFERENCE_NAMES[FULL])
    for row, style in zip(_controls(results), ("--", ":", "-."), strict=False):
        label = REFERENCE_NAMES[row.policy].replace(" (control)", "")
        axes.axhline(100 * (row.relative or 0), color=theme.muted, linestyle=style, linewidth=1.3, label=label)
    names = measured_policies(results)
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
    legend = figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
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
    axes.tick_params(colors=theme.muted, labelcolor=theme.ink, labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(theme.muted)
    axes.yaxis.label.set_color(theme.ink)
    axes.xaxis.label.set_color(theme.ink)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)


# ------------------------------------------------------------------ strips


def strip(clip: Strip, kept: KeptEntries, theme: Theme) -> Figure:
    """Frames, sound, and over the same seconds what was kept: the share over all layers, and layer by layer."""
    layers, seconds = len(kept.video), clip.seconds
    count, _, height, width = clip.thumbnails.shape
    inches = 8.6
    picture_height = min(1.1, 0.9 * inches / count * height / width)
    maps = max(0.9, min(2.0, 0.11 * layers))
    parts = {"frames": picture_height}
    if clip.grid is not None and kept.video.shape[1]:
        parts["left"] = picture_height
    if kept.video.shape[1]:
        parts |= {"video": 0.55, "video map": maps}
    if clip.wave.shape[1]:
        parts["sound"] = 0.5
    if kept.audio.shape[1]:
        parts |= {"audio": 0.55, "audio map": maps}
    figure = Figure(figsize=(inches, sum(parts.values()) + 0.13 * len(parts) + 0.45), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.02, hspace=0.0)  # type: ignore[union-attr]
    rows = figure.subplots(len(parts), 1, sharex=True, height_ratios=list(parts.values()), squeeze=False)[:, 0]
    for name, axes in zip(parts, rows, strict=True):
        _style(axes, theme)
        axes.tick_params(length=0, labelsize=8)
        modality = name.split()[0]
        if name == "frames":
            _pictures(axes, clip.thumbnails.float() / 255, seconds)
            _label(axes, "frames", theme)
        elif name == "left":
            _pictures(axes, _dimmed(clip, kept, theme), seconds)
            _label(axes, "what is\nleft", theme)
        elif name == "sound":
            time = torch.linspace(0, seconds, clip.wave.shape[1])
            axes.fill_between(time, clip.wave[0].float(), clip.wave[1].float(), color=theme.muted, linewidth=0.4)
            axes.set_ylim(-1, 1)
            axes.set_yticks([])
            axes.grid(False)
            _label(axes, "sound", theme)
        else:
            colour = theme.video if modality == "video" else theme.audio
            shares = kept.shares(modality, bins(clip, kept, modality))
            _shares(axes, shares, seconds, colour, theme, modality, by_layer=name.endswith("map"))
    rows[-1].set_xlim(0, seconds)
    rows[-1].set_xlabel("seconds", fontsize=9)
    return figure


def bins(clip: Strip, kept: KeptEntries, modality: str) -> int:
    """Stretches of time that a modality is shown in: a temporal patch of video, an entry of audio, at most 160."""
    return min(clip.patches if modality == "video" else kept.audio.shape[1], _MOST_BINS)


def _shares(
    axes: Axes, shares: Tensor, seconds: float, colour: str, theme: Theme, modality: str, by_layer: bool
) -> None:
    """Kept shares [layers, bins] over time, as bars of their mean or as a map of layers."""
    top = max(float(shares.max()), 1e-9)
    if by_layer:
        ramp = LinearSegmentedColormap.from_list("", [theme.grid, colour])
        extent = (0.0, seconds, len(shares) - 0.5, -0.5)
        axes.imshow(shares.numpy(), aspect="auto", cmap=ramp, vmin=0, vmax=top, extent=extent, interpolation="nearest")
        axes.set_yticks([0, len(shares) - 1] if len(shares) > 1 else [0])
        axes.grid(False)
        _label(axes, f"{modality}\nby layer", theme)
        return
    mean = 100 * shares.mean(0)
    step = seconds / len(mean)
    axes.bar([step * (i + 0.5) for i in range(len(mean))], mean.tolist(), width=step, color=colour, linewidth=0)
    limit = max(float(mean.max()) * 1.1, 1e-3)
    axes.set_ylim(0, limit)
    axes.set_yticks([0, float(mean.max())], ["0", f"{float(mean.max()):.2g} %"])
    _label(axes, f"{modality}\nkept", theme)


def _label(axes: Axes, text: str, theme: Theme) -> None:
    axes.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=9, color=theme.ink, labelpad=6)


def _pictures(axes: Axes, pictures: Tensor, seconds: float) -> None:
    """Pictures [count, 3, height, width], 0..1, side by side over the whole time."""
    step = seconds / len(pictures)
    for i, frame in enumerate(pictures):
        extent = (step * (i + 0.03), step * (i + 0.97), 0.0, 1.0)
        axes.imshow(frame.permute(1, 2, 0).numpy(), aspect="auto", extent=extent, interpolation="bilinear")
    axes.set_ylim(0, 1)
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[["left", "bottom"]].set_visible(False)


def _dimmed(clip: Strip, kept: KeptEntries, theme: Theme) -> Tensor:
    """Thumbnails whose cells fade with the share of layers that evicted them: [count, 3, height, width]."""
    rows, columns = clip.grid or (1, 1)
    count, _, height, width = clip.thumbnails.shape
    share = (kept.video.float() / kept.heads).mean(0).view(-1, 1, rows, columns)
    chosen = share[[i * len(share) // count for i in range(count)]]
    strength = chosen / share.max().clamp_min(1e-9)
    mask = torch.nn.functional.interpolate(strength, (height, width), mode="nearest")
    ground = torch.tensor([int(theme.grid[i : i + 2], 16) / 255 for i in (1, 3, 5)]).view(1, 3, 1, 1)
    return ground + mask * (clip.thumbnails.float() / 255 - ground)


def describe(clip: Strip, kept: KeptEntries) -> str:
    """A strip in words: how much of each modality was kept, and when most."""
    parts = []
    for modality, entries in (("video", kept.video), ("audio", kept.audio)):
        if not entries.shape[1]:
            continue
        shares = kept.shares(modality, bins(clip, kept, modality)).mean(0)
        peak = int(shares.argmax())
        step = clip.seconds / len(shares)
        parts.append(
            f"{float(entries.float().mean()) / kept.heads:.1%} of {entries.shape[1]} {modality} entries are kept, "
            f"most at {step * peak:.1f} to {step * (peak + 1):.1f} s ({float(shares[peak]):.0%} over layers)"
        )
    return f"{kept.policy} at ratio {kept.ratio:g} on {clip.clip}: " + "; ".join(parts) + "."


def over_time(clip: Strip, kept: KeptEntries, parts: int = 8) -> Sequence[tuple[str, list[float | None]]]:
    """A strip in numbers: for equal stretches of the clip, its seconds and the kept shares of video and audio."""
    rows = []
    for i in range(parts):
        seconds = f"{clip.seconds * i / parts:.3g} to {clip.seconds * (i + 1) / parts:.3g} s"
        shares = [
            float(kept.shares(modality, parts).mean(0)[i]) if entries.shape[1] >= parts else None
            for modality, entries in (("video", kept.video), ("audio", kept.audio))
        ]
        rows.append((seconds, shares))
    return rows
