r"""What the saliency scorer should see and how large it should be: validation KL of calibrations with other scorers.

    python -m benchmarks.scorer_study --steps 400 --output benchmarks/results/scorer.json

Every line trains `configs/calib.yaml` for that many steps, by KL alone, with one scorer in place of the default, which
is linear in an entry's own key and value and its place in its segment, for each layer, KV head and modality. Measured
is what settings are chosen by: KL(full cache || hard selection) on the validation clips, in nats a token.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import seed_everything
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

from acckv.io.files import whole_file
from acckv.method.modality import Modality, ModalityMap
from acckv.method.weights import WEIGHT_GROUPS, CalibratedWeights
from benchmarks.calibration_study import plain_trainer
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.cli.errors import quiet_libraries

RATIOS = (0.2, 0.05, 0.02)
PLACED = ("saliency_position",)


class KeysAlone(CalibratedWeights):
    def saliency_score(self, layer: int, keys: Tensor, values: Tensor, labels: ModalityMap) -> Tensor:
        return super().saliency_score(layer, keys, torch.zeros_like(values), labels)


class ValuesAlone(CalibratedWeights):
    def saliency_score(self, layer: int, keys: Tensor, values: Tensor, labels: ModalityMap) -> Tensor:
        return super().saliency_score(layer, torch.zeros_like(keys), values, labels)


class OneForBothModalities(CalibratedWeights):
    def saliency_score(self, layer: int, keys: Tensor, values: Tensor, labels: ModalityMap) -> Tensor:
        everyone = ModalityMap(labels.labels.masked_fill(labels.media, Modality.VIDEO))
        return super().saliency_score(layer, keys, values, everyone)


class OneForAllLayers(CalibratedWeights):
    def saliency_score(self, layer: int, keys: Tensor, values: Tensor, labels: ModalityMap) -> Tensor:
        return super().saliency_score(0, keys, values, labels)


class WithClipPlace(CalibratedWeights):
    """Sees also where in the clip an entry is."""

    def __init__(
        self, layers: int, kv_heads: int, query_heads: int, head_size: int, probes: int, units: int = 0
    ) -> None:
        super().__init__(layers, kv_heads, query_heads, head_size, probes, units)
        self.saliency_clip = nn.Parameter(torch.zeros(layers, 2, kv_heads, 2))

    def saliency_score(self, layer: int, keys: Tensor, values: Tensor, labels: ModalityMap) -> Tensor:
        members = labels.by_modality
        by_position = torch.einsum(
            "nf,mkf,bmn->bkn", clip_positions(members), self.saliency_clip[layer], members.float()
        )
        return super().saliency_score(layer, keys, values, labels) + by_position


class Perceptron(CalibratedWeights):
    """A hidden layer over key, value and modality, for each layer and head."""

    hidden = 16

    def __init__(
        self, layers: int, kv_heads: int, query_heads: int, head_size: int, probes: int, units: int = 0
    ) -> None:
        super().__init__(layers, kv_heads, query_heads, head_size, probes, units)
        generator, inputs = torch.Generator().manual_seed(1), 2 * head_size + 2
        shape = (layers, kv_heads, inputs, self.hidden)
        self.saliency_first = nn.Parameter(torch.randn(*shape, generator=generator) / math.sqrt(inputs))
        self.saliency_last = nn.Parameter(torch.zeros(layers, kv_heads, self.hidden))

    def saliency_score(self, layer: int, keys: Tensor, values: Tensor, labels: ModalityMap) -> Tensor:
        entries = torch.cat([keys, values], dim=-1).float()
        entries = entries * (entries.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        members = labels.by_modality
        kinds = members.float().transpose(1, 2)[:, None].expand(*entries.shape[:3], 2)
        hidden = functional.gelu(torch.cat([entries, kinds], dim=-1) @ self.saliency_first[layer])
        score = (hidden * self.saliency_last[layer][:, None]).sum(-1)
        linear = super().saliency_score(layer, keys, values, labels)
        return linear + score * members.any(1, keepdim=True)


class WidePerceptron(Perceptron):
    hidden = 64


SCORERS: dict[str, tuple[type[CalibratedWeights], tuple[str, ...]]] = {
    "key and value, linear": (CalibratedWeights, ()),
    "key alone": (KeysAlone, ()),
    "value alone": (ValuesAlone, ()),
    "+ place in its segment (default)": (CalibratedWeights, PLACED),
    "+ place in its segment and in the clip": (WithClipPlace, (*PLACED, "saliency_clip")),
    "+ a layer of 16 hidden units": (Perceptron, ("saliency_first", "saliency_last")),
    "+ a layer of 64 hidden units": (WidePerceptron, ("saliency_first", "saliency_last")),
    "one for both modalities": (OneForBothModalities, ()),
    "one for all layers": (OneForAllLayers, ()),
}
"""Label -> weights, and which of them learn besides key and value."""


def clip_positions(members: Tensor) -> Tensor:
    """Sine and cosine of the place in the clip, ``[N, 2]``."""
    count = members.shape[-1]
    turn = math.tau * (torch.arange(count, device=members.device) + 0.5) / count
    return torch.stack([turn.sin(), turn.cos()], dim=-1)


class WithScorer(CalibrationModule):
    """A calibration with another scorer."""

    extra: tuple[str, ...] = ()

    def configure_model(self) -> None:
        super().configure_model()
        # What a scorer adds is in no group of weights that can be learned or left.
        for name in self.extra:
            self.weights.get_parameter(name).requires_grad_(True)


def validation_kl(
    config: dict[str, Any], data: AVDataModule, scorer: str, steps: int, seed: int, folder: Path
) -> dict[str, float]:
    """Train with one scorer; ratio -> KL on the validation clips."""
    seed_everything(seed, verbose=False)
    data.reorder(seed)
    learn = tuple(group for group in WEIGHT_GROUPS if group != "positions")
    options = {"seed": seed, "validation_ratios": RATIOS, "feature_loss": None, "trainable": learn}
    module = WithScorer(**config["model"] | options)
    module.weights_class, module.extra = SCORERS[scorer]
    trainer = plain_trainer(config, steps, folder, val_check_interval=steps, check_val_every_n_epoch=None)
    trainer.fit(module, data)
    return {f"{ratio:g}": float(trainer.callback_metrics[f"val/kl@{ratio:g}"]) for ratio in RATIOS}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/scorer.json"), help="file of all results")
    parser.add_argument("--config", type=Path, default=Path("configs/calib.yaml"), help="the calibration")
    parser.add_argument("--steps", type=int, default=400, help="of each training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache-dir", default=None, help="of the generated clips")
    given = parser.parse_args(arguments)
    quiet_libraries()
    config = yaml.safe_load(given.config.read_text(encoding="utf-8"))
    data = AVDataModule(**{**config["data"], "cache": "prefill", "cache_dir": given.cache_dir})
    table = Table("scorer", *(f"KL at {ratio:g}" for ratio in RATIOS), box=box.SIMPLE_HEAD)
    rows: dict[str, dict[str, float]] = {}
    for label in SCORERS:
        rows[label] = validation_kl(config, data, label, given.steps, given.seed, given.output.parent)
        table.add_row(label, *(f"{kl:.4f}" for kl in rows[label].values()))
        with whole_file(given.output) as file:
            file.write_text(json.dumps({"steps": given.steps, "seed": given.seed, "kl": rows}, indent=1) + "\n")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
