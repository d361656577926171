"""Which entries of a clip a compression kept, beside what was seen and heard: recorded, saved, loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from acckv.compressor import KVCompressor
from acckv.config import CompressionConfig, When
from acckv.data.encoding import encode
from acckv.data.media import TEMPORAL_PATCH, Media
from acckv.errors import InputError
from acckv.io.files import whole_file
from acckv.method.modality import COMPRESSED

STRIPS_FILE = "strips.safetensors"
_THUMBNAILS = 16
_THUMBNAIL_HEIGHT = 72
_WAVE_BINS = 400


@dataclass(frozen=True)
class KeptEntries:
    """What one policy at one ratio kept of a clip.

    Attributes:
        policy, ratio: of the evaluation's row.
        prediction: its answer to the strip's question; score: of that answer, 0..1.
        video, audio: uint8 [layers, entries], KV heads that kept an entry, entries in the order of the prompt.
        heads: KV heads that choose for themselves; 1 where all heads of a layer keep the same.
    """

    policy: str
    ratio: float
    prediction: str
    score: float
    video: Tensor
    audio: Tensor
    heads: int

    def shares(self, modality: str, bins: int) -> Tensor:
        """float [layers, bins]: kept share of the entries of each stretch of time, mean over KV heads.

        The entries of a modality come in order of time, equally many a second.
        """
        kept = (self.video if modality == "video" else self.audio).float() / self.heads
        place = torch.arange(kept.shape[1]) * bins // kept.shape[1]
        sums = torch.zeros(len(kept), bins).index_add_(1, place, kept)
        return sums / torch.bincount(place, minlength=bins).clamp_min(1)


@dataclass(frozen=True)
class Strip:
    """One clip, one question about it, and what each of some compressions kept.

    Attributes:
        clip: file name; question, answer, full_answer: asked, right, and given from the full cache.
        seconds: length of the clip as the model saw it.
        patches: stretches of time that the video entries fall into, equally many entries each.
        grid: rows and columns of entries in one patch's picture; None where that is not known.
        thumbnails: uint8 [count, 3, height, width], evenly spread over the patches.
        wave: float16 [2, bins] lowest and highest sample of each stretch of time, -1..1; no bins without sound.
        kept: of each compression.
    """

    clip: str
    question: str
    answer: str
    full_answer: str
    seconds: float
    patches: int
    grid: tuple[int, int] | None
    thumbnails: Tensor
    wave: Tensor
    kept: list[KeptEntries] = field(default_factory=list)


_TENSORS = ("thumbnails", "wave", "video", "audio")


# ------------------------------------------------------------------ from a model


@dataclass(frozen=True)
class Kept:
    """Entries of one clip that one compressor kept: `video`, `audio` and `heads` as of `KeptEntries`."""

    video: Tensor
    audio: Tensor
    heads: int


@torch.no_grad()
def watch_clip(
    model: Any,
    processor: Any,
    media: Media,
    question: str | None,
    cells: Sequence[tuple[KVCompressor, float]],
    when: When,
    system_prompt: str | None = None,
) -> tuple[list[Kept], tuple[int, int] | None]:
    """What compressors keep of one clip, one prefill for all of them.

    Args:
        question: part of the prompt where `when` is "prompt", else None.
        cells: compressor and ratio.
        system_prompt: what the model is told before the media.

    Returns:
        what each kept, and the rows and columns of video entries in a picture (None where that is not known).
    """
    inputs = encode(processor, [media], None if question is None else [question], system_prompt)
    inputs = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    with KVCompressor(CompressionConfig(policy="full", when=when))(model, processor) as observing:
        shared = observing.prefill(**inputs)
    labels = shared.labels.labels[0].cpu()
    found = []
    for compressor, ratio in cells:
        with compressor(model, processor) as session:
            prefill = session.prefill(**inputs) if session.adapts_prompt else shared
            gates = [torch.isfinite(plan.log_gates[0, :, : len(labels)]).cpu() for plan in session.plan(prefill, ratio)]
        heads = max(len(layer) for layer in gates)
        counts = torch.stack([layer.expand(heads, -1).sum(0) for layer in gates]).to(torch.uint8)
        video, audio = (counts[:, labels == modality] for modality in COMPRESSED)
        found.append(Kept(video, audio, heads))
    return found, _grid(processor, inputs.get("video_grid_thw"), int(shared.labels.counts()[0, 0]))


def _grid(processor: Any, sizes: Tensor | None, entries: int) -> tuple[int, int] | None:
    """Rows and columns of entries in one temporal patch, if `entries` fill whole patches of such a grid."""
    merge = getattr(getattr(processor, "video_processor", None), "merge_size", None)
    if sizes is None or merge is None or len(sizes) != 1:
        return None
    patches, rows, columns = (int(size) for size in sizes[0])
    rows, columns = rows // merge, columns // merge
    return (rows, columns) if patches * rows * columns == entries else None


def thumbnails(frames: Tensor) -> Tensor:
    """Small pictures, the first of each temporal patch: uint8 [at most 16, 3, 72, width].

    Args:
        frames: uint8 [count, 3, height, width].
    """
    patches = len(frames) // TEMPORAL_PATCH
    count = min(patches, _THUMBNAILS)
    chosen = frames[[TEMPORAL_PATCH * (patch * patches // count) for patch in range(count)]]
    width = max(1, round(_THUMBNAIL_HEIGHT * chosen.shape[3] / chosen.shape[2]))
    small = F.interpolate(chosen.float(), (_THUMBNAIL_HEIGHT, width), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)


def envelope(audio: Tensor | None) -> Tensor:
    """Lowest and highest sample of equal stretches of a sound: float16 [2, about 400], none without sound."""
    if audio is None or not len(audio):
        return torch.zeros(2, 0, dtype=torch.float16)
    each = max(1, len(audio) // _WAVE_BINS)
    samples = audio[: len(audio) // each * each].view(-1, each)
    return torch.stack([samples.amin(1), samples.amax(1)]).clamp(-1, 1).half()


# ------------------------------------------------------------------ files


def save_strips(path: str | Path, strips: Sequence[Strip]) -> None:
    """Write strips to one safetensors file, their texts as JSON in its header."""
    tensors: dict[str, Tensor] = {}

    def texts(item: Any, prefix: str) -> dict[str, Any]:
        values = {name: getattr(item, name) for name in item.__dataclass_fields__ if name != "kept"}
        tensors.update({f"{prefix}{name}": values.pop(name).contiguous() for name in _TENSORS if name in values})
        return values

    described = [
        {
            **texts(strip, f"{i}."),
            "kept": [texts(kept, f"{i}.{k}.") for k, kept in enumerate(strip.kept)],
        }
        for i, strip in enumerate(strips)
    ]
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"strips": json.dumps(described, ensure_ascii=False)})


def load_strips(path: str | Path) -> list[Strip]:
    """Read strips.

    Raises:
        InputError: not a file of strips.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            described = json.loads((file.metadata() or {})["strips"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return [_strip(values, f"{i}.", tensors) for i, values in enumerate(described)]
    except FileNotFoundError as error:
        raise InputError("no such file", source=path) from error
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"not a whole file of strips ({error})", source=path) from error


def _strip(values: dict[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> Strip:
    def own(prefix: str) -> dict[str, Any]:
        return {name: tensors[f"{prefix}{name}"] for name in _TENSORS if f"{prefix}{name}" in tensors}

    kept = [KeptEntries(**cell, **own(f"{prefix}{k}.")) for k, cell in enumerate(values.pop("kept"))]
    grid = values.pop("grid")
    return Strip(**values, **own(prefix), grid=None if grid is None else (grid[0], grid[1]), kept=kept)
