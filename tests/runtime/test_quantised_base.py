"""LoRA on linear layers of any class: what peft can adapt trains and answers, the rest is refused in one line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn

from acckv import InputError, KVCompressor
from acckv.models import find_adapter, load_model
from acckv.runtime.lora import LoraWeights, lora_config
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.export import ExportCompressor
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.evaluation.options import EvaluationOptions
from lightning_modules.evaluation.run import run_evaluation
from tests.families import FAMILIES
from tests.learned import random_lora
from tests.support import not_none
from tests.support.running import generate


class Int8Linear(nn.Linear):
    """Weights in eight bits with one scale a row, as weight-only quantisation has them."""

    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight.to(self.scale.dtype) * self.scale, self.bias)


class Foreign(nn.Module):
    """A linear layer of a library that peft does not know."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.inner = linear.in_features, linear.out_features, [linear]

    def forward(self, inputs: Tensor) -> Tensor:
        return self.inner[0](inputs)


def converted(model: Any, kind: Any) -> Any:
    """The decoder's projections as layers of another class."""
    for layer in find_adapter(model).decoder.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear):
                    setattr(part, name, kind(module))
    return model


def test_a_quantised_base_calibrates_and_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = load_model("tiny")
    converted(model, Int8Linear)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    monkeypatch.setattr("lightning_modules.calibration.module.load_model", lambda *args, **options: (model, processor))
    torch.manual_seed(0)
    module = CalibrationModule(lora_rank=2)
    data = AVDataModule(
        train_clips=4, validation_clips=2, batch_size=2, questions_per_clip=1, cache_dir=str(tmp_path / "clips")
    )
    trainer = Trainer(
        max_steps=2,
        max_epochs=1,
        callbacks=[ExportCompressor(str(tmp_path / "export"), new_tokens=4)],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data)
    lora = KVCompressor.from_pretrained(tmp_path / "export").lora
    assert lora is not None and any(bool(tensor.any()) for name, tensor in lora.tensors.items() if "lora_B" in name)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    options = EvaluationOptions(
        compressor=str(tmp_path / "export"),
        policies="acckv-calibrated",
        ratios=[0.2],
        output=str(tmp_path / "eval"),
        timelines=0,
        accelerator="cpu",
    )
    results = run_evaluation(options, questions=("held out", data.records("validation")[:2]), model=(model, processor))
    assert {(row.policy, row.ratio) for row in results.rows} >= {("full", 1.0), ("acckv-calibrated", 0.2)}


def test_compression_of_a_quantised_base_is_that_of_its_dequantised_twin() -> None:
    """With LoRA beside the quantised weights, and folded into the plain ones."""
    family = FAMILIES["videollama2"]
    quantised = converted(family.build(), Int8Linear)
    plain = family.build()
    for one, other in zip(find_adapter(plain).decoder.layers, find_adapter(quantised).decoder.layers, strict=True):
        for part in ("self_attn", "mlp"):
            for name, module in getattr(other, part).named_children():
                if isinstance(module, Int8Linear):
                    getattr(getattr(one, part), name).weight.data = module.weight * module.scale
    torch.manual_seed(0)
    lora = random_lora(quantised, targets=("q_proj", "down_proj"))
    compressor = KVCompressor("keydiff", ratio=0.3, lora=lora)
    logits = []
    for model in (quantised, plain):
        with compressor(model):
            logits.append(generate(model, family.clip(model), max_new_tokens=3, do_sample=False)[1])
    assert (logits[0] - logits[1]).abs().max() < 1e-4 * logits[1].abs().max()


@pytest.mark.parametrize("kind", ["dynamic_int8", "foreign"])
def test_what_peft_cannot_adapt_is_refused_and_left_as_it_was(kind: str) -> None:
    """It still compresses without LoRA."""
    family = FAMILIES["videollama2"]
    base = family.build()
    config = lora_config(find_adapter(base), 2, 4, ("q_proj",), "base")
    if kind == "foreign":
        model = converted(copy.deepcopy(base), Foreign)
    else:
        model = torch.ao.quantization.quantize_dynamic(base, {nn.Linear}, dtype=torch.qint8)
    before = {name: type(module) for name, module in model.named_modules()}
    message = (
        "lora_targets: peft cannot adapt model.layers.0.self_attn.q_proj, a .*(Foreign|dynamic.*Linear) .*lora_rank 0"
    )
    with pytest.raises(InputError, match=message) as caught:
        lora_config(find_adapter(model), 2, 4, ("q_proj",), "base")
    with pytest.raises(InputError, match="peft cannot adapt"):
        KVCompressor("keydiff", lora=LoraWeights(config, {}))(model).__enter__()
    assert "\n" not in str(caught.value)
    assert {name: type(module) for name, module in model.named_modules()} == before
    with KVCompressor("keydiff", ratio=0.3)(model) as session:
        model.generate(**family.clip(model), max_new_tokens=2)
        assert not_none(session.last_cache).kept_entries().sum() == int(0.3 * 3 * 14)


def test_the_message_lists_what_was_matched_and_what_there_is() -> None:
    model = FAMILIES["videollama2"].build()
    converted(model, Int8Linear)
    message = (
        r"'qkv', 'w1' names no linear layer of the decoder; matched: q_proj; there are: q_proj \(3 Int8Linear\), k_proj"
    )
    with pytest.raises(InputError, match=message):
        lora_config(find_adapter(model), 2, 4, ("q_proj", "qkv", "w1"), "base")
