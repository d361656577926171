"""Kept-entries timelines: which entries of single clips settings kept, with the pictures and the sound they stand for.

Kept as `timelines.safetensors` beside an evaluation's results, so that a report can be made again without a model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from acckv.errors import InputError
from acckv.io.files import whole_file
from acckv.io.json_files import parse_json
from acckv.method.modality import COMPRESSED
from acckv.models.clips import TEMPORAL_PATCH
from acckv.runtime.session import Session

TIMELINES_FILE = "timelines.safetensors"
_THUMBNAILS = 16
_THUMBNAIL_HEIGHT = 72
_WAVE_BINS = 400


@dataclass(frozen=True)
class KeptEntries:
    """The entries of a clip that one setting kept.

    Attributes:
        policy, ratio: of the setting.
        prediction: its answer to the timeline's question; score: of that answer, 0..1.
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
        bin_of = torch.arange(kept.shape[1]) * bins // kept.shape[1]
        sums = torch.zeros(len(kept), bins).index_add_(1, bin_of, kept)
        return sums / torch.bincount(bin_of, minlength=bins).clamp_min(1)


@dataclass(frozen=True)
class Timeline:
    """One clip, one question about it, and the entries that some settings kept.

    Attributes:
        clip: file name; question, answer, full_answer: asked, right, and given from the full cache.
        seconds: length of the clip as the model saw it.
        patches: stretches of time that the video entries fall into, equally many entries each.
        grid: rows and columns of entries in one patch's picture; None where that is not known.
        thumbnails: uint8 [count, 3, height, width], evenly spread over the patches.
        wave: float16 [2, bins] lowest and highest sample of each stretch of time, -1..1; no bins without sound.
        kept: of each setting.
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


@torch.no_grad()
def measure_kept(
    inputs: Mapping[str, Any], full: Callable[[], Session], sessions: Sequence[tuple[Callable[[], Session], float]]
) -> list[tuple[Tensor, Tensor, int]]:
    """The entries of one clip that compressors keep; one prefill serves all that do not adapt the prompt.

    Args:
        inputs: model inputs of the clip.
        full: opens a session that keeps everything; sessions: that of each compressor, with a ratio.

    Returns:
        `video`, `audio` and `heads` of `KeptEntries`, for each of the sessions.
    """
    with full() as session:
        shared = session.prefill(**inputs)
    labels = shared.labels.labels[0].cpu()
    found = []
    for opened, ratio in sessions:
        with opened() as session:
            prefill = session.prefill(**inputs) if session.adapts_prompt else shared
            gates = [torch.isfinite(plan.log_gates[0, :, : len(labels)]).cpu() for plan in session.plan(prefill, ratio)]
        heads = max(len(layer) for layer in gates)
        counts = torch.stack([layer.expand(heads, -1).sum(0) for layer in gates]).to(torch.uint8)
        video, audio = (counts[:, labels == modality] for modality in COMPRESSED)
        found.append((video, audio, heads))
    return found


def picture_grid(processor: Any, sizes: Tensor | None, entries: int) -> tuple[int, int] | None:
    """Rows and columns of entries in one temporal patch, if `entries` fill whole patches of such a grid."""
    merge = getattr(getattr(processor, "video_processor", None), "merge_size", None)
    if sizes is None or merge is None or len(sizes) != 1:
        return None
    patches, rows, columns = (int(size) for size in sizes[0])
    rows, columns = rows // merge, columns // merge
    return (rows, columns) if patches * rows * columns == entries else None


def thumbnails(frames: Tensor) -> Tensor:
    """Of uint8 frames [count, 3, height, width], the first of each temporal patch: uint8 [at most 16, 3, 72, width]."""
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


def save_timelines(path: str | Path, timelines: Sequence[Timeline]) -> None:
    """Write timelines to one safetensors file, their texts as JSON in its header."""
    tensors: dict[str, Tensor] = {}

    def texts(item: Any, prefix: str) -> dict[str, Any]:
        values = {name: getattr(item, name) for name in item.__dataclass_fields__ if name != "kept"}
        tensors.update({f"{prefix}{name}": values.pop(name).contiguous() for name in _TENSORS if name in values})
        return values

    described = [
        {
            **texts(timeline, f"{i}."),
            "kept": [texts(kept, f"{i}.{k}.") for k, kept in enumerate(timeline.kept)],
        }
        for i, timeline in enumerate(timelines)
    ]
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"timelines": json.dumps(described, ensure_ascii=False)})


def load_timelines(path: str | Path) -> list[Timeline]:
    """Read timelines.

    Raises:
        InputError: not a file of timelines.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            described = parse_json((file.metadata() or {})["timelines"], path, "timelines")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return [_timeline(values, f"{i}.", tensors) for i, values in enumerate(described)]
    except FileNotFoundError as error:
        raise InputError("no such file", source=path) from error
    except (SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"not a whole file of timelines ({error})", source=path) from error


def _timeline(values: dict[str, Any], prefix: str, tensors: Mapping[str, Tensor]) -> Timeline:
    def own(prefix: str) -> dict[str, Any]:
        return {name: tensors[f"{prefix}{name}"] for name in _TENSORS if f"{prefix}{name}" in tensors}

    kept = [KeptEntries(**each, **own(f"{prefix}{k}.")) for k, each in enumerate(values.pop("kept"))]
    grid = values.pop("grid")
    return Timeline(**values, **own(prefix), grid=None if grid is None else (grid[0], grid[1]), kept=kept)
