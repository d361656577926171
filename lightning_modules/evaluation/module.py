"""Answer the same questions from every compressed cache, on Lightning's test loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from acckv import CompressionConfig, KVCompressor
from acckv.cache.cache import CompressedCache
from acckv.data.encoding import encode, question_suffix
from acckv.data.media import KINDS, Media
from acckv.data.precomputed import PrecomputedClip
from acckv.data.records import Record
from acckv.errors import InputError
from acckv.evaluation.journal import Batch, CellAnswers, Part
from acckv.evaluation.results import FULL
from acckv.models.batching import pad_left
from acckv.runtime.session import Prefill, Session
from lightning_modules.evaluation.datamodule import ClipBatch

_Texts = tuple[list[str], list[bool]]
"""Answers, and whether the limit of tokens ended each."""


@dataclass(frozen=True)
class Cell:
    """One row of the table to come: a policy at a ratio."""

    policy: str
    ratio: float
    compressor: KVCompressor


@dataclass(frozen=True)
class Asking:
    """How a model is asked.

    Attributes:
        prompt: the text that it reads for a question.
        max_new_tokens: longest answer by protocol.
    """

    prompt: Callable[[Record], str]
    max_new_tokens: dict[str, int]


@dataclass(frozen=True)
class _Clip:
    """A clip that was read, and its place among all clips."""

    index: int
    media: Media | PrecomputedClip
    records: Sequence[Record]

    @property
    def system_prompt(self) -> str | None:
        return self.records[0].system_prompt


@dataclass(frozen=True)
class _Asked:
    """Questions of one protocol about some clips, as rows for one generate call.

    Attributes:
        input_ids, attention_mask: [clips * n, tokens], left padded; a clip's n rows side by side.
        items: for each row the number of its question in the batch, None for a row that only fills up.
        max_new_tokens: longest answer.
    """

    input_ids: Tensor
    attention_mask: Tensor
    items: list[int | None]
    max_new_tokens: int


class EvaluationModule(LightningModule):
    """Every policy at every ratio on the same questions; one prefill serves them all.

    With `when: context` a batch of clips is prefilled once, and each cell answers all questions of the batch from its
    own compressed copy. With `when: prompt` a prompt holds its question, so there is a prefill a question; the first
    answer token comes from that prefill, as it does in `model.generate`, and the rest is read from what was kept.

    Args:
        model: the AV-LLM, its own full cache being the reference.
        processor: of the model.
        cells: what to measure; must hold the full cache, which the others are compared with.
        asking: how the model is asked.
        when: "context" or "prompt".
        strict: a clip that cannot be read is an error; otherwise its questions are not asked.
        on_answers: called with the number of a cell, and the questions of a prefill with its answers to them.
        on_batch: called with each finished batch.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        cells: Sequence[Cell],
        asking: Asking,
        *,
        when: str,
        strict: bool = False,
        on_answers: Callable[[int, list[Record], CellAnswers], None] = lambda cell, records, answers: None,
        on_batch: Callable[[Batch], None] = lambda batch: None,
    ) -> None:
        super().__init__()
        if cells[0].policy != FULL:
            raise ValueError("the first of the cells must be the full cache")
        self.model = model
        self.processor = processor
        self.cells = cells
        self.asking = asking
        self.when = when
        self.strict = strict
        self.on_answers, self.on_batch = on_answers, on_batch
        self.observer = KVCompressor(CompressionConfig(policy="full", when=when))  # type: ignore[arg-type]
        self.allow_zero_length_dataloader_with_multiple_devices = True

    def test_step(self, batch: ClipBatch, batch_idx: int) -> None:
        """Answer all questions about a batch of clips from every cell's cache.

        Raises:
            InputError: a clip cannot be read, if `strict`.
        """
        failed = {place: error for place, error in enumerate(batch.media) if isinstance(error, InputError)}
        read = [
            _Clip(batch.first + place, media, batch.records[place])
            for place, media in enumerate(batch.media)
            if not isinstance(media, InputError)
        ]
        parts = []
        for kind in KINDS:
            clips = [clip for clip in read if clip.media.kind == kind]
            clips, inputs, refused = self._encoded(clips)
            failed |= {clip - batch.first: error for clip, error in refused.items()}
            if failed and self.strict:
                raise failed[min(failed)]
            if clips and self.when == "context":
                parts.append(self._answer_after_context(clips, inputs))
            elif clips:
                parts += self._answer_after_prompt(clips)
        self.on_batch(
            Batch(
                batch.number,
                batch.files,
                [(batch.first + place, str(failed[place])) for place in sorted(failed)],
                parts,
            )
        )

    # ---------------------------------------------------------------- the two moments

    def _encoded(self, clips: list[_Clip]) -> tuple[list[_Clip], dict[str, Any], dict[int, InputError]]:
        """The clips that the processor takes, model inputs up to the end of their media, and why it refused others."""
        refused: dict[int, InputError] = {}
        while clips:
            try:
                return (
                    clips,
                    encode(
                        self.processor, [clip.media for clip in clips], None, [clip.system_prompt for clip in clips]
                    ),
                    refused,
                )
            except InputError as error:
                culprits = [clip for clip in clips if str(clip.media.path) == error.source]
                if not culprits:
                    raise
                refused |= {clip.index: error for clip in culprits}
                clips = [clip for clip in clips if clip not in culprits]
        return clips, {}, refused

    def _answer_after_context(self, clips: list[_Clip], inputs: dict[str, Any]) -> Part:
        records = [record for clip in clips for record in clip.records]
        asked = list(self._pack(clips))
        inputs = self._moved(inputs)
        prefill = self._prefill(inputs)
        cells: list[CellAnswers] = []
        for number, session in self._open_cells():
            if cells and self._is_full(number):
                answers = cells[0]
            else:
                own = self._prefill(inputs, session) if session.adapts_prompt else prefill
                cache = session.compress(own, ratio=self.cells[number].ratio)
                answers = _measured(*self._answers(session, cache, asked, len(records)), cache)
            self.on_answers(number, records, answers)
            cells.append(answers)
        return Part([(clip.index, place) for clip in clips for place in range(len(clip.records))], cells)

    def _answers(self, session: Session, cache: CompressedCache, asked: list[_Asked], count: int) -> _Texts:
        """The answers to all `count` questions of a batch."""
        texts, cut = [""] * count, [False] * count
        for questions in asked:
            new = session.answer(
                cache, questions.input_ids, questions.attention_mask, **self._generation(questions.max_new_tokens)
            )
            decoded = self._decode(new, questions.max_new_tokens)
            for item, text, ended in zip(questions.items, *decoded, strict=True):
                if item is not None:
                    texts[item], cut[item] = text, ended
        return texts, cut

    def _is_full(self, number: int) -> bool:
        """Whether a cell evicts nothing and adapts nothing: it is the full cache, which was answered from already."""
        cell = self.cells[number]
        return cell.compressor.lora is None and cell.compressor.planners.keeps_all(cell.ratio)

    def _answer_after_prompt(self, clips: list[_Clip]) -> Iterator[Part]:
        for protocol, limit in self.asking.max_new_tokens.items():
            pairs = [
                (clip, place, record)
                for clip in clips
                for place, record in enumerate(clip.records)
                if record.protocol == protocol
            ]
            for start in range(0, len(pairs), len(clips)):
                chunk = pairs[start : start + len(clips)]
                records = [record for _, _, record in chunk]
                questions = [self.asking.prompt(record) for record in records]
                inputs = self._moved(
                    encode(
                        self.processor,
                        [clip.media for clip, _, _ in chunk],
                        questions,
                        [clip.system_prompt for clip, _, _ in chunk],
                    )
                )
                prefill = self._prefill(inputs)
                cells = []
                for number, session in self._open_cells():
                    own = self._prefill(inputs, session) if session.adapts_prompt else prefill
                    first = new = _first_token(own)
                    cache = session.compress(own, ratio=self.cells[number].ratio)
                    if limit > 1:
                        rest = session.answer(cache, first, **self._generation(limit - 1))
                        new = torch.cat([first, rest], dim=1)
                    cells.append(_measured(*self._decode(new, limit), cache))
                    self.on_answers(number, records, cells[-1])
                yield Part([(clip.index, place) for clip, place, _ in chunk], cells)

    def _moved(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to(self.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}

    def _prefill(self, inputs: dict[str, Any], session: Session | None = None) -> Prefill:
        """The base model's prefill, which serves every cell; or that of a session whose LoRA acts on the prompt."""
        if session is not None:
            return session.prefill(**inputs)
        with self.observer(self.model, self.processor) as observing:
            return observing.prefill(**inputs)

    def _open_cells(self) -> Iterator[tuple[int, Session]]:
        """Number and open session of each cell; a session serves all ratios of its policy."""
        numbered = list(enumerate(self.cells))
        for _, same in groupby(numbered, key=lambda cell: id(cell[1].compressor)):
            members = list(same)
            with members[0][1].compressor(self.model, self.processor) as session:
                for number, _ in members:
                    yield number, session

    # ---------------------------------------------------------------- rows and texts

    def _pack(self, clips: list[_Clip]) -> Iterator[_Asked]:
        """The questions of each protocol; clips with fewer than the most are filled up with a repeated one."""
        for protocol, limit in self.asking.max_new_tokens.items():
            wanted: list[list[tuple[int, Record]]] = []
            item = 0
            for clip in clips:
                numbered = list(enumerate(clip.records, start=item))
                wanted.append([pair for pair in numbered if pair[1].protocol == protocol])
                item += len(clip.records)
            most = max(len(pairs) for pairs in wanted)
            if most == 0:
                continue
            filler = next(pairs[0][1] for pairs in wanted if pairs)
            rows: list[Tensor] = []
            items: list[int | None] = []
            for pairs in wanted:
                rows += [question_suffix(self.processor, self.asking.prompt(record)) for _, record in pairs]
                rows += [question_suffix(self.processor, self.asking.prompt(filler))] * (most - len(pairs))
                items += [number for number, _ in pairs]
                items += [None] * (most - len(pairs))
            ids, mask = pad_left(rows, self._pad_id)
            yield _Asked(ids.to(self.device), mask.to(self.device), items, limit)

    def _generation(self, max_new_tokens: int) -> dict[str, Any]:
        return {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": self._pad_id}

    @property
    def _pad_id(self) -> int:
        return self.processor.tokenizer.pad_token_id

    def _decode(self, new: Tensor, limit: int) -> _Texts:
        """Generated tokens as texts, up to the first end-of-answer token of a row; `limit` ends those without."""
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        texts, cut = [], []
        for row in new.tolist():
            stop = next((i for i, token in enumerate(row) if token in ends), len(row))
            texts.append(self.processor.tokenizer.decode(row[:stop], skip_special_tokens=True).strip())
            cut.append(stop >= limit)
        return texts, cut


def _measured(texts: list[str], cut: list[bool], cache: CompressedCache) -> CellAnswers:
    rows = cache.labels.labels.shape[0]
    kept, full = cache.kept_entries().tolist(), cache.full_entries().tolist()
    return CellAnswers(texts, kept, full, cache.kv_bytes(), rows, cut)


def _first_token(prefill: Prefill) -> Tensor:
    """The answer's first token by greedy search, [rows, 1]; the prefill has computed it before any compression."""
    if prefill.logits is None:
        raise ValueError("a prefill that started from embeddings has no logits")
    return prefill.logits.argmax(-1, keepdim=True)
