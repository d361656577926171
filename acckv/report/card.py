"""The model card of an exported compressor (README.md beside its weights)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from acckv.data.calibration_record import FIELD, CalibrationRecord
from acckv.errors import InputError
from acckv.evaluation.results import Results, Row
from acckv.io.files import whole_file
from acckv.report.table import control_warning

CARD_FILE = "README.md"
COMPRESSED = {
    "context": "after the media, before any question is seen",
    "prompt": "after the whole prompt, question included",
}
"""Option `when` -> what is compressed, in words."""


def render_card(
    config: Mapping[str, Any],
    rows: Sequence[Row] = (),
    *,
    setting: str | None = None,
    command: str | None = None,
) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        config: the export's `config.json`, parsed; read are `base` (its `name`), `compression`, `calibration`,
            `has_weights`, `lora_scope` and `low_ratio_below`.
        rows: of an evaluation, for the table; none where nothing has been measured yet.
        setting: what was measured, in one sentence, above the table.
        command: the command that the table came from.

    Raises:
        InputError: `calibration` is ill-formed.
    """
    environment = Environment(
        loader=PackageLoader("acckv.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    base = config.get("base") or {}
    compression = config.get("compression") or {}
    when = compression.get("when", "context")
    warning = control_warning(Results(str(base.get("name")), "", when, 0, list(rows))) if rows else None
    return environment.get_template("card.md.jinja").render(
        base_model=base.get("name") or "unknown",
        lora_scope=config.get("lora_scope") if config.get("has_lora") else None,
        low_ratio_below=config.get("low_ratio_below"),
        options=compression,
        has_weights=config.get("has_weights", False),
        calibration=CalibrationRecord.from_dict(config.get(FIELD)),
        when=when,
        compressed=COMPRESSED[when],
        rows=[_cells(row) for row in rows],
        setting=setting,
        command=command,
        warning=warning,
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
    setting = None
    if results is not None and results.rows:
        setting = (
            f"Benchmark `{results.benchmark}` on `{results.model}`, `when: {results.when}`, "
            f"{results.rows[0].n} questions, seed {results.seed}."
        )
    text = render_card(config, results.rows if results else (), setting=setting, command=command)
    with whole_file(folder / CARD_FILE) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return folder / CARD_FILE


def _cells(row: Row) -> dict[str, str]:
    return {
        "policy": row.policy,
        "ratio": f"{row.ratio:g}",
        "accuracy": f"{row.accuracy:.1%}",
        "interval": f"{row.ci95[0]:.1%} to {row.ci95[1]:.1%}",
        "relative": "-" if row.relative is None else f"{row.relative:.1%}",
        "entries": f"{row.kept_entries:.1f} / {row.full_entries:.0f}",
        "bytes": f"{row.kv_bytes:,}",
    }
