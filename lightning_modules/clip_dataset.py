"""Clips with questions as items of a calibration: encoded once, batched with the turns drawn for a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from acckv.config import When
from acckv.data.batching import PackedTurns, Turn, pack_turns
from acckv.data.encoded import read_clip
from acckv.data.encoding import encode, question_suffix
from acckv.data.records import ClipKey, Record
from acckv.policies.base import Rows
from acckv.prefill import Prefill
from acckv.ragged import DecoderInputs
from acckv.session import Session
from lightning_modules.taught import Lesson, Taught

HOST = torch.device("cpu")
Keep = Literal["nothing", "embeddings", "prefill"]


@dataclass(frozen=True)
class CalibrationBatch:
    """Contexts and the turns that follow them.

    Attributes:
        inputs: for the model, up to where the cache is compressed; empty where `embedded` is given.
        embedded: the same as it enters the decoder, from an earlier visit of the clips.
        prefill: the full-cache prefill of the base model, from an earlier visit, and `taught`: what it then says.
        keep: takes that prefill for later visits; None where nothing is kept.
        turns: what is answered afterwards.
        lesson: every question about the clips, where what the base model says is kept for later visits too.
        number: of the optimiser step in the whole training; every random draw of a step comes from it, so that
            batches that are accumulated share them.
    """

    inputs: dict[str, Any]
    turns: PackedTurns
    number: int
    embedded: DecoderInputs | None = None
    prefill: Prefill | None = None
    taught: Taught | None = None
    keep: Callable[[Prefill], None] | None = None
    lesson: Lesson | None = None

    def prefilled(self, session: Session, rows: Rows) -> Prefill:
        """A prefill of the contexts in a session: the one of an earlier visit, where it is the session's own."""
        if self.prefill is None:
            return session.prefill(self.embedded, rows, **self.inputs)
        return session.prefill(self.prefill.embedded, rows) if session.adapts_prompt else self.prefill


@dataclass(frozen=True)
class CalibrationItem:
    """One clip of a batch.

    Attributes:
        record: a question about it; asked: whether that is part of the prompt.
        turns: all that can be asked about it; drawn: which of them this step asks, in their order.
        number: of the step.
    """

    record: Record
    asked: bool
    turns: list[Turn]
    drawn: list[int]
    number: int


class ClipDataset(Dataset[CalibrationItem]):
    """One item a clip: a draw of its questions.

    Args:
        records: questions; those about the same clip make one item.
        turns: questions drawn for each visit of a clip (one with `when: prompt`); 0 takes all.
        keep: what is held in memory of a clip after its first visit; nothing with `when: prompt`.
    """

    def __init__(self, records: list[Record], processor: Any, when: When, turns: int, seed: int, keep: Keep) -> None:
        by_clip: dict[ClipKey, list[Record]] = {}
        for record in records:
            by_clip.setdefault(record.clip, []).append(record)
        self.clips = list(by_clip.values())
        self.processor, self.when, self.turns, self.seed = processor, when, turns, seed
        self.keep: Keep = keep if when == "context" else "nothing"
        self.embedded: dict[ClipKey, DecoderInputs] = {}
        self.prefills: dict[ClipKey, Prefill] = {}
        self.taught: dict[ClipKey, list[Taught]] = {}
        self.every_turn: dict[int, list[Turn]] = {}  # in tokens, made on the first visit

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: tuple[int, int]) -> CalibrationItem:
        index, number = key
        questions = self.clips[index]
        order = np.random.default_rng((self.seed, number, index)).permutation(len(questions))
        if self.when == "prompt":
            record = questions[order[0]]
            return CalibrationItem(record, True, [Turn(self._answer(record), 0)], [0], number)
        drawn = sorted(order[: self.turns or None].tolist())
        if index not in self.every_turn:
            self.every_turn[index] = [self._turn(question) for question in questions]
        return CalibrationItem(questions[0], False, self.every_turn[index], drawn, number)

    def _turn(self, record: Record) -> Turn:
        suffix = question_suffix(self.processor, record.question)
        return Turn(torch.cat([suffix, self._answer(record)]), len(suffix) - 1)

    def _answer(self, record: Record) -> Tensor:
        tokenizer = self.processor.tokenizer
        ids = tokenizer(record.answer, add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, tokenizer.eos_token_id])

    def collate(self, items: list[CalibrationItem]) -> CalibrationBatch:
        turns, number = pack_turns([[item.turns[place] for place in item.drawn] for item in items]), items[0].number
        clips = [item.record.clip for item in items]
        if all(clip in self.prefills for clip in clips):
            prefill = Prefill.stack([self.prefills[clip] for clip in clips])
            if not all(clip in self.taught for clip in clips):
                return CalibrationBatch({}, turns, number, prefill=prefill, lesson=self._lesson(items))
            taught = Taught.join([self.taught[item.record.clip][place] for item in items for place in item.drawn])
            return CalibrationBatch({}, turns, number, prefill=prefill, taught=taught)
        if all(clip in self.embedded for clip in clips):
            embedded = DecoderInputs.stack([self.embedded[clip] for clip in clips])
            return CalibrationBatch({}, turns, number, embedded)
        questions = [item.record.question for item in items if item.asked]
        inputs = encode(self.processor, [read_clip(item.record) for item in items], questions or None)
        keep = None if self.keep == "nothing" else partial(self._keep, clips)
        lesson = self._lesson(items) if self.keep == "prefill" else None
        return CalibrationBatch(inputs, turns, number, keep=keep, lesson=lesson)

    def _lesson(self, items: list[CalibrationItem]) -> Lesson:
        clips = [item.record.clip for item in items]
        every = pack_turns([item.turns for item in items])
        return Lesson(every, [item.drawn for item in items], partial(self._keep_taught, clips))

    def _keep(self, clips: list[ClipKey], prefill: Prefill) -> None:
        if self.keep == "prefill":
            self.prefills.update(zip(clips, [row.to(HOST) for row in prefill.rows()], strict=True))
        else:
            self.embedded.update(zip(clips, [row.to(HOST) for row in prefill.embedded.rows()], strict=True))

    def _keep_taught(self, clips: list[ClipKey], rows: list[list[Taught]]) -> None:
        self.taught.update(zip(clips, [[turn.to(HOST) for turn in row] for row in rows], strict=True))
