"""The export: config.json, model.safetensors, adapter/, the same two in low_ratio/, asked.json, and a model card. No
pickle, no half-written file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from acckv.config import CompressionConfig, LoraScope, from_options, option_fields
from acckv.data.asked_questions import AskedQuestions
from acckv.data.calibration_record import FIELD, CalibrationRecord
from acckv.errors import InputError
from acckv.io.files import whole_folder
from acckv.io.hub import download, is_hub_id
from acckv.io.json_files import read_json
from acckv.io.typed import read_versioned, write_versioned
from acckv.method.weights import MAY_BE_ABSENT, CalibratedWeights
from acckv.policies import POLICIES, Policy
from acckv.report.card import render_card
from acckv.runtime.lora import LoraWeights

FORMAT = 4
CONFIG, WEIGHTS, ADAPTER, CARD = "config.json", "model.safetensors", "adapter", "README.md"
#: The questions that calibration asked: absent of a calibration without questions, and of older exports.
ASKED, ASKED_FORMAT = "asked.json", 1
#: Folder of the weights and the adapter of the lowest ratios, where they have their own.
LOW_RATIO = "low_ratio"
_REQUIRED = ("format", "policy", "compression", "base", "lora_scope", "has_weights", "has_lora", "low_ratio_below")
_BASE = ("name", "layers", "query_heads", "kv_heads", "head_size")


@dataclass
class LowRatio:
    """Weights and LoRA of the lowest ratios.

    Args:
        below: ratios below it use it.
        weights, lora: as those of an :class:`Export`.
    """

    below: float
    weights: CalibratedWeights | None
    lora: LoraWeights | None = None


@dataclass
class Export:
    """The contents of an export folder.

    Args:
        policy: with its options.
        config: the options that all policies share.
        weights: what calibration learned, or None for a training-free policy.
        lora: the adapter that goes with the weights, or None.
        lora_scope: 'after' adapts only tokens after compression, 'all' the prompt too.
        base: where the weights belong: ``{"name", "layers", "query_heads", "kv_heads", "head_size"}``.
        low_ratio: of the lowest ratios, where those have their own, or None.
        calibration: what the weights were calibrated on; None where that is not known.
        asked: the questions that calibration asked; None where it asked none, or that is not known.
    """

    policy: Policy
    config: CompressionConfig
    weights: CalibratedWeights | None
    lora: LoraWeights | None
    lora_scope: LoraScope
    base: dict[str, Any] | None
    low_ratio: LowRatio | None
    calibration: CalibrationRecord | None
    asked: AskedQuestions | None


def save(export: Export, folder: Path) -> None:
    """Write `export` to `folder`: into a folder beside it first, then moved, so that a stop leaves no half export.

    Raises:
        InputError: `folder` holds something that is no export.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).is_file())):
        raise InputError("exists and is no export; choose another folder", source=folder)
    config = {
        "format": FORMAT,
        "base": export.base,
        "policy": {"name": export.policy.name, "options": export.policy.options},
        "compression": asdict(export.config),
        "lora_scope": export.lora_scope,
        "has_weights": export.weights is not None,
        "has_lora": export.lora is not None,
        "low_ratio_below": 0.0 if export.low_ratio is None else export.low_ratio.below,
        "has_asked": export.asked is not None,
        FIELD: None if export.calibration is None else asdict(export.calibration),
    }
    with whole_folder(folder) as staging:
        (staging / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        _write_learned(export, staging)
        if export.low_ratio is not None:
            (staging / LOW_RATIO).mkdir()
            _write_learned(export.low_ratio, staging / LOW_RATIO)
        if export.asked is not None:
            write_versioned(staging / ASKED, export.asked, ASKED_FORMAT, indent=1)
        (staging / CARD).write_text(render_card(config))


def _write_learned(part: Export | LowRatio, folder: Path) -> None:
    if part.weights is not None:
        tensors = {
            name: tensor.detach().cpu().contiguous()
            for name, tensor in part.weights.state_dict().items()
            if name not in MAY_BE_ABSENT or bool(tensor.any())
        }
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if part.lora is not None:
        (folder / ADAPTER).mkdir()
        part.lora.config.save_pretrained(str(folder / ADAPTER))
        save_file(part.lora.tensors, folder / ADAPTER / "adapter_model.safetensors", metadata={"format": "pt"})


def load(name: str | Path, options: dict[str, Any] | None = None) -> Export:
    """Read an export.

    Args:
        name: a folder, or the id of a hub repository.
        options: of the policy, or shared by all, that replace the saved ones.

    Raises:
        InputError: a missing, truncated or malformed file, or an unknown format version; it names file and field.
    """
    folder = _folder(name)
    config = _read_config(folder / CONFIG)
    source = folder / CONFIG
    policy, compression = _read_options(config, options or {}, source)
    base, below = config["base"], config["low_ratio_below"]
    if config["has_weights"] and (not isinstance(base, dict) or not all(key in base for key in _BASE)):
        raise InputError(f"must hold {', '.join(_BASE)}", source=source, field="base")
    calibration = CalibrationRecord.from_dict(config.get(FIELD), source)
    weights, lora = _load_learned(config, policy, folder)
    low_ratio = LowRatio(below, *_load_learned(config, policy, folder / LOW_RATIO)) if below else None
    asked = read_versioned(AskedQuestions, folder / ASKED, ASKED_FORMAT) if config.get("has_asked") else None
    return Export(policy, compression, weights, lora, config["lora_scope"], base, low_ratio, calibration, asked)


def _read_options(config: dict[str, Any], options: dict[str, Any], source: Path) -> tuple[Policy, CompressionConfig]:
    """The policy and the shared options, with those of `options` in place of the saved ones."""
    named, shared = config["policy"], option_fields(CompressionConfig)
    own = {name: value for name, value in options.items() if name not in shared}
    replaced = {name: value for name, value in options.items() if name in shared}
    try:
        kind = POLICIES.find(named["name"])
        policy = from_options(kind, {**named["options"], **own}, kind.name)
        return policy, from_options(CompressionConfig, {**config["compression"], **replaced}, "a compression")
    except InputError as error:
        raise InputError(str(error), source=source) from error


def _load_learned(
    config: dict[str, Any], policy: Policy, folder: Path
) -> tuple[CalibratedWeights | None, LoraWeights | None]:
    weights, base = None, config["base"]
    if config["has_weights"]:
        try:
            weights = policy.new_weights(base["layers"], base["kv_heads"], base["query_heads"], base["head_size"])
        except InputError as error:
            raise InputError(str(error), source=folder / CONFIG) from error
        _load_tensors(weights, folder / WEIGHTS)
    return weights, LoraWeights.load(folder / ADAPTER) if config["has_lora"] else None


def _folder(name: str | Path) -> Path:
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not is_hub_id(name):
        raise InputError("is no export folder", source=name)
    return download(
        str(name), "a hub repository", allow_patterns=[CONFIG, WEIGHTS, f"{ADAPTER}/*", f"{LOW_RATIO}/*", ASKED, CARD]
    )


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise InputError("is missing; the folder is no export", source=file)
    config = read_json(file)
    if not isinstance(config, dict):
        raise InputError("must hold a JSON object", source=file)
    if config.get("format", FORMAT) != FORMAT:
        raise InputError(
            f"version {config['format']!r} is unknown; this acckv reads {FORMAT}: calibrate anew",
            source=file,
            field="format",
        )
    for field in _REQUIRED:
        if field not in config:
            raise InputError("is missing", source=file, field=field)
    if config["lora_scope"] not in get_args(LoraScope):
        raise InputError(f"{config['lora_scope']!r} is not 'after' or 'all'", source=file, field="lora_scope")
    below = config["low_ratio_below"]
    if not isinstance(below, int | float) or not 0 <= below <= 1:
        raise InputError(f"{below!r} is not 0 to 1", source=file, field="low_ratio_below")
    if below and config["lora_scope"] == "all":
        raise InputError("is 'all', which does not go with low_ratio_below", source=file, field="lora_scope")
    for field in ("policy", "compression"):
        if not isinstance(config[field], dict):
            raise InputError("must be a JSON object", source=file, field=field)
    if not isinstance(config["policy"].get("name"), str) or not isinstance(config["policy"].get("options"), dict):
        raise InputError("must hold a name and options", source=file, field="policy")
    return config


def _load_tensors(weights: CalibratedWeights, file: Path) -> None:
    if not file.is_file():
        raise InputError("is missing; the export is incomplete", source=file)
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise InputError(f"is truncated or no safetensors file: {error}", source=file) from error
    expected = weights.state_dict()
    for name, tensor in expected.items():
        if name in MAY_BE_ABSENT:
            tensors.setdefault(name, torch.zeros_like(tensor))
        if name not in tensors:
            raise InputError("is missing", source=file, field=name)
        if tensors[name].shape != tensor.shape:
            raise InputError(
                f"has shape {list(tensors[name].shape)}, not {list(tensor.shape)}", source=file, field=name
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise InputError("holds values that are not finite", source=file, field=name)
    for name in tensors:
        if name not in expected:
            raise InputError("is no weight of a compressor", source=file, field=name)
    weights.load_state_dict(tensors)
