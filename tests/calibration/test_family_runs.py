"""Every family calibrates two steps by its own config and is evaluated; tiny models with random weights.

What the models answer means nothing. `test_configs` runs the same through the command lines.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import yaml

from acckv import InputError, KVCompressor
from acckv.config import When
from acckv.data.precomputed import write_precomputed_clip
from acckv.data.synthetic.clips import video_folder, write_clips
from acckv.evaluation.results import REFERENCE_NAMES
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.export import ExportCompressor
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.evaluation.datamodule import EvaluationData
from lightning_modules.evaluation.options import EvaluationOptions
from lightning_modules.evaluation.run import run_evaluation
from tests import checkpoints
from tests.calibration.runs import quiet_trainer
from tests.families import FAMILIES
from tests.learned import lora_of
from tests.paths import ROOT

TURNS = {
    "videollama2": "\n{}<|im_end|>\n<|im_start|>assistant\n",
    "avicuna": "\n {} ASSISTANT:",
}
QUESTIONS = {"What colour was it?": "red", "Describe it.": "a red ring"}


def precomputed_folder(folder: Path, kind: str, **options: Any) -> Path:
    """Three clips as the family lays them out, of different length, with two questions each."""
    model = FAMILIES[kind].build()
    lines = []
    for number, split in enumerate(("train", "validation", "test")):
        inputs = FAMILIES[kind].context(model, seed=number, frames=2 + number)
        write_precomputed_clip(folder, f"clip {number}", inputs["inputs_embeds"][0], inputs["modality_ids"][0])
        for question, answer in QUESTIONS.items():
            row = {"clip": f"clip {number}", "question": TURNS[kind].format(question), "answer": answer}
            lines.append(json.dumps({**row, "groups": ["Visual"], "split": split, **options}))
    (folder / "questions.jsonl").write_text("\n".join([*lines, ""]))
    return folder


@pytest.fixture(scope="module")
def question_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two generated clips of four slots with sound, two questions each."""
    root = tmp_path_factory.mktemp("clips")
    file = write_clips(root, "test", 2, slots=4, both=1, video_only=1, audio_only=1, workers=1, progress=False)
    rows = json.loads(file.read_text())
    file.write_text(json.dumps([row for place, row in enumerate(rows) if place % (len(rows) // 2) < 2]))
    return file


def options_of(name: str, folder: Path, question_file: Path) -> tuple[dict[str, Any], EvaluationData]:
    """What replaces the data of a config, and the data of an evaluation."""
    if name in TURNS:
        clips = precomputed_folder(folder / "clips", name)
        return {"precomputed": str(clips)}, EvaluationData(precomputed=str(clips))
    videos = str(video_folder(question_file))
    file = str(question_file)
    train = {"train_questions": file, "validation_questions": file, "video_root": videos}
    return train, EvaluationData(question_file=file, video_root=videos)


# One of a kind by default: a model with towers, and a decoder that is given embeddings.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gemma4", marks=pytest.mark.slow),
        "gemma4_unified",
        "videollama2",
        pytest.param("avicuna", marks=pytest.mark.slow),
    ],
)
def test_calibrated_and_evaluated(name: str, question_file: Path, tmp_path: Path) -> None:
    base = (checkpoints.decoder if name in TURNS else checkpoints.gemma4)(tmp_path / "model", name)
    train, data = options_of(name, tmp_path, question_file)
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
    torch.manual_seed(0)
    module = CalibrationModule(**{**config["model"], "base_model": str(base), "dtype": "float32", "lora_rank": 2})
    shared = {"base_model": str(base), "when": config["model"]["when"]}
    trainer = quiet_trainer(
        tmp_path,
        max_steps=2,
        limit_val_batches=1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        callbacks=[ExportCompressor(str(tmp_path / "export"), new_tokens=3)],
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=AVDataModule(**{**config["data"], **train, **shared}))
    compressor = KVCompressor.from_pretrained(tmp_path / "export")
    assert compressor.base is not None and compressor.base["name"] == str(base)
    place = "clips" if name in TURNS else question_file.name
    record = compressor.calibration
    assert record is not None and record.data.endswith(f" of {place}") and record.steps == 2
    assert sum(record.kinds.values()) == record.questions >= record.clips >= 1
    trained = [bool(value.any()) for key, value in lora_of(compressor).items() if "lora_B" in key]
    assert any(trained) and float(trainer.callback_metrics["val/kl"]) > 0

    for when in get_args(When):
        options = EvaluationOptions(
            model=str(base),
            compressor=str(tmp_path / "export"),
            policies=["keydiff", "acckv-calibrated"] if when == "context" else ["keydiff"],
            ratios=[0.2],
            when=when,
            output=str(tmp_path / when),
            data=data,
            word_tokens=2,
            description_tokens=3,
            update_card=False,
            accelerator="cpu",
        )
        rows = {row.policy: row for row in run_evaluation(options).rows}
        assert {row.n for row in rows.values()} == {2 if name in TURNS else 4}
        assert rows["control"].kept_entries == 0 and rows["full"].kept_entries == rows["full"].full_entries
        for policy in rows.keys() - REFERENCE_NAMES.keys():
            assert rows[policy].kept_entries == pytest.approx(0.2 * rows["full"].full_entries, abs=1)


def test_clips_of_the_wrong_kind(tmp_path: Path) -> None:
    """Videos for a plain decoder, embeddings for a model with towers, embeddings of another width."""
    clips = precomputed_folder(tmp_path / "clips", "videollama2")
    decoder = checkpoints.decoder(tmp_path / "model")
    wide = precomputed_folder(tmp_path / "wide", "videollama2")
    write_precomputed_clip(wide, "clip 2", torch.randn(5, 32), torch.tensor([0, 1, 1, 2, 2]))

    def run(model: object, folder: Path) -> None:
        data = EvaluationData(precomputed=str(folder))
        options = EvaluationOptions(str(model), policies=["keydiff"], ratios=[0.2], data=data, accelerator="cpu")
        run_evaluation(replace(options, output=str(tmp_path / f"{folder.name}-out")))

    with pytest.raises(InputError, match=r"clip 2\.safetensors: a Qwen2_5OmniProcessor takes clips as Media"):
        run("tiny", clips)
    with pytest.raises(InputError, match=r"clip 2\.safetensors: inputs_embeds: has a width of 32, the decoder's is 64"):
        run(decoder, wide)
    with pytest.raises(InputError, match=r"data\.variant: is of use only with generated clips"):
        EvaluationData(precomputed=str(clips), variant="noisy").records()
    with pytest.raises(InputError, match=r"model\.when: is 'prompt'"):
        AVDataModule(source="precomputed", precomputed=str(clips), when="prompt")
    with pytest.raises(InputError, match=r"data\.precomputed: is needed with source 'precomputed'"):
        AVDataModule(source="precomputed")
    assert not list(tmp_path.glob("*/results.json"))
