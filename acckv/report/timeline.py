"""The drawing of a kept-entries timeline: frames, sound and kept shares over the same seconds, as small images and SVG
paths."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from acckv.evaluation.timeline import KeptEntries, Timeline

COLOURS = {"video": (47, 129, 214), "audio": (209, 107, 31)}
"""Seen on light and on dark ground; the share of kept entries is the opacity."""
_MOST_BINS = 160  # stretches of time; more would be narrower than a pixel
_TABLE_ROWS = 8


@dataclass(frozen=True)
class ModalityTimeline:
    """The kept share of one modality over time.

    Attributes:
        modality: "video" or "audio".
        bars: SVG path in a box of width 1000 and height 100, share over all layers, the largest at full height.
        peak: that largest share, 0..1.
        layers: data URI of an image [layers, stretches of time]; layer_count: its height in pixels.
        brightest: share that the strongest colour of the image stands for, 0..1.
        kept: share of all entries, 0..1; entries: how many there are.
        peak_seconds: begin and end of the stretch of time that keeps most.
    """

    modality: str
    bars: str
    peak: float
    layers: str
    layer_count: int
    brightest: float
    kept: float
    entries: int
    peak_seconds: tuple[float, float]

    @property
    def text(self) -> str:
        """The kept share in words."""
        begin, end = self.peak_seconds
        return (
            f"{100 * self.kept:.1f} % of {self.entries} {self.modality} entries kept, "
            f"most at {begin:.1f} to {end:.1f} s ({100 * self.peak:.0f} % over all layers)"
        )


def modality_timelines(clip: Timeline, kept: KeptEntries) -> list[ModalityTimeline]:
    """The kept shares of the modalities that a clip has."""
    drawn = []
    for modality, entries in (("video", kept.video), ("audio", kept.audio)):
        layers, count = entries.shape
        if not count:
            continue
        bins = min(clip.patches if modality == "video" else count, _MOST_BINS)
        shares = kept.shares(modality, bins)
        mean = shares.mean(0)
        peak, top, step = int(mean.argmax()), float(shares.max()), clip.seconds / bins
        opacity = (255 * shares / max(top, 1e-9)).round().to(torch.uint8)
        drawn.append(
            ModalityTimeline(
                modality=modality,
                bars=_bars(mean),
                peak=float(mean[peak]),
                layers=_data_uri(_tinted(opacity, COLOURS[modality]), "png"),
                layer_count=layers,
                brightest=top,
                kept=float(entries.float().mean()) / kept.heads,
                entries=count,
                peak_seconds=(step * peak, step * (peak + 1)),
            )
        )
    return drawn


def frames(clip: Timeline) -> str:
    """All thumbnails side by side, as a data URI."""
    return _data_uri(_side_by_side(clip.thumbnails), "webp")


def frames_left(clip: Timeline, kept: KeptEntries) -> str | None:
    """The thumbnails, each part as opaque as the share of layers that kept its entry; None without a grid."""
    if clip.grid is None or not kept.video.shape[1]:
        return None
    rows, columns = clip.grid
    count, _, height, width = clip.thumbnails.shape
    share = (kept.video.float() / kept.heads).mean(0).view(-1, 1, rows, columns)
    chosen = share[[i * len(share) // count for i in range(count)]] / share.max().clamp_min(1e-9)
    opacity = torch.nn.functional.interpolate(255 * chosen, (height, width), mode="nearest").round().to(torch.uint8)
    return _data_uri(_side_by_side(torch.cat([clip.thumbnails, opacity], dim=1)), "webp")


def wave(clip: Timeline) -> str | None:
    """The sound's envelope as an SVG path in a box of width 1000 and height 100; None without sound."""
    count = clip.wave.shape[1]
    if not count:
        return None
    low, high = (50 - 50 * side.float() for side in clip.wave)
    there = [f"{1000 * i / count:.0f} {y:.0f}" for i, y in enumerate(high.tolist())]
    back = [f"{1000 * i / count:.0f} {y + 1:.0f}" for i, y in enumerate(low.tolist())]
    return "M" + "L".join(there + back[::-1]) + "Z"


def over_time(clip: Timeline, kept: KeptEntries) -> list[tuple[str, list[float | None]]]:
    """The timeline in numbers: for equal stretches of the clip, its seconds and the kept shares of video and audio."""
    both = [
        kept.shares(modality, _TABLE_ROWS).mean(0).tolist() if entries.shape[1] >= _TABLE_ROWS else None
        for modality, entries in (("video", kept.video), ("audio", kept.audio))
    ]
    step = clip.seconds / _TABLE_ROWS
    return [
        (f"{step * i:.3g} to {step * (i + 1):.3g} s", [None if shares is None else shares[i] for shares in both])
        for i in range(_TABLE_ROWS)
    ]


def _bars(shares: Tensor) -> str:
    """Bars of equal width as one path, the largest 100 high."""
    heights = (100 * shares / shares.max().clamp_min(1e-9)).tolist()
    width = 1000 / len(heights)
    return "".join(
        f"M{width * i:.1f} 100V{100 - height:.1f}H{width * (i + 1):.1f}V100Z"
        for i, height in enumerate(heights)
        if height > 0
    )


def _tinted(opacity: Tensor, colour: tuple[int, int, int]) -> Image.Image:
    """One colour at uint8 opacities [height, width]."""
    ground = torch.tensor(colour, dtype=torch.uint8).expand(*opacity.shape, 3)
    return Image.fromarray(torch.cat([ground, opacity[..., None]], dim=-1).numpy(), "RGBA")


def _side_by_side(pictures: Tensor) -> Image.Image:
    """uint8 [count, 3 or 4, height, width] with a gap of two pixels between them."""
    count, channels, height, width = pictures.shape
    gap = torch.nn.functional.pad(pictures, (1, 1), value=255)
    if channels == 3:
        opaque = torch.nn.functional.pad(torch.full((count, 1, height, width), 255, dtype=torch.uint8), (1, 1))
        gap = torch.cat([gap, opaque], dim=1)
    elif channels == 4:
        gap[:, 3, :, [0, -1]] = 0
    joined = gap.permute(2, 0, 3, 1).reshape(height, count * (width + 2), 4)
    return Image.fromarray(joined.contiguous().numpy(), "RGBA")


def _data_uri(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, format=kind, **({"quality": 80} if kind == "webp" else {"optimize": True}))
    return f"data:image/{kind};base64," + base64.b64encode(file.getvalue()).decode("ascii")
