"""Any registered benchmark can be calibrated on: two of its splits, asked in its own words, answered as it scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from acckv import InputError
from lightning_modules.calibration.datamodule import AVDataModule
from tests.paths import FIXTURES


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The user's own questions: two to train on, one to validate on."""
    shutil.copytree(FIXTURES / "custom" / "clips", tmp_path / "clips")
    lines = (FIXTURES / "custom" / "questions.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:2]))
    (tmp_path / "validation.jsonl").write_text(lines[0])
    return tmp_path


def test_a_benchmark_is_trained_on_in_its_own_words(root: Path) -> None:
    data = AVDataModule(source="benchmark", benchmark="custom", root=str(root), batch_size=1)
    data.prepare_data()
    data.setup()
    asked = json.loads((root / "validation.jsonl").read_text())
    (record,) = data.records("validation")
    assert (
        record.question.startswith(f"{asked['question']}\nA. ") and "Answer with the option's letter" in record.question
    )
    batch = data.datasets["validation"].batch(0, [0])
    ((question,),), tokenizer = batch.every, data.datasets["validation"].processor.tokenizer
    *answer, end = question.ids[question.first + 1 :]
    assert record.answer == "B" and answer == tokenizer("B", add_special_tokens=False)["input_ids"]
    assert end == tokenizer.eos_token_id
    assert batch.inputs["input_ids"].shape[0] == 1
    made = data.calibration_record((0.1, 0.5), 3)
    assert made.data.endswith("/train") and made.questions == 2 and data.source.names[1].endswith("/validation")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"root": "somewhere"}, r"data\.benchmark: is needed with source 'benchmark'"),
        ({"benchmark": "custom"}, r"data\.root: is needed with source 'benchmark'"),
        ({"source": "clip"}, r"data\.source: 'clip' is not one of clips, "),
    ],
)
def test_what_is_missing_is_named(options: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AVDataModule(**{"source": "benchmark", **options})


def test_a_split_that_is_not_there_is_refused(root: Path) -> None:
    data = AVDataModule(source="benchmark", benchmark="custom", root=str(root), validation_split="val")
    with pytest.raises(InputError, match="val"):
        data.records("validation")
