"""Ctrl-C, as it looks from outside of a Trainer."""

from __future__ import annotations


def was_interrupted(error: BaseException) -> bool:
    """Whether an exception comes of Ctrl-C; a Trainer makes a `SystemExit` of it."""
    return isinstance(error, KeyboardInterrupt) or (
        isinstance(error, SystemExit) and isinstance(error.__context__, KeyboardInterrupt)
    )
