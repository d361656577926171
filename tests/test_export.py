"""The export of a compressor: saved and loaded it is the same, damaged it is refused by file and field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from acckv import InputError, KVCompressor
from acckv.data.asked_questions import AskedQuestions
from acckv.data.calibration_record import CalibrationRecord
from acckv.policies import AccKV
from tests import tiny_omni
from tests.learned import CONTEXT, Learned, calibrated, lora_of, weights_of, with_low_ratio
from tests.support.running import generate


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_omni.build()


def logits(compressor: KVCompressor, model: Any) -> Tensor:
    """Of the tokens that the compressed model generates."""
    with compressor(model, tiny_omni.Tokenizer()):
        return generate(model, tiny_omni.prompt(), max_new_tokens=6, do_sample=False)[1]


def test_save_and_load(model: Any, tmp_path: Path) -> None:
    compressor = calibrated(model, AccKV.preset("context", n_probe_queries=2), noise=1.0, rank=4, ratio=0.3)
    compressor.calibration = CalibrationRecord("generated clips of seed 0", 2, 6, {"Visual/Colour": 6}, 0.02, 0.5, 9)
    folder = tmp_path / "export"
    compressor.save_pretrained(folder)
    compressor.save_pretrained(folder)  # over itself
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export"]
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert files == [
        "README.md",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "config.json",
        "model.safetensors",
    ]
    loaded = KVCompressor.from_pretrained(folder)
    assert torch.equal(logits(loaded, model), logits(compressor, model))
    assert (loaded.config, loaded.policy) == (compressor.config, compressor.policy)
    assert loaded.calibration == loaded.with_ratio(0.5).calibration == compressor.calibration
    assert "generated clips of seed 0" in (folder / "README.md").read_text()
    assert KVCompressor.from_pretrained(folder, ratio=0.7).config.ratio == 0.7
    other = AccKV.preset("context", n_probe_queries=2, layer_floor=0.2)
    assert KVCompressor.from_pretrained(folder, layer_floor=0.2).policy == other


def test_an_export_holds_budgets_of_heads_only_where_they_were_learned(model: Any, tmp_path: Path) -> None:
    compressor = calibrated(model, noise=1.0, ratio=0.3, head_budgets="learned")
    compressor.save_pretrained(tmp_path / "learned")
    loaded = KVCompressor.from_pretrained(tmp_path / "learned")
    assert loaded.config == compressor.config and torch.equal(logits(loaded, model), logits(compressor, model))
    torch.nn.init.zeros_(weights_of(compressor).head_budget)
    compressor.save_pretrained(tmp_path / "equal")
    assert "head_budget" not in load_file(tmp_path / "equal" / "model.safetensors")
    assert KVCompressor.from_pretrained(tmp_path / "equal", head_budgets="equal").config.head_budgets == "equal"
    config = tmp_path / "equal" / "config.json"
    older = {"ratio": 0.3, "budget": None, "when": "context"}
    assert json.loads(config.read_text())["compression"] == {**older, "head_budgets": "learned"}
    edit(config, compression=older)
    assert KVCompressor.from_pretrained(tmp_path / "equal").config.head_budgets == "equal"


def test_an_export_holds_what_its_calibration_asked(model: Any, tmp_path: Path) -> None:
    compressor = calibrated(model)
    compressor.asked = AskedQuestions(
        {"pitch": ["What pitch was the beep?"], "count|": ["Wie viele Töne?", "How many?"]}
    )
    compressor.calibration = CalibrationRecord("clips", 2, 6, {"pitch": 6}, 0.02, 0.5, 9)
    compressor.save_pretrained(tmp_path / "export")
    loaded = KVCompressor.from_pretrained(tmp_path / "export")
    assert loaded.asked == loaded.with_ratio(0.5).asked == compressor.asked
    assert "`evaluate.py` warns of them: `asked.json` holds" in (tmp_path / "export" / "README.md").read_text()
    edit(tmp_path / "export" / "asked.json", wordings={"pitch": [3]})
    with pytest.raises(InputError, match=r"asked\.json: wordings\.pitch\[0\]: 3 is not a text"):
        KVCompressor.from_pretrained(tmp_path / "export")
    (tmp_path / "export" / "asked.json").unlink()
    with pytest.raises(InputError, match=r"asked\.json: no such file"):
        KVCompressor.from_pretrained(tmp_path / "export")
    edit(tmp_path / "export" / "config.json", has_asked=None)  # as older ones are
    assert KVCompressor.from_pretrained(tmp_path / "export").asked is None


def test_an_export_holds_the_calibration_of_the_lowest_ratios(model: Any, tmp_path: Path) -> None:
    wide, low = calibrated(model, noise=1.0, rank=2), calibrated(model, noise=0.3, rank=2)
    wide_and_low = with_low_ratio(wide, low, 0.3)
    wide_and_low.save_pretrained(tmp_path / "export")
    loaded = KVCompressor.from_pretrained(tmp_path / "export")
    assert loaded.low_ratio is not None and loaded.low_ratio.below == 0.3
    pairs: list[tuple[Learned, KVCompressor]] = [(loaded, wide), (loaded.low_ratio, low)]
    for found, saved in (*pairs, (loaded.with_ratio(0.1).low_ratio, low)):
        assert lora_of(found).keys() == lora_of(saved).keys()
        assert all(torch.equal(lora_of(found)[name], tensor) for name, tensor in lora_of(saved).items())
        assert torch.equal(weights_of(found).saliency, weights_of(saved).saliency)
    assert "Ratios below 0.3" in (tmp_path / "export" / "README.md").read_text()
    edit(tmp_path / "export" / "config.json", lora_scope="all")
    with pytest.raises(InputError, match=r"config\.json: lora_scope: is 'all', which does not go with low_ratio_below"):
        KVCompressor.from_pretrained(tmp_path / "export")
    with pytest.raises(InputError, match="lora_scope: is 'all', and the lowest ratios"):
        KVCompressor(CONTEXT, weights=wide.weights, lora=wide.lora, low_ratio=wide_and_low.low_ratio, lora_scope="all")


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text())
    for key, value in changes.items():
        if value is None:
            values.pop(key)
        else:
            values[key] = value
    file.write_text(json.dumps(values))


def policy(export: Path, **changes: Any) -> None:
    file = export / "config.json"
    edit(file, policy={**json.loads(file.read_text())["policy"], **changes})


@pytest.fixture
def export(model: Any, tmp_path: Path) -> Path:
    calibrated(model, noise=0.1, rank=2).save_pretrained(tmp_path / "export")
    return tmp_path / "export"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-20])


def wrong_shape(file: Path) -> None:
    tensors = load_file(file)
    tensors["redistribution"] = torch.zeros(9)
    save_file(tensors, file)


def no_number(file: Path) -> None:
    save_file({name: tensor / 0 for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda e: (e / "model.safetensors").unlink(), r"model\.safetensors: is missing"),
        (lambda e: truncate(e / "model.safetensors"), r"model\.safetensors: is truncated"),
        (lambda e: wrong_shape(e / "model.safetensors"), r"model\.safetensors: redistribution: has shape \[9\]"),
        (lambda e: (e / "config.json").unlink(), r"config\.json: is missing"),
        (lambda e: (e / "config.json").write_text("{"), r"config\.json: not valid JSON"),
        (lambda e: edit(e / "config.json", format=7), r"config\.json: format: version 7 is unknown"),
        (lambda e: edit(e / "config.json", lora_scope="never"), r"lora_scope: 'never' is not"),
        (
            lambda e: edit(e / "config.json", low_ratio_below="low"),
            r"config\.json: low_ratio_below: 'low' is not 0 to 1",
        ),
        (lambda e: edit(e / "config.json", low_ratio_below=0.1), r"low_ratio/model\.safetensors: is missing"),
        (lambda e: edit(e / "config.json", calibration=[1]), r"config\.json: calibration: expected an object"),
        (lambda e: edit(e / "config.json", base=None), r"config\.json: base: is missing"),
        (lambda e: edit(e / "config.json", compression={"ratio": 1.5}), r"config\.json: ratio: 1\.5 is not a number"),
        (
            lambda e: edit(e / "config.json", compression={"rate": 1}),
            r"config\.json: rate: is no option of a compression; it has ratio, budget, when",
        ),
        (
            lambda e: edit(e / "config.json", format=3),
            r"config\.json: format: version 3 is unknown; this acckv reads 4",
        ),
        (lambda e: policy(e, name="h3o"), r"config\.json: policy: 'h3o' is not one of full, random"),
        (lambda e: policy(e, options={"window": 3}), r"config\.json: window: is no option of acckv; it has share_"),
        (lambda e: policy(e, name="snapkv", options={}), r"config\.json: policy: is 'snapkv', which has no learned"),
        (lambda e: edit(e / "config.json", policy={"name": 3}), r"config\.json: policy: must hold a name and options"),
        (lambda e: (e / "adapter" / "adapter_config.json").unlink(), r"adapter_config\.json: is missing"),
        (lambda e: (e / "adapter" / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors: is missing"),
        (lambda e: truncate(e / "adapter" / "adapter_model.safetensors"), r"adapter: cannot be read"),
        (
            lambda e: no_number(e / "adapter" / "adapter_model.safetensors"),
            r"lora_A\.weight: holds values that are not",
        ),
    ],
)
def test_damaged_exports(export: Path, damage: Any, message: str) -> None:
    damage(export)
    with pytest.raises(InputError, match=message) as caught:
        KVCompressor.from_pretrained(export)
    assert "\n" not in str(caught.value)


def test_wrong_base_model(export: Path) -> None:
    other = tiny_omni.build(layers=2)
    with pytest.raises(InputError, match="layers: was calibrated for tiny with layers 3; this model has 2"):
        KVCompressor.from_pretrained(export)(other)


def test_learned_weights_serve_their_own_policy_alone(export: Path) -> None:
    with pytest.raises(InputError, match="policy: is 'snapkv', which has no learned weights"):
        KVCompressor("snapkv", weights=KVCompressor.from_pretrained(export).weights)


def test_no_such_export(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no export folder"):
        KVCompressor.from_pretrained(tmp_path / "nothing")


def test_foreign_folders_are_not_overwritten(model: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(InputError, match="is no export"):
        calibrated(model).save_pretrained(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"
