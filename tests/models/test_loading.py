"""Any option of transformers' from_pretrained, in Python and in YAML; what contradicts itself is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from acckv import InputError
from acckv.models import load_model, load_processor
from acckv.models.loading import _quantization
from tests import checkpoints
from tests.cli.test_configs import run_script


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain decoder that is stored in bfloat16."""
    folder = checkpoints.decoder(tmp_path_factory.mktemp("decoder"))
    transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


def test_dtype_auto_is_what_the_checkpoint_is_stored_in(decoder: Path) -> None:
    for dtype, expected in (("auto", torch.bfloat16), ("float16", torch.float16)):
        model, processor = load_model(decoder, dtype)
        assert model.dtype == processor.dtype == load_processor(decoder, dtype).dtype == expected


@pytest.mark.parametrize(
    ("options", "attribute", "expected"),
    [
        ({"attn_implementation": "eager"}, "config._attn_implementation", "eager"),
        ({"device_map": {"": "cpu"}}, "device.type", "cpu"),
        ({"device_map": "cpu"}, "device.type", "cpu"),
        ({"rms_norm_eps": 0.125}, "model.norm.variance_epsilon", 0.125),
        ({"local_files_only": True, "revision": "main", "trust_remote_code": True}, "training", False),
    ],
)
def test_load_options_reach_from_pretrained(decoder: Path, options: Any, attribute: str, expected: Any) -> None:
    before = dict(options)
    model, processor = load_model(decoder, load_options=options)
    for name in attribute.split("."):
        model = getattr(model, name)
    assert model == expected and options == before and processor.embed is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"load_options": {"device_map": "cpu"}, "device": "cpu"},
            "device_map: says where the model goes, and so does",
        ),
        ({"load_options": {"dtype": "auto"}}, "load_options.dtype: is an option of its own; set dtype"),
        ({"load_options": {"torch_dtype": "auto"}}, "load_options.torch_dtype: is an option of its own"),
        ({"load_options": {"attn_implementation": "eager"}, "attn_implementation": "sdpa"}, "is given twice"),
        ({"load_options": {"revisoin": "main"}}, r"load_options: 'revisoin' is no option of from_pretrained"),
        ({"load_options": ["revision"]}, "load_options: is no mapping"),
        ({"load_options": {"quantization_config": {"bits": 4}}}, "load_options.quantization_config: .*quant_method"),
        ({"load_options": {"quantization_config": {"class": "Trainer"}}}, "'Trainer' is no class of transformers"),
        (
            {"load_options": {"quantization_config": {"class": "TorchAoConfig"}}},
            "load_options.quantization_config: .*quant_type",
        ),
        ({"load_options": {"quantization_config": {"load_in_4bit": True}}}, "cannot be loaded: .*bitsandbytes"),
        ({"dtype": "int8"}, "dtype: 'int8' is not one of float32, bfloat16, float16, auto"),
    ],
)
def test_contradictions_and_unknown_options_are_refused_in_one_line(decoder: Path, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_model(decoder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("naming", [{}, {"quant_method": "bitsandbytes"}, {"class": "BitsAndBytesConfig"}])
def test_a_quantization_config_comes_out_of_yaml(naming: dict[str, Any]) -> None:
    config = _quantization({**naming, "load_in_4bit": True})
    assert isinstance(config, transformers.BitsAndBytesConfig) and config.load_in_4bit
    assert _quantization(config) is config


@pytest.mark.parametrize(
    "command",
    [
        ("train.py", "fit", "--config", "configs/calib.yaml", "--trainer.accelerator", "cpu", "--model.load_options"),
        ("evaluate.py", "--policies", "keydiff", "--accelerator", "cpu", "--load_options"),
    ],
    ids=["train", "evaluate"],
)
def test_load_options_on_the_command_line(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """They reach the loading of the model, which knows what it can do with them."""
    output = ("--trainer.default_root_dir" if command[0] == "train.py" else "--output", tmp_path)
    assert run_script(monkeypatch, *command, "{quantization_config: {load_in_4bit: true}}", *output) == 2
    assert "cannot be loaded: Using `bitsandbytes` 4-bit quantization requires" in capsys.readouterr().err
