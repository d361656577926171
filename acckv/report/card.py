"""The model card of an exported compressor (README.md beside its weights)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from acckv.data.calibration_record import FIELD, CalibrationRecord
from acckv.errors import InputError
from acckv.evaluation.results import Results
from acckv.io.files import write_text
from acckv.report.rendering import render
from acckv.report.table import all_warnings

CARD_FILE = "README.md"


def render_card(config: Mapping[str, Any], results: Results | None = None, command: str | None = None) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        config: the export's `config.json`, parsed; read are `base` (its `name`), `compression`, `calibration`,
            `has_weights`, `has_lora`, `has_asked`, `lora_scope` and `low_ratio_below`.
        results: of an evaluation, for the table; None where nothing has been measured yet.
        command: the command that the results came from.

    Raises:
        InputError: `calibration` is ill-formed.
    """
    measured = results if results and results.rows else None
    options = config.get("compression") or {}
    return render(
        "card.md.jinja",
        base_model=(config.get("base") or {}).get("name") or "unknown",
        lora_scope=config.get("lora_scope") if config.get("has_lora") else None,
        low_ratio_below=config.get("low_ratio_below"),
        options=options,
        has_weights=config.get("has_weights", False),
        has_asked=config.get("has_asked", False),
        calibration=CalibrationRecord.from_dict(config.get(FIELD)),
        when=options.get("when", "context"),
        results=measured,
        command=command,
        warnings=all_warnings(measured) if measured else [],
    )


def write_card(
    folder: str | Path, config: Mapping[str, Any], results: Results | None = None, *, command: str | None = None
) -> Path:
    """Write the card into an export folder; returns its path.

    Raises:
        InputError: the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError("no such folder", source=folder)
    write_text(folder / CARD_FILE, render_card(config, results, command))
    return folder / CARD_FILE
