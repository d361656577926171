"""Every family of encoders calibrates two steps and is evaluated, by its own config and the real command lines.

The models are tiny and have random weights; their answers mean nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from acckv import KVCompressor
from acckv.data.clips import write_clips
from acckv.data.encoded import write_encoded_clip
from tests import checkpoints
from tests.families import FAMILIES
from tests.test_configs import ROOT, door

TURNS = {
    "videollama2": "\n{}<|im_end|>\n<|im_start|>assistant\n",
    "avicuna": "\n {} ASSISTANT:",
}
QUESTIONS = {"What colour was it?": "red", "Describe it.": "a red ring"}


def encoded_folder(folder: Path, kind: str) -> Path:
    """Three clips as the family lays them out, of different length, with two questions each."""
    model = FAMILIES[kind].build()
    lines = []
    for number in range(3):
        inputs = FAMILIES[kind].context(model, seed=number, frames=2 + number)
        write_encoded_clip(folder, f"clip {number}", inputs["inputs_embeds"][0], inputs["modality_ids"][0])
        for question, answer in QUESTIONS.items():
            row = {"clip": f"clip {number}", "question": TURNS[kind].format(question), "answer": answer}
            lines.append(json.dumps({**row, "groups": ["Visual"], "split": ("train", "validation", "test")[number]}))
    (folder / "questions.jsonl").write_text("\n".join([*lines, ""]))
    return folder


@pytest.fixture(scope="module")
def question_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two generated clips of four seconds with sound, two questions each."""
    root = tmp_path_factory.mktemp("clips")
    events = {"slots": 4, "both": 1, "video_only": 1, "audio_only": 1}
    file = write_clips(root, "test", 2, questions_per_clip=2, workers=1, progress=False, **events)
    rows = json.loads(file.read_text())
    few = [[row for row in rows if row["video_id"] == video][:2] for video in {row["video_id"] for row in rows}]
    file.write_text(json.dumps(sum(few, [])))
    return file


@pytest.mark.parametrize("name", ["gemma4", "gemma4_unified", "videollama2", "avicuna"])
def test_calibrated_and_evaluated(
    name: str, question_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = name in ("videollama2", "avicuna")
    base = (checkpoints.decoder if encoded else checkpoints.gemma4)(tmp_path / "model", name)
    if encoded:
        folder = encoded_folder(tmp_path / "clips", name)
        train_data, test_data = ["--data.encoded", folder], ["--data.encoded", folder]
    else:
        train_data = ["--data.train_questions", question_file, "--data.validation_questions", question_file]
        train_data += ["--data.video_root", question_file.parent / "videos"]
        test_data = ["--data.question_file", question_file, "--data.video_root", question_file.parent / "videos"]
    run, results = tmp_path / "run", tmp_path / "results"
    arguments = ["--config", ROOT / "configs" / f"{name}.yaml", "--model.base_model", base, "--model.lora_rank", 2]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.max_steps", 2, "--trainer.accumulate_grad_batches", 1]
    arguments += ["--evaluation.clips", 1, "--evaluation.policies", "[acckv-calibrated]", "--evaluation.ratios", "[0.2]"]
    assert door(monkeypatch, "train.py", "fit", *arguments, "--trainer.default_root_dir", run, *train_data) == 0
    compressor = KVCompressor.from_pretrained(run / "export")
    assert compressor.base["name"] == str(base) and compressor.lora is not None
    assert any(bool(value.any()) for key, value in compressor.lora.tensors.items() if "lora_B" in key)

    arguments = ["--model", base, "--compressor", run / "export", "--policies", "keydiff,acckv-calibrated"]
    arguments += ["--ratios", "0.2", "--accelerator", "cpu", "--dtype", "bfloat16", "--word_tokens", 2]
    arguments += ["--description_tokens", 3, "--output", results, "--update_card", "false"]
    assert door(monkeypatch, "evaluate.py", *arguments, *test_data) == 0
    rows = {(row["policy"], row["ratio"]): row for row in json.loads((results / "results.json").read_text())["rows"]}
    full = rows["full", 1.0]["kept_entries"]
    assert rows["keydiff", 0.2]["kept_entries"] == pytest.approx(0.2 * full, rel=0.1)
    assert rows["keydiff", 0.2]["kept_entries"] == rows["acckv-calibrated", 0.2]["kept_entries"]
    lines = (results / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == len(rows) * (2 if encoded else 4)
    assert torch.isfinite(torch.tensor([row["accuracy"] for row in rows.values()])).all()
