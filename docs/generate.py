"""What pages hold that is made from the code: the policies from their registry, the architecture from the imports.

    python docs/generate.py

writes the section of `docs/policies.md` between its marks, and `docs/assets/architecture.svg`.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping
from dataclasses import Field, fields
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE, DRAWING = ROOT / "docs/policies.md", ROOT / "docs/assets/architecture.svg"
MARKS = ("<!-- policies: written by docs/generate.py -->", "<!-- end of policies -->")

# ------------------------------------------------------------------ policies


def policies() -> str:
    """A table of all policies of this package, then each with its options and how it differs from its paper."""
    from acckv.policies import POLICIES, Policy

    common = {item.name for item in fields(Policy)}
    own = {name: policy for name, policy in POLICIES.items() if policy.__module__.startswith("acckv.")}
    lines = ["| policy | keeps | reads |", "|---|---|---|"]
    for name, policy in own.items():
        lines.append(f"| [`{name}`](#{name}) | {_title(policy)} | {_reads(policy)} |")
    for name, policy in own.items():
        lines += ["", f"## {name}", "", f"**{_title(policy)}**", "", _text(policy)]
        options = [item for item in fields(policy) if "help" in item.metadata and item.name not in common]
        if options:
            lines += ["", "| option | default | |", "|---|---|---|", *map(_option, options)]
    return "\n".join(lines) + "\n"


def _title(policy: type) -> str:
    """The first line of a policy's file, its paper as a link."""
    text = (sys.modules[policy.__module__].__doc__ or "").splitlines()[0].rstrip(".")
    return _markdown(re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text))


def _text(policy: type) -> str:
    """A policy's docstring as paragraphs."""
    text = ast.get_docstring(ast.parse(f'class _:\n    """{policy.__doc__}"""').body[0]) or ""  # type: ignore[arg-type]
    return _markdown(re.sub(r"(?m)^Args:.*", "", text, flags=re.DOTALL).strip())


def _markdown(text: str) -> str:
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", text).replace("``", "`").replace("\\ ", "")
    return re.sub(r"`([^`]+)`s\b", r"`\1`s", text)


def _reads(policy: type) -> str:
    """The queries that a policy observes."""
    queries = getattr(policy, "queries", "none")
    names = {
        "none": "keys and values alone",
        "window": "the last queries",
        "text": "queries of the text",
        "all": "all queries",
        "reconstruction": "queries of the context fed in again",
    }
    read = names[queries] if isinstance(queries, str) else "queries of the text, or keys alone"
    return f"{read}; waits for the last layer" if getattr(policy, "cross_layer", False) else read


def _option(item: Field[object]) -> str:
    default = "none" if item.default is None else str(item.default)
    default = default.lower() if isinstance(item.default, bool) else default
    return f"| `{item.name}` | {default} | {_markdown(item.metadata['help'])} |"


def with_section(page: str, text: str) -> str:
    """A page whose section between the marks is `text`."""
    before, start, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if not start or not end:
        raise SystemExit(f"{PAGE} has no section between {MARKS[0]} and {MARKS[1]}")
    return f"{before}{start}\n\n{text}\n{end}{after}"


# ------------------------------------------------------------------ architecture

WIDTH, HEIGHT, GAP, FLOOR = 118, 34, 14, 62


def rooms() -> dict[str, set[str]]:
    """Package or top-level module -> those that it imports."""
    files = [file for package in ("acckv", "lightning_modules") for file in (ROOT / package).rglob("*.py")]
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    public = _names(ast.parse(modules["acckv"].read_text(encoding="utf-8")))  # such as acckv.KVCompressor
    homes = {f"acckv.{name.rpartition('.')[2]}": name.rpartition(".")[0] for name in public}
    graph: dict[str, set[str]] = {}
    for name, file in modules.items():
        here = _room(name)
        if here in ("acckv", "lightning_modules"):
            continue
        names = _names(ast.parse(file.read_text(encoding="utf-8")))
        graph.setdefault(here, set()).update(_room(homes.get(one, one)) for one in names)
    return {name: found & set(graph) - {name} for name, found in graph.items()}


def _names(tree: ast.AST) -> set[str]:
    """Dotted names that a file imports; those of an import from a module are that module's."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _room(module: str) -> str:
    first, _, rest = module.partition(".")
    part = rest.partition(".")[0]
    return part if first == "acckv" and part else f"{first}.{part}" if part else first


def floors(graph: Mapping[str, set[str]]) -> dict[str, int]:
    """How many rooms stand one above another down to each; 0 for one that imports nothing."""
    height: dict[str, int] = {}
    while len(height) < len(graph):
        ready = [name for name in graph if name not in height and graph[name] <= set(height)]
        if not ready:
            raise SystemExit(f"a circle among {', '.join(sorted(set(graph) - set(height)))}")
        height |= {name: 1 + max((height[other] for other in graph[name]), default=-1) for name in ready}
    return height


def reduced(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The arrows that no longer way of arrows stands for."""

    def below(name: str) -> set[str]:
        return graph[name].union(*(below(other) for other in graph[name]))

    return {
        name: {one for one in found if not any(one in below(other) for other in found)} for name, found in graph.items()
    }


def drawing(graph: Mapping[str, set[str]]) -> str:
    """An SVG: a room stands above all that it imports; arrows that others stand for are left out."""
    height, arrows = floors(graph), reduced(graph)
    top = max(height.values())
    rows = [sorted(name for name in graph if height[name] == floor) for floor in range(top, -1, -1)]
    width = max(len(row) for row in rows) * (WIDTH + GAP) + GAP
    at: dict[str, tuple[float, float]] = {}
    for number, row in enumerate(rows):
        users = {name: [at[other][0] for other in at if name in arrows[other]] for name in row}
        row.sort(key=lambda name: (sum(users[name]) / len(users[name]) if users[name] else width / 2, name))
        left = (width - len(row) * (WIDTH + GAP) + GAP) / 2
        at |= {name: (left + place * (WIDTH + GAP), GAP + number * FLOOR) for place, name in enumerate(row)}
    total = GAP + top * FLOOR + HEIGHT + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {total:g}" '
        'font-family="sans-serif" font-size="13">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#888"/></marker></defs>',
        f'<rect width="{width:g}" height="{total:g}" fill="#fff"/>',
    ]
    for name, found in sorted(arrows.items()):
        for other in sorted(found):
            (x, y), (to_x, to_y) = at[name], at[other]
            x, to_x, y = x + WIDTH / 2, to_x + WIDTH / 2, y + HEIGHT
            bend = (to_y - y) / 2
            path = f"M{x:g} {y:g}C{x:g} {y + bend:g} {to_x:g} {to_y - bend:g} {to_x:g} {to_y:g}"
            parts.append(f'<path d="{path}" fill="none" stroke="#888" marker-end="url(#tip)"/>')
    for name, (x, y) in sorted(at.items()):
        fill = "#fde8d7" if name.startswith("lightning_modules") else "#dcebf7"
        label = escape(name.removeprefix("lightning_modules."))
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="{fill}" stroke="#555"/>'
        )
        parts.append(f'<text x="{x + WIDTH / 2:g}" y="{y + 22:g}" text-anchor="middle">{label}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    PAGE.write_text(with_section(PAGE.read_text(encoding="utf-8"), policies()), encoding="utf-8")
    DRAWING.write_text(drawing(rooms()), encoding="utf-8")


if __name__ == "__main__":
    main()
