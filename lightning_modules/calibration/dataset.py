"""Clips with questions as batches: read by worker processes, in an order that the number of the step alone decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from acckv.config import When
from acckv.data.batching import PackedQuestions, Question, pack_questions
from acckv.data.encoding import encode, question_suffix
from acckv.data.precomputed import read_clip
from acckv.data.records import ClipKey, Record
from acckv.errors import InputError, or_error
from acckv.models.clips import Media, PrecomputedClip
from lightning_modules.calibration.clip_cache import ClipCache, ClipName
from lightning_modules.calibration.random_text import RandomText

Visit = tuple[int, list[int]]
"""A step, and the clips of a batch that it visits."""


@dataclass(frozen=True)
class CalibrationBatch:
    """Some clips and the questions that a step asks about them.

    Attributes:
        number: of the optimiser step in the whole training; every random draw of a step comes from it, so that
            batches that are accumulated share them.
        clips: names of the clips in the clip cache.
        inputs: media tensors and token ids for the model, up to where the cache is compressed; empty where the clip
            cache held the clips when the batch was due to be read.
        questions: asked by this step.
        every: all questions about each clip; drawn: which of them this step asks, in their order.
        places: 0 to 1, where in each clip's context the tokens lie that this step feeds in again, if it does.
    """

    number: int
    clips: list[ClipName]
    inputs: dict[str, Any]
    questions: PackedQuestions
    every: list[list[Question]]
    drawn: list[list[int]]
    places: list[float]

    @property
    def device(self) -> torch.device:
        return self.questions.ids.device

    def to(self, device: torch.device) -> CalibrationBatch:
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, questions=self.questions.to(device))


class ClipDataset(Dataset["CalibrationBatch | InputError"]):
    """Batches by their visit.

    Args:
        split: "train" or "validation"; records: its questions, of any number about a clip.
        processor: of the model.
        when: with 'prompt' one question is drawn and part of the prompt.
        questions_per_clip: drawn for each visit of a clip; 0 takes all.
        seed: of the draws.
        read: reads a clip.
        random_text: asks about each clip, too; None for the records alone.
        asks_records: False leaves the questions of the records out.
    """

    def __init__(
        self,
        split: str,
        records: Iterable[Record],
        processor: Any,
        when: When = "context",
        questions_per_clip: int = 0,
        seed: int = 0,
        read: Callable[[Record], Media | PrecomputedClip] = read_clip,
        random_text: RandomText | None = None,
        asks_records: bool = True,
    ) -> None:
        by_clip: dict[ClipKey, list[Record]] = {}
        for record in records:
            by_clip.setdefault(record.clip, []).append(record)
        self.split, self.clips = split, list(by_clip.values())
        self.processor, self.when, self.read = processor, when, read
        self.questions_per_clip, self.seed = questions_per_clip, seed
        self.random_text, self.asks_records = random_text, asks_records
        self._questions: dict[int, list[Question]] = {}  # in tokens, made on the first visit

    def __len__(self) -> int:
        return len(self.clips)

    def names(self, clips: Sequence[int]) -> list[ClipName]:
        """Names of clips in the clip cache."""
        return [(self.split, self.clips[clip][0].clip) for clip in clips]

    def __getitem__(self, visit: tuple[int, list[int], bool]) -> CalibrationBatch | InputError:
        """A batch, or why it cannot be read."""
        return or_error(self.batch, *visit)

    def batch(self, number: int, clips: Sequence[int], read: bool = True) -> CalibrationBatch:
        """The batch of a step.

        Args:
            read: whether the clips are read.

        Raises:
            InputError: a clip cannot be read; it names the file.
        """
        every, drawn, places, records = [], [], [], []
        for clip in clips:
            generator = np.random.default_rng((self.seed, number, clip))
            asked = self.clips[clip] if self.when == "prompt" else self.questions(clip)
            order = generator.permutation(len(asked)).tolist()
            places.append(generator.random())
            if self.when == "prompt":
                record = self.clips[clip][order[0]]
                records.append(record)
                every.append([Question(self._answer(record), 0)])
                drawn.append([0])
            else:
                records.append(self.clips[clip][0])
                every.append(self.questions(clip))
                drawn.append(sorted(order[: self.questions_per_clip or None]))
        inputs = {}
        if read:
            prompts = [record.question for record in records] if self.when == "prompt" else None
            media, systems = [self.read(record) for record in records], [record.system_prompt for record in records]
            inputs = encode(self.processor, media, prompts, systems)
        questions = pack_questions(
            [[asked[index] for index in chosen] for asked, chosen in zip(every, drawn, strict=True)]
        )
        return CalibrationBatch(number, self.names(clips), inputs, questions, every, drawn, places)

    def questions(self, clip: int) -> list[Question]:
        """All that can be asked about a clip."""
        if clip not in self._questions:
            own = [self._question(record) for record in self.clips[clip]] if self.asks_records else []
            self._questions[clip] = own + (self.random_text.questions(clip) if self.random_text else [])
        return self._questions[clip]

    def _question(self, record: Record) -> Question:
        suffix = question_suffix(self.processor, record.question).tolist()
        return Question((*suffix, *self._answer(record)), len(suffix) - 1)

    def _answer(self, record: Record) -> tuple[int, ...]:
        tokenizer = self.processor.tokenizer
        ids = tokenizer(record.answer, add_special_tokens=False)["input_ids"]
        return (*ids, tokenizer.eos_token_id) if record.complete else tuple(ids)


class StepSampler(Sampler[Visit]):
    """Visits as a pure function of their number, so that a resumed run sees what an uninterrupted one would have.

    Args:
        clips: how many there are; every pass over them is shuffled anew by (seed, pass).
        batches: of an epoch; start: gives the number of the first one still to come, counted from the first epoch. It
            is asked when iteration begins: a trainer may build the loader before it restores a checkpoint.
        rank, world: this process takes every `world`-th clip of a batch of ``batch_size * world``.
        accumulate: batches of an optimiser step. They take the clips that one batch of their joint size would.
    """

    def __init__(
        self,
        clips: int,
        batch_size: int,
        batches: int,
        start: Callable[[], int],
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.clips, self.batch_size, self.batches, self.start = clips, batch_size, batches, start
        self.seed, self.rank, self.world, self.accumulate = seed, rank, world, accumulate

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[Visit]:
        whole, start = self.batch_size * self.world, self.start()
        for number in range(start, (start // self.batches + 1) * self.batches):
            positions = range(number * whole + self.rank, (number + 1) * whole, self.world)
            yield number // self.accumulate, [self._clip(position) for position in positions]

    def _clip(self, position: int) -> int:
        passed, index = divmod(position, self.clips)
        return int(np.random.default_rng((self.seed, passed)).permutation(self.clips)[index])


class ClipLoader(DataLoader[CalibrationBatch]):
    """Batches in a given order, the same ones with any number of workers.

    Clips that the clip cache holds are not read. Workers run ahead, so that one that was kept meanwhile may be read all
    the same. The place in the order is the trainer's global step: nothing else is saved.

    Args:
        num_workers: processes that read ahead; 0 reads each batch when it is due.
    """

    def __init__(
        self, clips: ClipDataset, order: StepSampler | Sequence[Visit], cache: ClipCache, num_workers: int = 0
    ) -> None:
        super().__init__(
            clips,  # type: ignore[arg-type]
            batch_size=None,
            sampler=_Reads(clips, order, cache),
            num_workers=num_workers,
        )

    def __iter__(self) -> Iterator[CalibrationBatch]:  # type: ignore[override]
        for batch in super().__iter__():
            if isinstance(batch, InputError):
                raise batch
            yield batch

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class _Reads(Sampler[tuple[int, list[int], bool]]):
    """Visits, each with whether its clips have to be read, which the main process alone knows."""

    def __init__(self, clips: ClipDataset, order: StepSampler | Sequence[Visit], cache: ClipCache) -> None:
        self.clips, self.order, self.cache = clips, order, cache

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[int, list[int], bool]]:
        for number, clips in self.order:
            yield number, clips, not self.cache.holds(self.clips.names(clips))
