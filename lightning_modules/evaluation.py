"""Answer the same questions from every compressed cache, on Lightning's test loop."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor

from acckv import CompressionConfig, KVCompressor
from acckv.cache import CompressedCache
from acckv.data.encoded import EncodedClip
from acckv.data.encoding import encode, question_suffix
from acckv.data.media import KINDS, Media
from acckv.data.records import Record
from acckv.metrics.answers import question_groups, score_answer
from acckv.ragged import left_padded
from acckv.report.results import FULL, Results
from acckv.session import Prefill, Session
from lightning_modules.cell_scores import CellScores


@dataclass(frozen=True)
class Cell:
    """One row of the table to come: a policy at a ratio."""

    policy: str
    ratio: float
    compressor: KVCompressor


@dataclass(frozen=True)
class Clip:
    """A clip that was read, the questions about it, and its place among all clips."""

    index: int
    media: Media | EncodedClip
    records: list[Record]


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
        groups: names of all question groups.
        vocabulary: words that a one-word answer is looked for in.
        when: "context" or "prompt".
        max_new_tokens: longest answer by protocol.
        seed: of the intervals.
        on_progress: called with the number of questions that a cell has just answered.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        cells: Sequence[Cell],
        groups: Sequence[str],
        vocabulary: Collection[str],
        *,
        when: str,
        max_new_tokens: dict[str, int],
        seed: int = 0,
        on_progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        super().__init__()
        if not any(cell.policy == FULL for cell in cells):
            raise ValueError("the cells must hold the full cache")
        self.model = model
        self.processor = processor
        self.cells = sorted(cells, key=lambda cell: cell.policy != FULL)
        self.groups = tuple(groups)
        self.vocabulary = vocabulary
        self.when = when
        self.max_new_tokens = max_new_tokens
        self.on_progress = on_progress
        self.scores = [CellScores(groups, seed) for _ in cells]
        self.observer = KVCompressor(CompressionConfig(policy="full", when=when))  # type: ignore[arg-type]
        self.predictions: list[dict[str, Any]] = []
        self._full_scores = torch.zeros(0)

    def transfer_batch_to_device(self, batch: list[Clip], device: torch.device, dataloader_idx: int) -> list[Clip]:
        """Clips stay where they are; what the processor makes of them is moved."""
        return batch

    def test_step(self, batch: list[Clip], batch_idx: int) -> None:
        """Answer all questions about a batch of clips from every cell's cache."""
        for kind in KINDS:
            clips = [clip for clip in batch if clip.media.kind == kind]
            if clips and self.when == "context":
                self._answer_after_context(clips)
            elif clips:
                self._answer_after_prompt(clips)

    def results(self, model: str, benchmark: str, seed: int) -> Results:
        """What was measured, rows in the order of the cells; arguments as the fields of `Results`."""
        rows = [scores.row(cell.policy, cell.ratio) for cell, scores in zip(self.cells, self.scores, strict=True)]
        return Results(model, benchmark, self.when, seed, rows)

    # ---------------------------------------------------------------- the two moments

    def _answer_after_context(self, clips: list[Clip]) -> None:
        records = [(clip.index, record) for clip in clips for record in clip.records]
        asked = list(self._pack(clips))
        inputs = self._moved(encode(self.processor, [clip.media for clip in clips]))
        prefill = self._prefill(inputs)
        full: tuple[list[str], CompressedCache] | None = None
        for number, session in self._open_cells():
            if full is not None and self._is_full(number):
                self._record(number, records, *full)
                continue
            own = self._prefill(inputs, session) if session.adapts_prompt else prefill
            cache = session.compress(own, ratio=self.cells[number].ratio)
            texts = self._answers(session, cache, asked, len(records))
            full = full or (texts, cache)
            self._record(number, records, texts, cache)

    def _answers(self, session: Session, cache: CompressedCache, asked: list[_Asked], count: int) -> list[str]:
        """The answers to all `count` questions of a batch."""
        texts = [""] * count
        for questions in asked:
            new = session.answer(
                cache, questions.input_ids, questions.attention_mask, **self._generation(questions.max_new_tokens)
            )
            for item, text in zip(questions.items, self._decode(new), strict=True):
                if item is not None:
                    texts[item] = text
        return texts

    def _is_full(self, number: int) -> bool:
        """Whether a cell evicts nothing and adapts nothing: it is the full cache, which was answered from already."""
        cell = self.cells[number]
        return cell.compressor.lora is None and cell.compressor.keeps_all(cell.ratio)

    def _answer_after_prompt(self, clips: list[Clip]) -> None:
        for protocol, limit in self.max_new_tokens.items():
            pairs = [(clip, record) for clip in clips for record in clip.records if record.protocol == protocol]
            for start in range(0, len(pairs), len(clips)):
                chunk = pairs[start : start + len(clips)]
                records = [(clip.index, record) for clip, record in chunk]
                inputs = self._moved(
                    encode(self.processor, [clip.media for clip, _ in chunk], [record.question for _, record in chunk])
                )
                prefill = self._prefill(inputs)
                for number, session in self._open_cells():
                    own = self._prefill(inputs, session) if session.adapts_prompt else prefill
                    first = new = _first_token(own)
                    cache = session.compress(own, ratio=self.cells[number].ratio)
                    if limit > 1:
                        rest = session.answer(cache, first, **self._generation(limit - 1))
                        new = torch.cat([first, rest], dim=1)
                    self._record(number, records, self._decode(new), cache)

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

    def _pack(self, clips: list[Clip]) -> Iterator[_Asked]:
        """The questions of each protocol; clips with fewer than the most are filled up with a repeated one."""
        for protocol, limit in self.max_new_tokens.items():
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
                rows += [question_suffix(self.processor, record.question) for _, record in pairs]
                rows += [question_suffix(self.processor, filler.question)] * (most - len(pairs))
                items += [number for number, _ in pairs]
                items += [None] * (most - len(pairs))
            ids, mask = left_padded(rows, self._pad_id)
            yield _Asked(ids.to(self.device), mask.to(self.device), items, limit)

    def _generation(self, max_new_tokens: int) -> dict[str, Any]:
        return {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1, "pad_token_id": self._pad_id}

    @property
    def _pad_id(self) -> int:
        return self.processor.tokenizer.pad_token_id

    def _decode(self, new: Tensor) -> list[str]:
        """Texts of generated tokens, up to the first end-of-answer token of a row."""
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        texts = []
        for row in new.tolist():
            stop = next((i for i, token in enumerate(row) if token in ends), len(row))
            texts.append(self.processor.tokenizer.decode(row[:stop], skip_special_tokens=True).strip())
        return texts

    # ---------------------------------------------------------------- scores

    def _record(self, number: int, records: list[tuple[int, Record]], texts: list[str], cache: CompressedCache) -> None:
        """Score one cell's answers to a batch; the full cache comes first, the others are paired with it."""
        cell = self.cells[number]
        answers = [
            score_answer(record, text, self.vocabulary) for (_, record), text in zip(records, texts, strict=True)
        ]
        scores = torch.tensor([answer.score for answer in answers])
        clips = torch.tensor([clip for clip, _ in records])
        named = [question_groups(record) for _, record in records]
        members = torch.tensor([[group in names for group in self.groups] for names in named])
        if cell.policy == FULL:
            self._full_scores = scores
        self.scores[number].add_answers(answers, self._full_scores, clips, members)
        self.scores[number].add_cache(cache)
        for (clip, record), answer, text, names in zip(records, answers, texts, named, strict=True):
            self.predictions.append(
                {
                    "policy": cell.policy,
                    "ratio": cell.ratio,
                    "id": record.id,
                    "clip": clip,
                    "video": record.video.name,
                    "protocol": record.protocol,
                    "groups": list(names),
                    "question": record.question,
                    "answer": record.answer,
                    "prediction": text,
                    "score": answer.score,
                    "official": answer.official,
                    "parsed": answer.parsed,
                }
            )
        self.on_progress(len(records))


def _first_token(prefill: Prefill) -> Tensor:
    """The answer's first token by greedy search, [rows, 1]; the prefill has computed it before any compression."""
    if prefill.logits is None:
        raise ValueError("a prefill that started from embeddings has no logits")
    return prefill.logits.argmax(-1, keepdim=True)
