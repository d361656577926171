"""The model card says what was calibrated and measured, and what an export keeps."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

import acckv
from acckv.data.asked_questions import Coverage
from acckv.data.calibration_record import CalibrationRecord
from acckv.errors import InputError
from acckv.evaluation.results import Results
from acckv.report.card import render_card, write_card
from tests.paths import ROOT
from tests.report.rows import table_row

CONFIG = {
    "format": 1,
    "base": {"name": "tiny", "layers": 6},
    "compression": {"policy": "acckv", "when": "context", "ratio": 0.1},
    "lora_scope": "after",
    "has_lora": True,
}


def test_card_without_measurement_says_so() -> None:
    card = render_card(CONFIG)
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "tiny"
    assert front["library_name"] == "acckv"
    assert "No measurement has been attached yet" in card
    assert "| policy | ratio |" not in card
    assert "only on tokens after the compression" in card


def test_card_holds_the_measured_rows_and_their_command(tmp_path: Path, results: Results) -> None:
    path = write_card(tmp_path, CONFIG, results, command="python evaluate.py --limit 3")
    card = path.read_text()
    assert "| acckv-calibrated | 0.05 | 92.0% | 90.0% to 94.0% | 95.8% | 13.6 / 272 | 60,211 |" in card.splitlines()
    assert "python evaluate.py --limit 3" in card
    assert "480 questions, seed 7" in card
    assert "says nothing about the cache" not in card
    table = [line for line in card.splitlines() if line.startswith("| ") and "%" in line and "interval" not in line]
    assert len(table) == len(results.rows)


def test_card_and_readme_say_what_an_export_keeps() -> None:
    text = (Path(acckv.__file__).parent / "report/templates/transfer.md.jinja").read_text()
    rows = [line.split("|")[2:-1] for line in text.splitlines() if re.match(r"\| .*\d", line)]
    columns, *shares = [[cell.strip(" *") for cell in row] for row in rows]
    assert (columns[1], shares[2][1], shares[3][1]) == ("0.5", "62.0", "75.5")
    assert (columns[4], shares[0][4], shares[1][4]) == ("0.05", "99.5", "85.5")
    readme = (ROOT / "README.md").read_text()
    assert readme.index(text) < readme.index("\n## ")
    assert readme.index("\n|") > readme.index("**An export keeps")  # the first table
    assert text in render_card(CONFIG)


def test_card_names_the_questions_of_its_calibration() -> None:
    kinds = {"Audio/Pitch": 1200, "What is |heard| ?": 300}
    record = CalibrationRecord("questions of train.json", 400, 1500, kinds, 0.02, 0.5, 2400)
    card = render_card({**CONFIG, "has_weights": True, "calibration": dataclasses.asdict(record)})
    section = card[card.index("## What it was calibrated on") : card.index("**An export keeps")].splitlines()
    assert [line for line in section if line.startswith("| ")] == [
        "| | |",
        "| data | questions of train.json |",
        "| training clips, questions | 400, 1,500 |",
        "| trained for | answers to these questions (`calibrate_for: task`) |",
        "| kinds of questions | Audio/Pitch (1,200), What is \\|heard\\| ? (300) |",
        "| questions outside of these | unknown: the export does not hold what was asked, so that nothing warns |",
        "| compressed | after the media, before any question is seen (`when: context`) |",
        "| kept shares, steps | 0.02 to 0.5, 2,400 |",
    ]
    assert "does not say what it was calibrated on" in render_card({**CONFIG, "has_weights": True})
    assert "is training-free" in render_card(CONFIG)
    with pytest.raises(InputError, match=r"calibration\.kinds: expected an object"):
        render_card({**CONFIG, "calibration": {**dataclasses.asdict(record), "kinds": ["Audio"]}})


def test_card_says_how_many_questions_lie_outside(results: Results) -> None:
    pitch = "What pitch was the beep?"
    few, many = (dataclasses.replace(results, coverage=Coverage(480, outside, [pitch])) for outside in (3, 300))
    card = render_card(CONFIG, few)
    assert "3 of the 480 questions lie outside" in card and "warning" not in card
    card = render_card(CONFIG, many)
    assert f"300 of 480 questions lie outside what the export was calibrated for, such as '{pitch}': what" in card
    assert "lie outside" not in render_card(CONFIG, results)


def test_card_warns_where_the_control_is_near(results: Results) -> None:
    near = dataclasses.replace(results, rows=[table_row("full", 1.0, 0.9), table_row("control", 0.0, 0.88)])
    assert "says nothing about the cache" in render_card(CONFIG, near)


def test_card_needs_its_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        write_card(tmp_path / "nowhere", CONFIG)
