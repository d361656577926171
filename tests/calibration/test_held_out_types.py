"""Types of questions held out by turns: none of them is asked in calibration, and each is measured by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from acckv import KVCompressor
from acckv.data.synthetic.events import DESCRIPTION_TYPES, SINGLE_TYPES
from acckv.evaluation.results import read_results
from benchmarks.held_out_types import SUBJECTS, QuestionsWithout, main
from tests.support import not_none

SMALL = """\
seed_everything: 0
model: {lora_rank: 0, repeated_tokens: 8}
data: {validation_clips: 2, batch_size: 2, questions_per_clip: 1}
trainer: {accelerator: cpu, gradient_clip_val: 1.0}
"""


def test_every_type_is_held_out_and_none_of_it_is_asked(cache: Path) -> None:
    every = {"/".join(kind) for kind in (*SINGLE_TYPES, *DESCRIPTION_TYPES)}
    assert {kind for kinds in SUBJECTS.values() for kind in kinds} == every
    data = QuestionsWithout(SUBJECTS["order"], train_clips=6, validation_clips=2, cache_dir=str(cache))
    for split in ("train", "validation"):
        assert {record.groups[-1] for record in data.records(split)} == every - {*SUBJECTS["order"]}


def test_an_export_is_measured_on_the_types_that_were_held_out(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.yaml").write_text(SMALL)
    words = [
        *("--config", str(tmp_path / "small.yaml"), "--output", str(tmp_path), "--subjects", "coincidence"),
        *("--calibrate-for", "mixed", "--steps", "2", "--train-clips", "6", "--policies", "random,keydiff"),
        *("--ratios", "0.1", "--clips", "1", "--cache-dir", str(cache)),
    ]
    main(words)
    folder = tmp_path / "mixed" / "all-but-coincidence"
    record = KVCompressor.from_pretrained(folder / "export").calibration
    coverage = read_results(folder / "coincidence" / "results.json").coverage
    assert coverage is not None and coverage.outside == coverage.asked > 0
    assert record is not None and record.calibrate_for == "mixed" and not {*record.kinds} & {*SUBJECTS["coincidence"]}
    rows = json.loads((tmp_path / "held_out_types.json").read_text())["rows"]
    assert [row["type"] for row in rows] == [*SUBJECTS["coincidence"]]
    measured = {row.policy: row for row in read_results(folder / "coincidence" / "results.json").rows}
    for row in rows:
        group = {policy: each.groups[row["type"]] for policy, each in measured.items()}
        assert row["calibrated"] == group["acckv-calibrated"].accuracy and row["questions"] == group["full"].n
        assert row["best_accuracy"] == max(not_none(group[policy].accuracy) for policy in ("random", "keydiff"))
    before = (folder / "export" / "config.json").stat().st_mtime_ns
    main(words)
    assert (folder / "export" / "config.json").stat().st_mtime_ns == before, "nothing is done twice"
    with pytest.raises(SystemExit):
        main(["--subjects", "taste"])
    assert "'taste' is not one of colour, pitch" in capsys.readouterr().err
