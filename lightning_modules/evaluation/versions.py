"""Versions of all that an evaluation's numbers depend on."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import acckv


def versions() -> dict[str, str]:
    """By package; "commit" where acckv runs from a git checkout."""
    found = {"python": platform.python_version(), "acckv": acckv.__version__}
    commit = _commit(Path(acckv.__file__).resolve().parent)
    if commit is not None:
        found["commit"] = commit
    return found | {name: version(name) for name in ("torch", "transformers", "lightning", "peft")}


def _commit(folder: Path) -> str | None:
    """Commit of the checkout that holds `folder`, with "+changes" where tracked files differ; None outside of one."""
    if not (folder.parent / ".git").exists():
        return None

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(folder), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):  # no git here: the version alone has to do
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changed else commit
