"""What the end of a calibration writes and measures, and that it says so where that is not what was trained."""

from __future__ import annotations

import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from acckv import KVCompressor
from acckv.evaluation.journal import Journal
from acckv.evaluation.results import CALIBRATED
from lightning_modules.calibration.export import different_tensors
from lightning_modules.calibration.report import EvaluateExport
from lightning_modules.cli.errors import INTERRUPTED, run_cli
from lightning_modules.evaluation import run as evaluation_run
from lightning_modules.evaluation.options import EvaluationOptions
from tests.calibration.runs import clip_data, fit
from tests.learned import lora_of


def test_a_wrongly_written_low_ratio_stage_is_noticed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = KVCompressor.save_pretrained

    def save_one_twice(self: KVCompressor, folder: Any, *rest: Any) -> None:
        save(self, folder, *rest)
        if self.low_ratio is not None:
            shutil.copy(Path(folder) / "model.safetensors", Path(folder) / "low_ratio" / "model.safetensors")

    monkeypatch.setattr(KVCompressor, "save_pretrained", save_one_twice)
    with pytest.raises(RuntimeError, match=r"low_ratio\.weights\.layer_budget, .* differ from what was trained"):
        fit(cache, tmp_path, low_ratio_share=0.5)
    loaded = KVCompressor.from_pretrained(tmp_path / "export")
    assert different_tensors(loaded, loaded) == []
    for name in [name for name in lora_of(loaded) if "layers.0" in name]:
        del lora_of(loaded)[name]
    missing = different_tensors(loaded, KVCompressor.from_pretrained(tmp_path / "export"))
    assert missing and all("layers.0" in name and not name.startswith("low_ratio") for name in missing)


def test_the_closing_evaluation_asks_the_model_in_memory(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers are those of a model loaded anew, though the other one was trained with gradient checkpointing."""
    evaluation = EvaluateExport(1, (CALIBRATED,), (0.1,), str(tmp_path / "eval"))
    with monkeypatch.context() as patched:
        patched.delattr(evaluation_run, "load_model")
        fit(cache, tmp_path, steps=2, also=[evaluation], gradient_checkpointing=True)
    data = clip_data(cache)
    options = EvaluationOptions(
        compressor=str(tmp_path / "export"),
        policies=[CALIBRATED],
        ratios=[0.1, 0.0],
        limit=1,
        output=str(tmp_path / "again"),
        accelerator="cpu",
    )
    again = evaluation_run.run_evaluation(options, questions=(data.source.names[1], data.records("validation")))
    assert evaluation.results is not None and evaluation.results.rows == again.rows
    answers = [(tmp_path / name / "predictions.jsonl").read_text() for name in ("eval", "again")]
    assert answers[0] == answers[1] and answers[0]
    assert replace(evaluation.results, rows=again.rows) == again


def test_ctrl_c_in_an_evaluation_says_how_it_goes_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append = Journal.append

    def press_ctrl_c(*arguments: Any) -> None:
        append(*arguments)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Journal, "append", press_ctrl_c)
    records = clip_data(cache).records("validation")
    options = EvaluationOptions(
        policies=["keydiff"], ratios=[0.1], output=str(tmp_path), batch_size=1, accelerator="cpu"
    )

    def main() -> None:
        evaluation_run.run_evaluation(options, questions=("two clips", records))

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background begins without
    try:
        assert run_cli(main) == INTERRUPTED == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert f"The answers so far are in {tmp_path}; the same command goes on from there." in capsys.readouterr().out
    assert len((tmp_path / "journal.jsonl").read_text().splitlines()) == 1
