"""Pretrain the tiny AV-LLM from nothing: `python -m acckv.tiny.pretrain --output DIR`.

Slots are rendered once into real .mp4 clips, read back and run through the processor; their features are recombined
into unlimited training clips. First the encoders learn to name what a slot holds, then the whole model answers packed
questions about clips of 4, 8 and at last 16 seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from acckv.data.synthetic.events import DESCRIPTION_TYPES, SINGLE_TYPES
from acckv.io.files import whole_file
from acckv.tiny.bank import SlotBank, load_bank
from acckv.tiny.build import POSITION_IDS_PER_SECOND, build_model, build_processor, save
from acckv.tiny.encoders import unit_rms, warm_up
from acckv.tiny.fast_training import fast_training
from acckv.tiny.packing import KINDS, SLOT_LABELS, PackedBatch, PackedLayout, Stage

CURRICULUM = (
    Stage(slots=4, both=2, video_only=1, audio_only=1, steps=500, batch=16),
    Stage(slots=8, both=2, video_only=2, audio_only=2, steps=300, batch=12),
    Stage(slots=16, both=3, video_only=2, audio_only=2, steps=900, batch=12),
)


@dataclass(frozen=True)
class PretrainSettings:
    """The options of one pretraining run."""

    output: Path
    seed: int = 0
    workers: int = 2
    minutes: float = math.inf
    bank_clips: int = 480
    held_out_clips: int = 40
    encoder_steps: int = 600
    learning_rate: float = 1.5e-3
    final_rate: float = 3e-5
    warm_up_steps: int = 100
    weight_decay: float = 0.01
    auxiliary_layer: int = 2
    auxiliary_weight: float = 0.2
    evaluate_every: int = 100
    evaluation_clips: int = 48
    advance_at: float = 0.95
    stages: tuple[Stage, ...] = CURRICULUM


@dataclass
class Progress:
    """The state of a run; saved with each checkpoint."""

    stage: int = 0
    stage_step: int = 0
    step: int = 0
    seconds: float = 0.0
    accuracy: dict[str, float] = field(default_factory=dict)


class Pretraining:
    """One resumable run: model, auxiliary head, optimizer and the position in the curriculum."""

    def __init__(self, settings: PretrainSettings) -> None:
        self.settings = settings
        torch.set_num_threads(1)
        self._workers = ThreadPoolExecutor(settings.workers, initializer=torch.set_num_threads, initargs=(1,))
        torch.manual_seed(settings.seed)
        self.console = Console()
        self.model = build_model()
        self.processor = build_processor()
        hidden = self.model.config.text_config.hidden_size
        self.auxiliary_head = nn.Linear(hidden, 7 * len(SLOT_LABELS))
        self.progress = Progress()
        self._local = threading.local()
        layer = self.model.model.language_model.layers[settings.auxiliary_layer]
        layer.register_forward_hook(self._keep_layer_output)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2] + list(self.auxiliary_head.parameters())
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98), eps=1e-9)

    @property
    def checkpoint(self) -> Path:
        return self.settings.output / "checkpoint.pt"

    def run(self, resume: bool) -> None:
        """Train to the end of the curriculum, or for `settings.minutes` of net time."""
        settings = self.settings
        bank = load_bank(settings.output / "bank", settings.bank_clips, settings.seed + 1000)
        held_out = load_bank(settings.output / "bank", settings.held_out_clips, settings.seed + 5000)
        if resume and self.checkpoint.is_file():
            self.load()
            self.say(f"resumed at step {self.progress.step}")
        else:
            started = time.perf_counter()
            accuracy = warm_up(self.model, bank, held_out, settings.encoder_steps, settings.seed, self.say)
            self.progress.seconds += time.perf_counter() - started
            self.say(f"encoders, held out: {json.dumps(_rounded(accuracy))}")
            self.store()
        while self.progress.stage < len(settings.stages) and self._in_time():
            layout = PackedLayout(self.model, self.processor, settings.stages[self.progress.stage])
            with fast_training(len(layout.prefix)):
                self._run_stage(layout, bank, held_out)
            if self._in_time():
                self.progress.stage, self.progress.stage_step = self.progress.stage + 1, 0
            self.store()
        save(self.model, settings.output / "model")
        self.say(f"saved {settings.output / 'model'} after {self.progress.seconds / 60:.1f} minutes")

    def _run_stage(self, layout: PackedLayout, bank: SlotBank, held_out: SlotBank) -> None:
        settings, progress = self.settings, self.progress
        last = progress.stage == len(settings.stages) - 1
        self.say(f"stage {progress.stage}: {layout.stage}, {layout.tokens} tokens a row")
        losses: list[float] = []
        started = time.perf_counter()
        for parts in self._batches(layout, bank):
            losses.append(self._update(parts, layout))
            progress.step, progress.stage_step = progress.step + 1, progress.stage_step + 1
            if progress.step % settings.evaluate_every:
                continue
            progress.accuracy = self.evaluate(layout, held_out)
            spent = time.perf_counter() - started
            started += spent
            progress.seconds += spent
            self.say(
                f"{progress.seconds / 60:.1f} min step {progress.step} loss {np.mean(losses):.4f} "
                f"{spent / len(losses):.2f} s/step {json.dumps(_rounded(progress.accuracy))}"
            )
            losses = []
            self.store()
            if last:
                save(self.model, settings.output / "model")
            singles = [progress.accuracy["/".join(kind)] for kind in SINGLE_TYPES]
            if not self._in_time() or (not last and min(singles) >= settings.advance_at):
                break
        progress.seconds += time.perf_counter() - started

    def _batches(self, layout: PackedLayout, bank: SlotBank) -> Iterator[list[PackedBatch]]:
        """Batches of the rest of the stage in equal parts, made from the seed and their step, one ahead of its use."""
        first, last = self.progress.stage_step, layout.stage.steps
        workers = self.settings.workers

        def make(step: int) -> list[PackedBatch]:
            rng = np.random.default_rng([self.settings.seed, 2, layout.stage.slots, step])
            return [layout.batch(bank, rng, "train", layout.stage.batch // workers) for _ in range(workers)]

        with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            ahead = pool.submit(make, first) if first < last else None
            for step in range(first, last):
                batch = ahead.result()
                ahead = pool.submit(make, step + 1) if step + 1 < last else None
                yield batch

    def _update(self, parts: list[PackedBatch], layout: PackedLayout) -> float:
        """One step on the mean gradient of the parts; each part is one thread's work (see `workers`)."""
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate()
        parameters = [*self.model.parameters(), *self.auxiliary_head.parameters()]
        results = list(self._workers.map(lambda part: self._gradients(part, layout, parameters), parts))
        for index, parameter in enumerate(parameters):
            gradients = [gradient[index] for _, gradient in results if gradient[index] is not None]
            parameter.grad = sum(gradients) / len(parts) if gradients else None
        nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        return sum(loss for loss, _ in results) / len(parts)

    def _gradients(
        self, batch: PackedBatch, layout: PackedLayout, parameters: list[Tensor]
    ) -> tuple[float, tuple[Tensor, ...]]:
        """Loss on the answers, and the gradients of that and the auxiliary loss."""
        hidden = self.model.model(**batch.inputs, use_cache=False).last_hidden_state
        asked = batch.weights > 0
        weights = batch.weights[asked] * self._type_weights()[batch.kinds[asked]]
        errors = F.cross_entropy(self.model.lm_head(hidden[asked]), batch.targets[asked], reduction="none")
        loss = (errors * weights).sum() / weights.sum()
        total = loss + self.settings.auxiliary_weight * self._auxiliary_loss(batch, layout)
        return loss.item(), torch.autograd.grad(total, parameters, allow_unused=True)

    def _auxiliary_loss(self, batch: PackedBatch, layout: PackedLayout) -> Tensor:
        """Audio tokens predict what their slot shows and what came before it: it binds modalities and moments early."""
        scores = self.auxiliary_head(unit_rms(self._local.layer_output[:, layout.audio_slots])).flatten(0, 1)
        labels = batch.slot_labels.repeat_interleave(POSITION_IDS_PER_SECOND, 1).flatten(0, 1)
        parts = zip(scores.split(7, dim=-1), labels.unbind(-1), strict=True)
        return torch.stack([F.cross_entropy(score, label) for score, label in parts]).sum()

    def _type_weights(self) -> Tensor:
        """Weight per question type (and 1 for tokens of no type): types that lag count more."""
        accuracy = self.progress.accuracy
        weights = [1 + 2 * (1 - accuracy.get("/".join(kind), 1.0)) for kind in SINGLE_TYPES]
        return torch.tensor([*weights, *[1.0] * len(DESCRIPTION_TYPES), 1.0])

    @torch.no_grad()
    def evaluate(self, layout: PackedLayout, bank: SlotBank) -> dict[str, float]:
        """Teacher-forced share of right words per question type, on scripts and renderings not trained on."""
        self.model.eval()
        rng = np.random.default_rng([self.settings.seed, 3])
        right, seen = torch.zeros(len(KINDS)), torch.zeros(len(KINDS))
        for _ in range(max(1, self.settings.evaluation_clips // 16)):
            batch = layout.batch(bank, rng, "validation", min(16, self.settings.evaluation_clips))
            hidden = self.model.model(**batch.inputs, use_cache=False).last_hidden_state
            asked = batch.kinds >= 0
            hits = self.model.lm_head(hidden[asked]).argmax(-1) == batch.targets[asked]
            right += torch.bincount(batch.kinds[asked], hits.float(), len(KINDS))
            seen += torch.bincount(batch.kinds[asked], minlength=len(KINDS))
        return {"/".join(kind): float(right[i] / seen[i]) for i, kind in enumerate(KINDS)}

    def _rate(self) -> float:
        """Learning rate: warm-up, constant, then a cosine over the last two thirds of the last stage."""
        settings, progress = self.settings, self.progress
        rate = settings.learning_rate * min(1.0, (progress.step + 1) / settings.warm_up_steps)
        if progress.stage < len(settings.stages) - 1:
            return rate
        share = progress.stage_step / settings.stages[-1].steps
        fall = max(0.0, (share - 1 / 3) * 1.5)
        return settings.final_rate + (rate - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * fall))

    def _keep_layer_output(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._local.layer_output = output if isinstance(output, Tensor) else output[0]

    def _in_time(self) -> bool:
        return self.progress.seconds < 60 * self.settings.minutes

    def store(self) -> None:
        """Write the checkpoint, replacing the last one at once."""
        state = {
            "model": self.model.state_dict(),
            "auxiliary_head": self.auxiliary_head.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "progress": vars(self.progress),
        }
        with whole_file(self.checkpoint) as partial:
            torch.save(state, partial)

    def load(self) -> None:
        """Continue from the checkpoint in the output folder."""
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.auxiliary_head.load_state_dict(state["auxiliary_head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True, markup=False)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 3) for name, value in values.items()}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m acckv.tiny.pretrain",
        description="Pretrain the tiny audio-video LLM from nothing and save it as a Hugging Face checkpoint.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for features, checkpoint and model/")
    parser.add_argument("--resume", action="store_true", help="continue from the checkpoint in --output")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many minutes of training")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, clips and batches")
    parser.add_argument("--workers", type=int, default=2, help="CPU threads, each with its part of a batch")
    options = parser.parse_args(arguments)
    settings = PretrainSettings(options.output, options.seed, options.workers, options.minutes)
    Pretraining(settings).run(options.resume)
    return 0


if __name__ == "__main__":
    sys.exit(main())
