"""Hooks of mkdocs: pages that the repository holds elsewhere, and what its docstrings write otherwise than Markdown."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
#: Page of the site -> file of the repository.
ELSEWHERE = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
#: Pictures that benchmarks write beside their numbers, as pages link them, and where the site has them.
RESULTS, PICTURES = "../benchmarks/results/", "assets/results/"


def on_files(files: Files, config: Any) -> Files:
    """The README is the first page; pictures of results are part of the site."""
    for page, name in ELSEWHERE.items():
        files.append(File.generated(config, page, content=relink((ROOT / name).read_text(encoding="utf-8"))))
    for picture in sorted((ROOT / "benchmarks/results").glob("*.png")):
        files.append(File.generated(config, PICTURES + picture.name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links as the site has them."""
    return markdown.replace(f"({RESULTS}", f"({PICTURES}")


def on_page_content(html: str, **_: Any) -> str:
    """Roles such as ``:class:`` before a name in a docstring are no Markdown."""
    return re.sub(r":(?:class|func|meth|mod|data|attr):(?=<code>)", "", html)


def relink(text: str) -> str:
    """A file of the root as a page of the site."""
    for page, name in ELSEWHERE.items():
        text = text.replace(f"]({name})", f"]({page})")
    return text.replace("](docs/", "](")
