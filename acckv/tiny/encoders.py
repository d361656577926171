"""First part of pretraining: teach both encoders to name what a slot holds, with throw-away heads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from acckv.tiny.bank import NOTHING, SlotBank
from acckv.tiny.build import POSITION_IDS_PER_SECOND
from acckv.tiny.fast_training import fast_training

GRID = 6
CLASSES = {"shape": 7, "colour": 7, "timbre": 7, "pitch": 5}
COVERED = {cell: [(cell // 2 + i) * 3 + cell % 2 + j for i in (0, 1) for j in (0, 1)] for cell in range(4)}
"""Place of an object -> the video tokens (of 3x3) that it covers."""


def warm_up(
    model: Qwen2_5OmniThinkerForConditionalGeneration,
    bank: SlotBank,
    held_out: SlotBank,
    steps: int,
    seed: int,
    report: Callable[[str], None],
    slots_a_step: int = 48,
    learning_rate: float = 2e-3,
) -> dict[str, float]:
    """Train `model.model.visual` and `model.model.audio_tower` on per-token classification.

    Returns:
        token accuracy on `held_out` per label.
    """
    torch.manual_seed(seed)
    width = model.config.text_config.hidden_size
    picture_head, sound_head = nn.Linear(width, 14), nn.Linear(width, 12)
    towers = (model.model.visual, model.model.audio_tower, picture_head, sound_head)
    parameters = [p for module in towers for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.98))
    model.train()
    with fast_training():
        for step in range(steps):
            rate = learning_rate * min(1, (step + 1) / 30) * (1 - step / steps)
            for group in optimizer.param_groups:
                group["lr"] = rate
            slots = np.random.default_rng([seed, 1, step]).integers(0, len(bank.labels), slots_a_step)
            scores, answers = _classify(model, bank, slots, picture_head, sound_head)
            loss = torch.stack([F.cross_entropy(scores[name], answers[name]) for name in CLASSES]).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if (step + 1) % 100 == 0:
                report(f"encoders {step + 1}/{steps} loss {loss.item():.3f}")
        model.eval()
        with torch.no_grad():
            slots = np.random.default_rng(seed).permutation(len(held_out.labels))[:256]
            scores, answers = _classify(model, held_out, slots, picture_head, sound_head)
    return {name: float((scores[name].argmax(-1) == answers[name]).float().mean()) for name in CLASSES}


def _classify(
    model: Qwen2_5OmniThinkerForConditionalGeneration,
    bank: SlotBank,
    slots: np.ndarray,
    picture_head: nn.Module,
    sound_head: nn.Module,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Class scores [tokens, classes] and true classes [tokens] per label."""
    count = len(slots)
    grid = torch.tensor([[count, GRID, GRID]])
    pixels = bank.pixels[slots].float().flatten(0, 1)
    mel = bank.mel[slots].float().permute(1, 0, 2).flatten(1)[None]
    seen = model.model.get_video_features(pixels, grid).pooler_output[0]
    heard = model.model.get_audio_features(mel, torch.ones(1, mel.shape[-1], dtype=torch.long)).last_hidden_state
    seen, heard = picture_head(unit_rms(seen)), sound_head(unit_rms(heard))
    labels = bank.labels[slots]
    covered = np.full((count, 9, 2), 6)
    for row, (shape, colour, cell, _, _) in enumerate(labels):
        if shape != NOTHING:
            covered[row, COVERED[int(cell)]] = (shape, colour)
    silent = labels[:, 3] == NOTHING
    timbre = np.where(silent, 6, labels[:, 3]).repeat(POSITION_IDS_PER_SECOND)
    pitch = np.where(silent, 4, labels[:, 4]).repeat(POSITION_IDS_PER_SECOND)
    scores = {"shape": seen[:, :7], "colour": seen[:, 7:], "timbre": heard[:, :7], "pitch": heard[:, 7:]}
    truth = {"shape": covered[..., 0].reshape(-1), "colour": covered[..., 1].reshape(-1), "timbre": timbre}
    return scores, {name: torch.from_numpy(values) for name, values in (truth | {"pitch": pitch}).items()}


def unit_rms(values: Tensor) -> Tensor:
    """Scale the last axis to a root mean square of one."""
    return values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6)
