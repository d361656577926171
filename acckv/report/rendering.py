"""The templates of the reports, filled in."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


def render(template: str, **values: Any) -> str:
    """A file of `templates/` with these values: in HTML everything is escaped, in Markdown nothing."""
    is_page = template.endswith(".html.jinja")
    environment = Environment(
        loader=PackageLoader("acckv.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=is_page,
        keep_trailing_newline=not is_page,
    )
    environment.filters |= {
        "percent": _percent,
        "share": lambda share: "-" if share is None else f"{share:.1%}",
        "thousands": lambda number: f"{number:,}",
    }
    return environment.get_template(template).render(values)


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f}"
