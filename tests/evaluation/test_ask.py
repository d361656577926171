"""A question about one clip, and the other commands of evaluate.py."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from acckv import KVCompressor
from acckv.benchmarks import load_benchmark
from acckv.data.asked_questions import AskedQuestions
from acckv.models import load_model
from lightning_modules.cli.ask import AskOptions, run_ask
from tests.evaluation.runs import generated, recorder
from tests.learned import calibrated
from tests.paths import ROOT


def test_ask_gives_what_generate_gives(benchmark: Path) -> None:
    record, console = load_benchmark("custom", benchmark)[0], recorder()
    asked = AskOptions(str(record.video), record.question, policy="snapkv", ratio=0.1, max_new_tokens=6)
    full, compressed = run_ask(asked, console)
    tiny = load_model("tiny")
    assert full.text == generated(*tiny, record, 6) == record.answer
    with KVCompressor("snapkv", when="context", ratio=0.1)(*tiny):
        assert compressed.text == generated(*tiny, record, 6)
    assert full.entries == 272 and 26 <= compressed.entries <= 27.2
    text = console.export_text()
    assert f"full cache: {full.text}" in text and f"snapkv at 0.1: {compressed.text}" in text
    assert f"{compressed.kv_bytes:,}" in text and "90.0% of the audio and video entries" in text


def test_ask_warns_of_a_question_outside_of_the_calibration(benchmark: Path, tmp_path: Path) -> None:
    video = str(load_benchmark("custom", benchmark)[0].video)
    compressor = calibrated(load_model("tiny")[0])
    compressor.asked = AskedQuestions({"pitch": ["What pitch was the beep?", "What pitch was the knock?"]})
    compressor.save_pretrained(tmp_path / "export")
    said = []
    for question in ("What pitch was the siren?", "What colour was the ring?"):
        console = recorder()
        run_ask(AskOptions(video, question, compressor=str(tmp_path / "export"), max_new_tokens=2), console)
        said.append(console.export_text())
    assert "warning" not in said[0]
    assert "warning: 1 of 1 questions lie outside what the export was calibrated for, such as 'What colour" in said[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "nothere.mp4", "what?"], "nothere.mp4: no such file"),
        (["ask", "nothere.mp4"], "the following arguments are required: question"),
        (["ask", "x.mp4", "what?", "--ratio", "2"], "ratio: 2 is not a number from 0 to 1"),
        (["ask", "x.mp4", "what?", "--policy", "none"], "policy: 'none' is not one of"),
        (["ask", "x.mp4", "what?", "--policy", "acckv-calibrated"], "compressor: is missing"),
        (["merge", "nothere", "--output", "x"], "run.json: no such file"),
    ],
)
def test_other_doors_refuse_in_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")
    assert exit_.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("error: ") and message in error[0]
