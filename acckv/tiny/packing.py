"""Packed training rows: one clip, many turns that cannot see each other.

A row holds the tokens of the media once, then turn after turn; each turn attends to the media and to itself, at the
positions it would have alone. Every turn therefore equals the single-turn prompt of the chat template.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2_5OmniProcessor, Qwen2_5OmniThinkerForConditionalGeneration

from acckv.data.encoding import encode_context, question_suffix
from acckv.data.synthetic.events import DESCRIPTION_TYPES, SINGLE_TYPES, ClipScript, ask, draw_script
from acckv.data.synthetic.render import SIDE
from acckv.models.clips import Media
from acckv.tiny.bank import SlotBank

KINDS = (*SINGLE_TYPES, *DESCRIPTION_TYPES)
END_WEIGHT = 0.05
LIST_WEIGHT = 0.3
SLOT_LABELS = ("shape", "colour", "previous shape", "previous timbre")
"""Auxiliary targets a slot; the previous ones are asked in slots with a shape (or sound) only."""


@dataclass(frozen=True)
class Stage:
    """One step of the curriculum: clips of `slots` seconds with so many events, at most `steps` of `batch` clips."""

    slots: int
    both: int
    video_only: int
    audio_only: int
    steps: int
    batch: int


@dataclass
class PackedBatch:
    """Model inputs and targets of packed rows.

    Attributes:
        inputs: keyword arguments of the model, [batch, tokens] where a row is meant.
        targets: int64 [batch, tokens], the token that follows each token (0 where nothing is asked).
        weights: float32 [batch, tokens], 0 where nothing is asked.
        kinds: int64 [batch, tokens], index in KINDS of the question whose answer is asked here, else -1.
        slot_labels: int64 [batch, slots, labels], see SLOT_LABELS; 6 for none, -100 where nothing is asked.
    """

    inputs: dict[str, Any]
    targets: Tensor
    weights: Tensor
    kinds: Tensor
    slot_labels: Tensor


class PackedLayout:
    """Tokens, positions and mask of the rows of one stage; they are the same for all its clips."""

    def __init__(
        self,
        model: Qwen2_5OmniThinkerForConditionalGeneration,
        processor: Qwen2_5OmniProcessor,
        stage: Stage,
        turns_a_type: int = 2,
    ) -> None:
        self.stage = stage
        self.turns = [kind for kind in SINGLE_TYPES for _ in range(turns_a_type)] + list(DESCRIPTION_TYPES)
        self._suffix = lru_cache(maxsize=None)(lambda text: question_suffix(processor, text).tolist())
        self._words = lru_cache(maxsize=None)(
            lambda text: processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        )
        self.end = processor.tokenizer.eos_token_id
        blank = Media(
            torch.zeros(2 * stage.slots, 3, SIDE, SIDE, dtype=torch.uint8),
            torch.zeros(16_000 * stage.slots),
            float(stage.slots),
            Path("blank"),
        )
        context = encode_context(processor, blank)
        self.prefix = context["input_ids"][0]
        self.audio_slots = (self.prefix == processor.audio_token_id).nonzero().flatten()
        positions, _ = model.model.get_rope_index(
            context["input_ids"],
            None,
            context["video_grid_thw"],
            context["attention_mask"],
            True,
            context["feature_attention_mask"].sum(-1),
            context["video_second_per_grid"],
        )
        self.grid, self.seconds = context["video_grid_thw"], context["video_second_per_grid"]
        script = self._draw(np.random.default_rng(0), "train")
        self.lengths = [len(tokens) for tokens, _ in self._turns(script, np.random.default_rng(0))]
        turns = [(positions.max() + 1 + torch.arange(length)).expand(3, -1) for length in self.lengths]
        self.positions = torch.cat([positions[:, 0], *turns], 1)[:, None]  # [3, 1, tokens]
        turn = torch.cat([torch.full((n,), i) for i, n in enumerate([len(self.prefix), *self.lengths])])
        visible = (turn[None, :] == 0) | (turn[:, None] == turn[None, :])
        visible &= torch.ones_like(visible).tril()
        self.mask = torch.zeros(1, 1, *visible.shape).masked_fill(~visible, float("-inf"))

    @property
    def tokens(self) -> int:
        return len(self.prefix) + sum(self.lengths)

    def batch(self, bank: SlotBank, rng: np.random.Generator, split: str, size: int) -> PackedBatch:
        """Draw `size` clips of `split` with their turns."""
        scripts = [self._draw(rng, split) for _ in range(size)]
        ids = torch.zeros(size, self.tokens, dtype=torch.long)
        targets, kinds = torch.zeros_like(ids), torch.full_like(ids, -1)
        weights = torch.zeros(size, self.tokens)
        labels = torch.zeros(size, self.stage.slots, len(SLOT_LABELS), dtype=torch.long)
        ids[:, : len(self.prefix)] = self.prefix
        for row, script in enumerate(scripts):
            start = len(self.prefix)
            for kind, (tokens, answers) in zip(self.turns, self._turns(script, rng), strict=True):
                stop = start + len(tokens)
                asked = slice(stop - len(answers), stop)
                ids[row, start:stop] = torch.tensor(tokens)
                targets[row, asked] = torch.tensor(answers)
                weights[row, asked] = LIST_WEIGHT if kind in DESCRIPTION_TYPES else 1.0
                kinds[row, asked] = KINDS.index(kind)
                if kind not in DESCRIPTION_TYPES:
                    weights[row, stop - 1], kinds[row, stop - 1] = END_WEIGHT, -1
                start = stop
            labels[row] = _slot_labels(script)
        pixels, mel = bank.clip_features(scripts, rng)
        inputs = {
            "input_ids": ids,
            "attention_mask": self.mask.expand(size, -1, -1, -1),
            "position_ids": self.positions.expand(-1, size, -1),
            "pixel_values_videos": pixels,
            "video_grid_thw": self.grid.expand(size, -1),
            "video_second_per_grid": self.seconds.expand(size),
            "input_features": mel,
            "feature_attention_mask": torch.ones(size, mel.shape[-1], dtype=torch.long),
            "use_audio_in_video": True,
        }
        return PackedBatch(inputs, targets, weights, kinds, labels)

    def _draw(self, rng: np.random.Generator, split: str) -> ClipScript:
        stage = self.stage
        return draw_script(rng, split, stage.slots, stage.both, stage.video_only, stage.audio_only)

    def _turns(self, script: ClipScript, rng: np.random.Generator) -> list[tuple[list[int], list[int]]]:
        """Each turn's tokens (question to last answer word) and the targets of its last tokens (answer and end)."""
        turns = []
        for kind in self.turns:
            question = ask(script, kind, rng)
            if question is None:
                raise RuntimeError(f"the clips of this stage leave nothing to ask of type {kind}")
            answer = self._words(question.answer)
            turns.append((self._suffix(question.text) + answer, [*answer, self.end]))
        return turns


def _slot_labels(script: ClipScript) -> Tensor:
    """Auxiliary targets of a clip: int64 [slots, len(SLOT_LABELS)]."""
    labels = torch.tensor([[6, 6, -100, -100]]).repeat(script.slots, 1)
    for slot, event in script.shapes.items():
        labels[slot, :2] = torch.tensor(event)
    for column, events in ((2, script.shapes), (3, script.sounds)):
        previous = 6
        for slot in sorted(events):
            labels[slot, column] = previous
            previous = events[slot][0]
    return labels
