"""Clips with questions as items of a calibration: encoded once, batched with the turns drawn for a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import Dataset

from acckv.config import When
from acckv.data.batching import PackedTurns, Turn, pack_turns
from acckv.data.encoding import encode, question_suffix
from acckv.data.precomputed import read_clip
from acckv.data.records import ClipKey, Record
from acckv.models.batching import DecoderInputs
from acckv.models.clips import Media, PrecomputedClip
from acckv.policies.base import Rows
from acckv.runtime.prefill import Prefill
from acckv.runtime.session import Session
from lightning_modules.calibration.teacher_cache import TeacherCache
from lightning_modules.calibration.teacher_targets import PendingTargets, TeacherTargets

HOST = torch.device("cpu")
Keep = Literal["nothing", "embeddings", "prefill"]


@dataclass(frozen=True)
class CalibrationBatch:
    """Contexts and the turns that follow them.

    Attributes:
        inputs: for the model, up to where the cache is compressed; empty where `embedded` is given.
        embedded: the same as it enters the decoder, from an earlier visit of the clips.
        prefill: the full-cache prefill of the base model, from an earlier visit, and `targets`: what it then says.
        keep: takes that prefill for later visits; None where nothing is kept.
        turns: what is answered afterwards.
        pending: every question about the clips, where what the base model says is kept for later visits too.
        number: of the optimiser step in the whole training; every random draw of a step comes from it, so that
            batches that are accumulated share them.
    """

    inputs: dict[str, Any]
    turns: PackedTurns
    number: int
    embedded: DecoderInputs | None = None
    prefill: Prefill | None = None
    targets: TeacherTargets | None = None
    keep: Callable[[Prefill], None] | None = None
    pending: PendingTargets | None = None

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
        keep: what is held of a clip after its first visit; nothing with `when: prompt`.
        cache: holds it, as the split's; top_p: share of the teacher's distributions whose likeliest tokens are held.
        read: reads a clip.
    """

    def __init__(
        self,
        records: list[Record],
        processor: Any,
        when: When,
        turns: int,
        seed: int,
        keep: Keep,
        cache: TeacherCache | None = None,
        top_p: float = 1.0,
        split: str = "train",
        read: Callable[[Record], Media | PrecomputedClip] = read_clip,
    ) -> None:
        by_clip: dict[ClipKey, list[Record]] = {}
        for record in records:
            by_clip.setdefault(record.clip, []).append(record)
        self.clips = list(by_clip.values())
        self.processor, self.when, self.turns, self.seed, self.read = processor, when, turns, seed, read
        self.keep: Keep = keep if when == "context" else "nothing"
        self.cache, self.top_p, self.split = cache or TeacherCache(), top_p, split
        self._told = False
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
        return torch.tensor([*ids, tokenizer.eos_token_id] if record.complete else ids, dtype=torch.long)

    def has_kept(self, indices: list[int]) -> bool:
        """Whether clips need not be read again."""
        clips = [self.clips[index][0].clip for index in indices]
        return self._has("prefills", clips) or self._has("embeddings", clips)

    def inputs(self, items: list[CalibrationItem]) -> dict[str, Any]:
        """Read and encode the clips of a batch; nothing of the dataset changes.

        Raises:
            InputError: a clip cannot be read; it names the file.
        """
        questions = [item.record.question for item in items if item.asked]
        media, systems = [self.read(item.record) for item in items], [item.record.system_prompt for item in items]
        return encode(self.processor, media, questions or None, systems)

    def collate(self, items: list[CalibrationItem], inputs: dict[str, Any] | None = None) -> CalibrationBatch:
        """A batch, of what was kept of its clips, or of their inputs, which are read here where they are not given."""
        turns, number = pack_turns([[item.turns[place] for place in item.drawn] for item in items]), items[0].number
        clips = [item.record.clip for item in items]
        if self._has("prefills", clips):
            prefill = Prefill.stack(self._kept("prefills", clips))
            if not self._has("targets", clips):
                return CalibrationBatch({}, turns, number, prefill=prefill, pending=self._pending(items))
            return CalibrationBatch({}, turns, number, prefill=prefill, targets=self._targets(items))
        if self._has("embeddings", clips):
            embedded = DecoderInputs.stack(self._kept("embeddings", clips))
            return CalibrationBatch({}, turns, number, embedded)
        inputs = self.inputs(items) if inputs is None else inputs
        keep = None if self.keep == "nothing" else partial(self._keep, clips)
        pending = self._pending(items) if self.keep == "prefill" else None
        return CalibrationBatch(inputs, turns, number, keep=keep, pending=pending)

    def _pending(self, items: list[CalibrationItem]) -> PendingTargets:
        clips = [item.record.clip for item in items]
        every = pack_turns([item.turns for item in items])
        return PendingTargets(every, [item.drawn for item in items], self.top_p, partial(self._keep_targets, clips))

    def _targets(self, items: list[CalibrationItem]) -> TeacherTargets:
        """What was kept about the questions that were drawn."""
        clips, parts = [item.record.clip for item in items], []
        for item, words, outputs in zip(
            items, *(self._kept(kind, clips) for kind in ("targets", "outputs")), strict=True
        ):
            parts += [TeacherTargets(words[place], outputs[place]) for place in item.drawn]
        return TeacherTargets.join(parts)

    def forget_targets(self) -> None:
        """What the teacher said; what it read stays."""
        self.cache.clear(*(f"{self.split} {kind}" for kind in ("targets", "outputs")))

    def _has(self, kind: str, clips: list[ClipKey]) -> bool:
        return all(self.cache.has(f"{self.split} {kind}", clip) for clip in clips)

    def _kept(self, kind: str, clips: list[ClipKey]) -> list[Any]:
        return [self.cache.get(f"{self.split} {kind}", clip) for clip in clips]

    def _keep(self, clips: list[ClipKey], prefill: Prefill) -> None:
        if self.keep == "prefill":
            self._put("prefills", clips, [row.to(HOST) for row in prefill.rows()])
        else:
            self._put("embeddings", clips, [row.to(HOST) for row in prefill.embedded.unstack()])
            self._tell_when_all("embeddings")

    def _keep_targets(self, clips: list[ClipKey], rows: list[list[TeacherTargets]]) -> None:
        held = [[turn.to(HOST) for turn in row] for row in rows]
        self._put("targets", clips, [[turn.words for turn in row] for row in held])
        self._put("outputs", clips, [[turn.outputs for turn in row] for row in held])
        self._tell_when_all("targets")

    def _put(self, kind: str, clips: list[ClipKey], values: list[Any]) -> None:
        for clip, value in zip(clips, values, strict=True):
            self.cache.put(f"{self.split} {kind}", clip, value)

    def _tell_when_all(self, kind: str) -> None:
        if not self._told and self._has(kind, [questions[0].clip for questions in self.clips]):
            self._told = True
            rank_zero_only(print)(f"Kept of clips: {self.cache.describe()}.")
