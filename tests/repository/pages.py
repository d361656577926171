"""The README and the pages of docs/: their code blocks, and the words that they set as code."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.paths import ROOT

#: In a fence's title: the block is not run, its names and options are checked.
NEEDS = "needs "
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Args:
        page, line: where it begins; language, title: of its fence.
    """

    page: Path
    line: int
    language: str
    title: str
    code: str

    @property
    def name(self) -> str:
        return f"{self.page.name}:{self.line}"

    @property
    def runs(self) -> bool:
        return NEEDS not in self.title


def blocks(page: Path, language: str) -> list[Block]:
    """The blocks of a language, in order."""
    text = page.read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w+)(?: title=\"([^\"]*)\")?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    every = (Block(page, text[: match.start()].count("\n") + 1, match[1], match[2] or "", match[3]) for match in found)
    return [block for block in every if block.language == language]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def spans(page: Path) -> Iterator[str]:
    """What is set as code inside a line or over two."""
    for match in re.finditer(r"`([^`]+)`", prose(page)):
        yield " ".join(match[1].split())


def commands(block: Block) -> list[list[str]]:
    """The commands of a shell block, each as its words: comments, continuations and `&&` are taken apart."""
    joined = block.code.replace("\\\n", " ")
    lines = [part for line in joined.splitlines() for part in re.split(r"\s&&\s|\|", line)]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]
