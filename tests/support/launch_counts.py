"""What compression costs in kernel launches and host synchronisations, counted on the pretend accelerator.

    python -m tests.support.launch_counts

prints the table: over a plain prefill by layer, and a decode step, of every policy.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acckv import KVCompressor
from acckv.models import find_adapter, load_model
from acckv.policies import POLICIES, AccKV, make_policy
from tests.families import Tokenizer
from tests.learned import calibrated
from tests.support.simulated_accelerator import SimulatedAccelerator, on_device, place

#: All that a calibration adapts by default.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CALIBRATED = ("calibrated", "calibrated paper")
RATIO, TEXT, QUESTION = 0.1, 4, 6


@dataclass
class Counts:
    """Launches and syncs of the package's own, of a prefill with its first token, and of each token after it."""

    prefill: int
    prefill_syncs: int
    step: float
    step_syncs: float


def model() -> Any:
    """The embedded model's decoder, six layers."""
    return load_model("tiny")[0]


def clips(model: Any, lengths: tuple[int, ...] = (90,), question: int = QUESTION) -> dict[str, Tensor]:
    """Prompts of random embeddings: text, a clip of two thirds video, a question; shorter ones padded on the left."""
    longest, generator = max(lengths), torch.Generator().manual_seed(0)
    kinds, mask = torch.zeros(len(lengths), longest, dtype=torch.long), torch.ones(len(lengths), longest)
    for row, length in enumerate(lengths):
        start = longest - length
        kinds[row, start + TEXT : longest - question] = 1
        kinds[row, start + TEXT : longest - question : 3] = 2
        mask[row, :start] = 0
    embeds = torch.randn(len(lengths), longest, model.config.text_config.hidden_size, generator=generator)
    return {"inputs_embeds": embeds, "modality_ids": kinds, "attention_mask": mask.long()}


def compressor(name: str, model: Any, targets: tuple[str, ...] = TARGETS) -> KVCompressor:
    """By a policy's name; 'context' is AccKV's preset, 'calibrated' an export's weights and LoRA of rank 16 on it."""
    preset = {"context": "context", "calibrated": "context", "calibrated paper": "paper"}.get(name)
    policy = AccKV.preset(preset) if preset else make_policy(name)
    if name not in CALIBRATED:
        return KVCompressor(policy, ratio=RATIO)
    return calibrated(model, policy, 0.1, 16, targets, ratio=RATIO).requires_grad_(False)


def counted(compressor: KVCompressor | None, model: Any, inputs: dict[str, Tensor], **options: Any) -> Counts:
    """Of the second prompt of a session (what is made once a session, such as merged weights, is of the first).

    Args:
        model, inputs: on the CPU; the model is put on the pretend device, for good.
        options: of the session.
    """
    with SimulatedAccelerator() as accelerator:
        place(model)
        given = {name: value for name, value in on_device(inputs).items() if compressor or name != "modality_ids"}
        session = nullcontext() if compressor is None else compressor(model, Tokenizer(), **options)

        def launched(tokens: int) -> tuple[int, int]:
            accelerator.reset()
            model.generate(**given, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
            return accelerator.launches, accelerator.synced

        with session:
            launched(1)
            one, three = launched(1), launched(3)
    return Counts(*one, (three[0] - one[0]) / 2, (three[1] - one[1]) / 2)


def main() -> None:
    loaded = model()
    inputs, layers = clips(loaded), len(find_adapter(loaded).attention_modules)
    plain = counted(None, loaded, inputs)
    print(f"plain: prefill {plain.prefill}, step {plain.step:g}\n")
    print("| policy | prefill, launches a layer | syncs a prompt | step, launches | syncs |\n|---|---|---|---|---|")
    for name in [*(name for name in POLICIES if name != "full"), "context", *CALIBRATED]:
        loaded = model()
        found = counted(compressor(name, loaded), loaded, inputs)
        added = (found.prefill - plain.prefill) / layers
        step = f"{found.step:g} (+{100 * (found.step / plain.step - 1):.0f} %)"
        print(f"| {name} | +{added:.0f} | {found.prefill_syncs} | {step} | {found.step_syncs:g} |")


if __name__ == "__main__":
    main()
