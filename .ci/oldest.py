"""The lower bounds of pyproject.toml as pip constraints: `pip install -c oldest.txt -e ".[test]"`."""

import re
import sys
import tomllib
from pathlib import Path


def oldest(file: Path) -> list[str]:
    """`name==release` for every dependency, those of the tests included."""
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    pinned = set()
    for requirement in [*project["dependencies"], *project["optional-dependencies"]["test"]]:
        bound = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?>=([\w.]+)(?:,<[\w.]+)?", requirement)
        if bound is None:
            sys.exit(f"{file}: {requirement} has no lower bound")
        pinned.add("==".join(bound.groups()))
    return sorted(pinned)


if __name__ == "__main__":
    print("\n".join(oldest(Path(__file__).resolve().parent.parent / "pyproject.toml")))
