"""Results, predictions, tables and plots say what was measured, and each number with its interval."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import RenderableType

from acckv.errors import InputError
from acckv.evaluation.results import (
    Answer,
    Results,
    Setting,
    read_predictions,
    read_results,
    write_predictions,
    write_results,
)
from acckv.io.files import whole_file
from acckv.report.calibration import KeptShares, RunFacts, render_report
from acckv.report.plots import plot_budgets, plot_pareto
from acckv.report.table import control_warning, render_group_tables, render_table
from tests.evaluation.runs import recorder
from tests.report.rows import table_row


def _text(table: RenderableType) -> str:
    console = recorder()
    console.print(table)
    return console.export_text()


# ------------------------------------------------------------------ results.json


def test_results_have_exactly_the_fields_of_format_1(tmp_path: Path, results: Results) -> None:
    write_results(tmp_path / "results.json", results)
    written = json.loads((tmp_path / "results.json").read_text())
    added = [
        "score",
        "clips",
        "failed_clips",
        "failed_questions",
        "coverage",
    ]  # files from before they came are read too
    assert list(written) == ["format", "model", "benchmark", "when", "seed", "rows", *added]
    older = {name: json.loads(json.dumps(written[name])) for name in written if name not in added}
    for row in older["rows"]:
        del row["standard_error"], row["metrics"], row["cut"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert read_results(tmp_path / "older.json") == results
    assert (written["format"], written["model"], written["when"], written["seed"]) == (1, "tiny", "context", 7)
    assert set(written["rows"][0]) == {
        *("policy", "ratio", "n", "accuracy", "relative", "ci95"),
        *("kept_entries", "full_entries", "kv_bytes", "groups", "standard_error", "metrics", "cut"),
    }
    assert written["rows"][1]["policy"] == "control"
    assert written["rows"][1]["ratio"] == 0
    assert written["rows"][2]["ci95"] == [0.60, 0.64]
    assert written["rows"][2]["groups"]["Visual"] == {"n": 300, "accuracy": 0.62}


def test_results_survive_the_round_trip(tmp_path: Path, results: Results) -> None:
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == results
    assert results.full is results.rows[0]
    assert results.control is results.rows[1]
    assert results.row("snapkv", 0.5) is None


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, results: Results) -> None:
    path = tmp_path / "results.json"
    write_results(path, results)
    before = path.read_bytes()
    broken = dataclasses.replace(results, rows=[dataclasses.replace(results.rows[0], accuracy=float("nan"))])
    with pytest.raises(ValueError):
        write_results(path, broken)
    with pytest.raises(RuntimeError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format=2), "format: unknown format 2"),
        (lambda v: v.pop("seed"), "seed: missing"),
        (lambda v: v.update(when="later"), "when: 'later'"),
        (lambda v: v["rows"][3].pop("kv_bytes"), "rows[3].kv_bytes: missing"),
        (lambda v: v["rows"][3].update(accuracy=1.5), "rows[3].accuracy: 1.5 is not a number from 0 to 1"),
        (lambda v: v["rows"][0].update(accuracy=True), "rows[0].accuracy: True"),
        (lambda v: v["rows"][0].update(ci95=[0.1]), "rows[0].ci95"),
        (lambda v: v["rows"][0]["groups"].update(Audio={"n": 3}), "rows[0].groups.Audio.accuracy: missing"),
        (lambda v: v["rows"][0]["metrics"].update(CIDEr="x"), "rows[0].metrics.CIDEr: 'x' is not a number"),
        (lambda v: v["rows"][0].update(standard_error=-1), "rows[0].standard_error: -1"),
        (lambda v: v["rows"].append("row"), "rows[6]: expected an object"),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, results: Results, change: Callable[[Any], object], message: str) -> None:
    path = tmp_path / "results.json"
    write_results(path, results)
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(InputError) as error:
        read_results(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_cut_or_missing_file_is_named(tmp_path: Path, results: Results) -> None:
    path = tmp_path / "results.json"
    with pytest.raises(InputError, match="no such file"):
        read_results(path)
    write_results(path, results)
    path.write_text(path.read_text()[:100])
    with pytest.raises(InputError, match="not valid JSON"):
        read_results(path)


def test_predictions_are_one_object_a_line(tmp_path: Path) -> None:
    about: dict[str, Any] = {
        "clip": 0,
        "video": "a.mp4",
        "protocol": "word",
        "groups": ["Audio"],
        "question": "?",
        "answer": "red",
    }
    judged: dict[str, Any] = {"cut": False, "score": 1.0, "official": None, "robust": 0.5, "parsed": True}
    texts = {"1": "red\ncircle", "2": "\u00fc\u2028"}
    answers = [Answer("full", 1.0, id=name, prediction=text, **about, **judged) for name, text in texts.items()]
    write_predictions(tmp_path / "predictions.jsonl", answers)
    lines = (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["prediction"] for line in lines[:-1]] == list(texts.values()) and lines[-1] == ""
    assert json.loads(lines[0]) == {
        "policy": "full",
        "ratio": 1.0,
        "id": "1",
        "prediction": texts["1"],
        **about,
        **judged,
    }
    assert list(read_predictions(tmp_path / "predictions.jsonl")) == answers


# ------------------------------------------------------------------ tables


def test_table_shows_every_row_with_its_numbers(results: Results) -> None:
    text = _text(render_table(results, {Setting("snapkv", 0.2): (0.63, 0.67)}))
    line = next(line for line in text.splitlines() if "snapkv" in line and " 0.2 " in line)
    assert " ".join(line.split()) == "snapkv 0.2 62.0% [60.0, 64.0] 64.6% [63.0, 67.0] 54.4 / 272 185,549"
    assert any(line.split()[:2] == ["control*", "0"] for line in text.splitlines())
    assert "480 questions, seed 7" in text
    assert "control*: every audio and video entry evicted" in text


def test_group_tables_are_one_a_ratio_with_both_references(results: Results) -> None:
    tables = render_group_tables(results)
    assert len(tables) == 2
    text = _text(tables[0])
    line = next(line for line in text.splitlines() if line.split()[:1] == ["Visual"])
    assert line.split() == ["Visual", "300", "96.0", "18.0", "62.0", "95.0"]
    empty = next(line for line in text.splitlines() if "Audio/Pitch" in line)
    assert empty.split() == ["Audio/Pitch", "180", "-", "-", "-", "-"]


def test_warning_when_the_control_is_not_far_below_full(results: Results) -> None:
    assert control_warning(results) is None
    near = dataclasses.replace(results, rows=[table_row("full", 1.0, 0.96), table_row("control", 0.0, 0.90)])
    assert "says nothing about the cache" in (control_warning(near) or "")
    assert "90.0% against 96.0%" in (control_warning(near) or "")
    noisy = dataclasses.replace(results, rows=[table_row("full", 1.0, 0.5, 0.3), table_row("control", 0.0, 0.3, 0.2)])
    assert "says nothing" in (control_warning(noisy) or "")
    prompt = dataclasses.replace(near, when="prompt")
    assert "first answer token before compression" in (control_warning(prompt) or "")
    assert "without the rows" in (control_warning(dataclasses.replace(results, rows=[])) or "")


# ------------------------------------------------------------------ plots


def _ink(path: Path) -> NDArray[np.int_]:
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def test_pareto_plot_moves_with_the_numbers(tmp_path: Path, results: Results) -> None:
    plot_pareto(tmp_path / "a.png", results, {})
    other = dataclasses.replace(results, rows=[*results.rows[:5], table_row("acckv-calibrated", 0.05, 0.5)])
    plot_pareto(tmp_path / "b.png", other, {})
    first, second = _ink(tmp_path / "a.png"), _ink(tmp_path / "b.png")
    assert first.shape == second.shape
    assert (first != second).any()
    calibrated = np.array([0xD5, 0x5E, 0x00])
    rows = np.where((np.abs(first - calibrated).sum(-1) < 30).any(axis=1))[0]
    lower = np.where((np.abs(second - calibrated).sum(-1) < 30).any(axis=1))[0]
    # The first coloured row is the curve's top; the legend's line lies at the same place in both.
    assert rows.size > 0
    assert lower.size > rows.size


def test_budget_map_shows_the_largest_share_brightest(tmp_path: Path) -> None:
    budgets = {0.2: torch.tensor([[28.8, 0.0], [0.0, 0.0]]), 0.1: torch.tensor([[0.0, 0.0], [0.0, 12.8]])}
    plot_budgets(tmp_path / "budgets.png", budgets, torch.tensor([144.0, 128.0]), "acckv")
    picture = _ink(tmp_path / "budgets.png")
    yellow = np.abs(picture - np.array([253, 231, 37])).sum(-1) < 12
    columns = np.where(yellow.any(axis=0))[0]
    rows = np.where(yellow.any(axis=1))[0]
    height, width = yellow.shape
    left, right = columns[columns < width / 2], columns[columns >= width / 2]
    # Left panel: video of the upper layer. Right panel: audio of the lower layer.
    assert yellow[: height // 2, left].sum() > 0
    assert yellow[height // 2 + height // 8 :, left].sum() == 0
    assert yellow[height // 2 + height // 8 :, right].sum() > 0
    assert rows.size > 0
    with pytest.raises(ValueError, match="no budgets"):
        plot_budgets(tmp_path / "none.png", {}, torch.ones(2), "acckv")
    assert not (tmp_path / "none.png").exists()


# ------------------------------------------------------------------ report of a calibration


def test_the_report_says_what_the_tightest_ratio_saw_alone() -> None:
    kept = KeptShares({0.1: torch.ones(2, 2)}, torch.tensor([10.0, 10.0]))

    def text(steps: int, **options: Any) -> str:
        facts = RunFacts("tiny", "context", steps, 10, steps, 0.005, 0.5, 0.005, (0.02, 0.5), **options)
        return render_report(facts, kept, None, ("kept.png", "history.png"))

    alone = "The first 6 see 0.02 alone; what they learn holds below 0.03."
    early = "warning: training ended before it saw a ratio above 0.02"
    assert alone in text(10, low_ratio_steps=6, low_ratio_below=0.03) and early not in text(
        7, low_ratio_steps=6, low_ratio_below=0.03
    )
    assert early in text(6, low_ratio_steps=6, low_ratio_below=0.03)
    assert "alone" not in text(10) and early not in text(10)
