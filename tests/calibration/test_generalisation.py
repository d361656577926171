"""Generalisation over all variants of the clips is measured beside the best training-free policy, and written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from acckv.evaluation.results import read_results
from acckv.models import load_model
from benchmarks.generalisation import main
from tests.learned import calibrated


def test_compares_with_the_best_training_free_policy(tmp_path: Path) -> None:
    calibrated(load_model("tiny")[0]).save_pretrained(tmp_path / "export")
    output = tmp_path / "out"
    main(
        [
            *("--compressor", str(tmp_path / "export"), "--output", str(output), "--variants", "silent,blank"),
            *("--policies", "random,keydiff", "--ratios", "0.1", "--clips", "1", "--accelerator", "cpu"),
            *("--cache-dir", str(tmp_path / "clips")),
        ]
    )
    rows = json.loads((output / "generalisation.json").read_text())["rows"]
    assert [(row["variant"], row["ratio"]) for row in rows] == [("silent", 0.1), ("blank", 0.1)]
    for row in rows:
        results = read_results(output / row["variant"] / "results.json")
        assert results.full is not None and row["full"] == results.full.accuracy
        rivals = {name: results.row(name, 0.1).accuracy for name in ("random", "keydiff")}  # type: ignore[union-attr]
        ours = results.row("acckv-calibrated", 0.1)
        assert ours is not None and row["calibrated"] == ours.accuracy
        assert row["best_accuracy"] == max(rivals.values()) == rivals[row["best"]]
        assert row["lead"] == pytest.approx(ours.accuracy - max(rivals.values()), abs=1e-6)
        low, high = row["lead_ci95"]
        assert low - 1e-6 <= row["lead"] <= high + 1e-6
    assert (output / "generalisation.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_variant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--variants", "plain,upside-down", "--output", str(tmp_path)])
    assert "'upside-down' is not one of plain" in capsys.readouterr().err
