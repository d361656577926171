"""Every config goes through the real command line; each family calibrates a step of two batches."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from acckv import KVCompressor
from acckv.models import FAMILIES as MODEL_FAMILIES
from acckv.models import load_model
from tests import checkpoints
from tests.calibration.test_family_runs import TURNS, precomputed_folder
from tests.paths import ROOT

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
FAMILIES = {
    "qwen2_5_omni.yaml": "Qwen/Qwen2.5-Omni-3B",
    "qwen3_omni_moe.yaml": "Qwen/Qwen3-Omni-30B-A3B-Instruct",
    "gemma4.yaml": "google/gemma-4-E4B-it",
    "gemma4_unified.yaml": "google/gemma-4-12B-it",
    "videollama2.yaml": "runs/videollama2/decoder",
    "avicuna.yaml": "runs/avicuna/decoder",
}


def run_script(monkeypatch: pytest.MonkeyPatch, script: str, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    return int(exit_.value.code or 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_is_what_the_command_line_takes(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every key is known and every value of its kind: what is printed back is what was written."""
    file = ROOT / "configs" / name
    arguments = ("evaluate.py",) if name == "eval.yaml" else ("train.py", "fit")
    assert run_script(monkeypatch, *arguments, "--config", file, "--print_config") == 0
    printed = yaml.safe_load(capsys.readouterr().out)

    def check(given: dict[str, Any], found: dict[str, Any]) -> None:
        for key, value in given.items():
            if isinstance(value, dict):
                check(value, found[key])
            else:
                assert found[key] == value, key

    check(yaml.safe_load(file.read_text()), printed)


def test_every_family_has_a_config() -> None:
    assert set(FAMILIES) < set(CONFIGS)
    for name, base in FAMILIES.items():
        config = yaml.safe_load((ROOT / "configs" / name).read_text())
        assert config["model"]["base_model"] == base
        assert config["trainer"]["default_root_dir"] == f"runs/{name.removesuffix('.yaml')}"
    # Families that are served in a session and cannot be loaded by their name have no sound to calibrate on.
    kinds = {kind.removesuffix("_thinker") for kind, family in MODEL_FAMILIES.items() if family.model_class}
    assert {f"{kind}.yaml" for kind in kinds} < set(FAMILIES)


def qwen3_folder(folder: Path) -> Path:
    """A random-weight Qwen3-Omni-MoE with the packaged model's tokenizer, template and features."""
    packaged, processor = load_model("tiny")
    config = packaged.config.to_dict()
    ids = {name: config[name] for name in config if name.endswith("_token_id")}
    text = {**config["text_config"], "head_dim": 32, "moe_intermediate_size": 32, "num_experts": 4}
    text |= {"num_experts_per_tok": 2, "num_hidden_layers": 2, "layer_types": None, "model_type": "qwen3_omni_moe_text"}
    text["rope_parameters"] = {**text["rope_parameters"], "mrope_interleaved": True}
    thinker = transformers.Qwen3OmniMoeThinkerConfig(
        text_config=text,
        audio_config={
            "num_mel_bins": config["audio_config"]["num_mel_bins"],
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "d_model": 32,
            "downsample_hidden_size": 8,
            "output_dim": 128,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_heads": 2,
            "patch_size": config["vision_config"]["patch_size"],
            "out_hidden_size": 128,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        audio_token_id=config["audio_token_index"],
        image_token_id=config["image_token_index"],
        video_token_id=config["video_token_index"],
        **ids,
    )
    transformers.Qwen3OmniMoeThinkerForConditionalGeneration._from_config(thinker).save_pretrained(folder)
    parts = (processor.image_processor, processor.video_processor, processor.feature_extractor, processor.tokenizer)
    transformers.Qwen3OmniMoeProcessor(*parts, chat_template=processor.chat_template).save_pretrained(folder)
    return folder


def small(name: str, folder: Path) -> Path | str:
    """What takes the place of a config's base model."""
    kind = name.removesuffix(".yaml")
    if kind == "qwen2_5_omni":
        return "tiny"
    if kind == "qwen3_omni_moe":
        return qwen3_folder(folder)
    return (checkpoints.decoder if kind in TURNS else checkpoints.gemma4)(folder, kind)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_step_of_a_family(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The family's own config, its base model replaced by a small one and its data by generated clips."""
    base, kind = small(name, tmp_path / "model"), name.removesuffix(".yaml")
    monkeypatch.setenv("ACCKV_CACHE", str(tmp_path / "cache"))
    data: tuple[object, ...] = ("--data.source", "clips", "--data.train_clips", 4, "--data.validation_clips", 2)
    asked: tuple[object, ...] = ("--data.clips", 2)
    if kind in TURNS:
        data = asked = ("--data.precomputed", precomputed_folder(tmp_path / "clips", kind))
    code = run_script(
        monkeypatch,
        *("train.py", "fit", "--config", ROOT / "configs" / name, "--model.base_model", base),
        *data,
        *("--trainer.accelerator", "cpu", "--trainer.max_steps", 1, "--trainer.accumulate_grad_batches", 2),
        *("--trainer.default_root_dir", tmp_path / "run", "--evaluation.clips", 1),
        *("--evaluation.policies", "[keydiff,acckv-calibrated]", "--evaluation.ratios", "[0.2]"),
    )
    assert code == 0
    exported = KVCompressor.from_pretrained(tmp_path / "run" / "export")
    assert exported.name == "acckv-calibrated"
    assert json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    code = run_script(
        monkeypatch,
        *("evaluate.py", "--model", base, "--compressor", tmp_path / "run" / "export", "--dtype", "bfloat16"),
        *("--policies", "keydiff,acckv-calibrated", "--ratios", "0.2", "--accelerator", "cpu", *asked),
        *("--description_tokens", 4, "--output", tmp_path / "eval"),
    )
    assert code == 0 and (tmp_path / "eval" / "results.json").is_file()


@pytest.mark.parametrize("words", ["train.py fit --config={}", "train.py -c {}", "evaluate.py --config {}"])
def test_a_config_by_its_name_alone(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """This folder's comes first, then that of configs/; one that is in neither is refused, and both are named."""
    monkeypatch.chdir(tmp_path)
    name, steps = ("eval.yaml", "batch_size") if "evaluate" in words else ("folder.yaml", "default_root_dir")

    def printed(name: str) -> Any:
        assert run_script(monkeypatch, *words.format(name).split(), "--print_config") == 0
        values = yaml.safe_load(capsys.readouterr().out)
        return values.get("trainer", values)[steps]

    values = yaml.safe_load((ROOT / "configs" / name).read_text())
    assert printed(name) == values.get("trainer", values)[steps]
    values.get("trainer", values)[steps] = 7 if steps == "batch_size" else "elsewhere"
    (tmp_path / name).write_text(yaml.safe_dump(values))
    assert printed(name) == values.get("trainer", values)[steps]
    assert run_script(monkeypatch, *words.format("nowhere.yaml").split()) == 2
    assert capsys.readouterr().err == "error: nowhere.yaml: config: is neither in this folder nor in configs/\n"
