"""What an evaluation is about: its questions, and every setting that its answers depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning
import torch
import transformers
from torch import Tensor

import acckv
from acckv import KVCompressor
from acckv.data.records import Record
from acckv.errors import InputError

_SAMPLED = 64  # values of each tensor of a model that its digest is made of
_LONGEST = 40  # characters of a setting that a message quotes


@dataclass(frozen=True)
class Setup:
    """What an evaluation is about.

    Attributes:
        settings: by name, what answers depend on; evaluations with the same settings give the same answers.
        model: name of the AV-LLM; benchmark: of the registry, None for questions in the MUSIC-AVQA format.
        vocabulary: words that a one-word answer is looked for in.
        clips: the questions about each clip.
    """

    settings: dict[str, Any]
    model: str
    benchmark: str | None
    vocabulary: list[str]
    clips: list[list[Record]]

    @property
    def cells(self) -> list[tuple[str, float]]:
        """Policy and ratio of each row of the table."""
        return [(policy, ratio) for policy, ratio in self.settings["policies and ratios"]]

    @property
    def batches(self) -> range:
        """Numbers of the batches: clips that are answered together, the same ones however often a run is cut off."""
        return range(-(-len(self.clips) // self.settings["batch_size"]))

    def members(self, number: int) -> range:
        """The clips of a batch."""
        size = self.settings["batch_size"]
        return range(number * size, min((number + 1) * size, len(self.clips)))

    def files(self, number: int) -> list[list[list[int] | None]]:
        """By clip of a batch, size and time of the last change of each media file; None for one that is not there."""
        return [[_stamp(file) for file in _media_files(self.clips[clip][0])] for clip in self.members(number)]

    def check(self, number: int, parts: Iterable[Sequence[tuple[int, int]]], failed: Collection[int]) -> None:
        """Whether every question of a batch was answered once, those about clips that could not be read left out.

        Raises:
            ValueError: it was not.
        """
        expected = [(c, place) for c in self.members(number) if c not in failed for place in range(len(self.clips[c]))]
        if number not in self.batches or sorted(pair for part in parts for pair in part) != expected:
            raise ValueError("other questions")

    def differences(self, other: Setup) -> str:
        """The settings in which another evaluation differs, short values beside their names; empty if in none."""
        named = []
        for name in dict.fromkeys([*self.settings, *other.settings]):
            one, two = (json.dumps(setup.settings.get(name)) for setup in (self, other))
            if one != two:
                long = max(len(one), len(two)) > _LONGEST or "weights" in name or name == "questions"
                named.append(name if long else f"{name}: {one} instead of {two}")
        return ", ".join(named)

    def as_json(self) -> dict[str, Any]:
        records = [[_as_json(record) for record in clip] for clip in self.clips]
        return {
            **{name: getattr(self, name) for name in ("settings", "model", "benchmark", "vocabulary")},
            "clips": records,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], source: Path) -> Setup:
        """The inverse of `as_json`.

        Raises:
            InputError: something is missing, with the file `source`.
        """
        try:
            clips = [[_record(record) for record in clip] for clip in values["clips"]]
            return cls(values["settings"], values["model"], values["benchmark"], values["vocabulary"], clips)
        except (KeyError, TypeError) as error:
            raise InputError(f"is damaged ({error}); remove the folder", source=source) from error


def describe_settings(
    clips: Sequence[Sequence[tuple[Record, str]]],
    cells: Sequence[tuple[str, float, KVCompressor]],
    model: Any,
    **options: Any,
) -> dict[str, Any]:
    """The settings of an evaluation, as JSON holds them.

    Args:
        clips: the questions about each clip, with what the model reads for them.
        cells: policy, ratio and compressor of each row; model: with its weights.
        options: what else answers depend on, by name.
    """
    compressors = {policy: compressor for policy, _, compressor in cells}
    questions = [{**_as_json(record), **_file_names(record), "prompt": text} for clip in clips for record, text in clip]
    settings = {
        **options,
        "clips": len(clips),
        "questions": _digest(questions),
        "policies and ratios": [[policy, ratio] for policy, ratio, _ in cells],
        "model weights": _model_digest(model),
        "compressor weights": {policy: _compressor_digest(compressor) for policy, compressor in compressors.items()},
        "versions": [f"{module.__name__} {module.__version__}" for module in (acckv, torch, transformers, lightning)],
    }
    return json.loads(json.dumps(settings))


def _model_digest(model: Any) -> str:
    """Of names, shapes and a sample of the values of all weights: another checkpoint has another digest."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        _add(hashed, name, flat[:: max(1, flat.numel() // _SAMPLED)], tensor.shape)
    return hashed.hexdigest()[:16]


def _compressor_digest(compressor: KVCompressor) -> str:
    """Of everything that a compressor decides by."""
    hashed = hashlib.sha256(_digest([asdict(compressor.config), compressor.lora_scope]).encode())
    tensors = dict(compressor.state_dict())
    for part, one in (("", compressor), ("low_ratio.", compressor.low_ratio)):
        if one is not None and one.lora is not None:
            hashed.update(_digest(one.lora.config.to_dict()).encode())
            tensors |= {f"{part}lora.{name}": tensor for name, tensor in one.lora.tensors.items()}
    hashed.update(str(compressor.planners.below).encode())
    for name, tensor in sorted(tensors.items()):
        _add(hashed, name, tensor, tensor.shape)
    return hashed.hexdigest()[:16]


def _add(hashed: Any, name: str, values: Tensor, shape: torch.Size) -> None:
    hashed.update(f"{name} {tuple(shape)} {values.dtype}".encode())
    hashed.update(values.detach().double().cpu().contiguous().numpy().tobytes())


def _digest(values: Any) -> str:
    text = json.dumps(
        values, sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _as_json(record: Record) -> dict[str, Any]:
    return json.loads(json.dumps(asdict(record), default=str))


def _record(values: Mapping[str, Any]) -> Record:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    fields["video"] = Path(values["video"])
    fields["audio"] = Path(values["audio"]) if values["audio"] else None
    fields["attachments"] = tuple(Path(file) for file in values["attachments"])
    return Record(**fields)


def _file_names(record: Record) -> dict[str, Any]:
    """Media by name alone: shards on several machines may keep them in different folders."""
    audio = None if record.audio is None else record.audio.name
    return {"video": record.video.name, "audio": audio, "attachments": [file.name for file in record.attachments]}


def _media_files(record: Record) -> list[Path]:
    return [record.video, *([] if record.audio is None else [record.audio]), *record.attachments]


def _stamp(file: Path) -> list[int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
