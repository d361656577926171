"""Rows of results that were never measured."""

from __future__ import annotations

from acckv.evaluation.results import GroupScore, Row


def table_row(policy: str, ratio: float, accuracy: float, half: float = 0.02) -> Row:
    """480 questions, of whose kinds one has no score; 272 entries a clip."""
    return Row(
        policy=policy,
        ratio=ratio,
        n=480,
        accuracy=accuracy,
        relative=accuracy / 0.96,
        ci95=(max(0.0, accuracy - half), min(1.0, accuracy + half)),
        kept_entries=272 * ratio,
        full_entries=272.0,
        kv_bytes=18_432 + round(3072 * 272 * ratio),
        groups={"Visual": GroupScore(300, accuracy), "Audio/Pitch": GroupScore(180, None)},
    )
