"""The model card of an exported compressor (README.md beside its weights)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from acckv.errors import InputError
from acckv.report.files import whole_file
from acckv.report.results import Results, Row
from acckv.report.table import control_warning

CARD_FILE = "README.md"


def render_card(config: Mapping[str, Any], results: Results | None = None, *, command: str | None = None) -> str:
    """The card as Markdown with YAML front matter.

    Args:
        config: the export's `config.json`, parsed. Read are, where present: `base_model` ({"name", "revision", ..}
            or a text), `format`/`format_version`, `compression` (the options).
        results: the measured table; without it the card says that nothing has been measured yet.
        command: the command that the table came from.
    """
    environment = Environment(
        loader=PackageLoader("acckv.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML
    )
    base = config.get("base_model")
    name = base.get("name") if isinstance(base, Mapping) else base
    revision = base.get("revision") if isinstance(base, Mapping) else None
    options = config.get("compression")
    compression = options if isinstance(options, Mapping) else {}
    return environment.get_template("card.md.jinja").render(
        base_model=name or "unknown",
        revision=revision,
        options=compression,
        when=compression.get("when", config.get("when", "context")),
        results=results,
        rows=[] if results is None else [_cells(row) for row in results.rows],
        warning=None if results is None else control_warning(results),
        command=command,
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
    text = render_card(config, results, command=command)
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
