"""AVDataModule: clips with questions, encoded once, batched with their turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import AutoProcessor

from acckv.config import When
from acckv.data.batching import PackedTurns, Turn, pack_turns
from acckv.data.clips import video_folder, write_clips
from acckv.data.encoding import encode, question_suffix
from acckv.data.media import read_media
from acckv.data.music_avqa import load_music_avqa
from acckv.data.records import Record
from acckv.errors import InputError
from acckv.ragged import DecoderInputs


@dataclass(frozen=True)
class CalibrationBatch:
    """Contexts and the turns that follow them.

    Attributes:
        inputs: for the model, up to where the cache is compressed; empty where `embedded` is given.
        embedded: the same as it enters the decoder, from an earlier visit of the clips.
        keep: takes each row's decoder inputs for later visits; None where nothing is kept.
        turns: what is answered afterwards.
        number: of the batch in the whole training; every random draw of a step comes from it.
    """

    inputs: dict[str, Any]
    turns: PackedTurns
    number: int
    embedded: DecoderInputs | None = None
    keep: Callable[[list[DecoderInputs]], None] | None = None


@dataclass(frozen=True)
class CalibrationItem:
    """One clip of a batch: how to encode it, where its decoder inputs are kept, its turns, the batch's number."""

    path: Path
    question: str | None
    turns: list[Turn]
    number: int


class ClipDataset(Dataset[CalibrationItem]):
    """One item a clip: a draw of its questions.

    Args:
        records: questions; those with the same video make one item.
        turns: questions drawn for each visit of a clip (one with `when: prompt`); 0 takes all.
        keep_contexts: hold what the encoders made of a clip in memory after its first visit.
    """

    def __init__(
        self, records: list[Record], processor: Any, when: When, turns: int, seed: int, keep_contexts: bool
    ) -> None:
        self.clips: dict[Path, list[Record]] = {}
        for record in records:
            self.clips.setdefault(record.video, []).append(record)
        self.paths = list(self.clips)
        self.processor, self.when, self.turns, self.seed = processor, when, turns, seed
        self.keeps = keep_contexts and when == "context"
        self.kept: dict[Path, DecoderInputs] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: tuple[int, int]) -> CalibrationItem:
        index, number = key
        path = self.paths[index]
        questions = self.clips[path]
        order = np.random.default_rng((self.seed, number, index)).permutation(len(questions))
        if self.when == "prompt":
            record = questions[order[0]]
            return CalibrationItem(path, record.question, [Turn(self._answer(record), 0)], number)
        picked = order[: self.turns or None]
        return CalibrationItem(path, None, [self._turn(questions[place]) for place in sorted(picked)], number)

    def _turn(self, record: Record) -> Turn:
        suffix = question_suffix(self.processor, record.question)
        return Turn(torch.cat([suffix, self._answer(record)]), len(suffix) - 1)

    def _answer(self, record: Record) -> Tensor:
        tokenizer = self.processor.tokenizer
        ids = tokenizer(record.answer, add_special_tokens=False)["input_ids"]
        return torch.tensor([*ids, tokenizer.eos_token_id])

    def collate(self, items: list[CalibrationItem]) -> CalibrationBatch:
        turns, number = pack_turns([item.turns for item in items]), items[0].number
        paths = [item.path for item in items]
        if all(path in self.kept for path in paths):
            embedded = DecoderInputs.stack([self.kept[path] for path in paths])
            return CalibrationBatch({}, turns, number, embedded)
        questions = [item.question for item in items if item.question is not None]
        inputs = encode(self.processor, [read_media(path) for path in paths], questions or None)

        def keep(rows: list[DecoderInputs]) -> None:
            self.kept.update(zip(paths, rows, strict=True))

        return CalibrationBatch(inputs, turns, number, None, keep if self.keeps else None)


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches as a pure function of their number, so that a resumed run sees what an uninterrupted one would have.

    Args:
        clips: how many there are; every pass over them is shuffled anew by (seed, pass).
        batches: of the whole training; start: gives the first one still to come. It is asked when iteration begins: a
            trainer may build the loader before it restores a checkpoint.
        rank, world: this process takes every `world`-th clip of a batch of ``batch_size * world``.
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
    ) -> None:
        self.clips, self.batch_size, self.batches, self.start = clips, batch_size, batches, start
        self.seed, self.rank, self.world = seed, rank, world

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        whole = self.batch_size * self.world
        for number in range(self.start(), self.batches):
            places = range(number * whole + self.rank, (number + 1) * whole, self.world)
            yield [(self._clip(place), number) for place in places]

    def _clip(self, place: int) -> int:
        passed, index = divmod(place, self.clips)
        return int(np.random.default_rng((self.seed, passed)).permutation(self.clips)[index])


class NumberedLoader(DataLoader[Any]):
    """A loader whose place is the trainer's global step: :class:`StepSampler` starts there, nothing else is saved."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class AVDataModule(LightningDataModule):
    """Clips for calibration.

    Args:
        base_model: whose processor encodes them; linked to the model's by train.py.
        when: linked to the model's.
        source: 'clips' generates clips with questions on first use; 'music_avqa' reads your own.
        train_clips: generated clips to train on.
        validation_clips: generated clips of the validation split.
        cache_dir: where generated clips are kept; None is the user's cache folder.
        train_questions: question file in the MUSIC-AVQA format (source 'music_avqa').
        validation_questions: the same for validation.
        video_root: folder of their ``<video_id>.mp4``.
        batch_size: clips a step and process.
        turns: questions about each clip in a step; 0 takes all.
        keep_contexts: hold each clip's encoded media in memory after its first visit: it is not decoded and encoded
            again, at hidden size x tokens x 4 bytes a clip.
        seed: of the clips and of the order.
    """

    def __init__(
        self,
        base_model: str = "tiny",
        when: When = "context",
        source: Literal["clips", "music_avqa"] = "clips",
        train_clips: int = 768,
        validation_clips: int = 24,
        cache_dir: str | None = None,
        train_questions: str | None = None,
        validation_questions: str | None = None,
        video_root: str | None = None,
        batch_size: int = 8,
        turns: int = 0,
        keep_contexts: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("train_clips", train_clips, 1),
            ("validation_clips", validation_clips, 1),
            ("batch_size", batch_size, 1),
            ("turns", turns, 0),
        ):
            if value < least:
                raise InputError(f"{value} is less than {least}", field=f"data.{name}")
        if source == "music_avqa":
            for name, given in (("train_questions", train_questions), ("validation_questions", validation_questions)):
                if given is None:
                    raise InputError("is needed with source 'music_avqa'", field=f"data.{name}")
        self.save_hyperparameters()
        self.datasets: dict[str, ClipDataset] = {}

    @property
    def options(self) -> Any:
        return self.hparams

    def setup(self, stage: str | None = None) -> None:
        from acckv.tiny import TINY_MODEL

        options = self.options
        name = TINY_MODEL if options.base_model == "tiny" else options.base_model
        processor = AutoProcessor.from_pretrained(name)
        for split in ("train", "validation"):
            self.datasets[split] = ClipDataset(
                self._records(split), processor, options.when, options.turns, options.seed, options.keep_contexts
            )

    def _records(self, split: str) -> list[Record]:
        options = self.options
        if options.source == "music_avqa":
            file = Path(options[f"{split}_questions"])
            return load_music_avqa(file, Path(options.video_root) if options.video_root else file.parent)
        file = write_clips(options.cache_dir, split, options[f"{split}_clips"], seed=options.seed)
        return load_music_avqa(file, video_folder(file))

    def train_dataloader(self) -> DataLoader[Any]:
        options, dataset = self.options, self.datasets["train"]
        trainer: Any = self.trainer
        accumulate = trainer.accumulate_grad_batches
        batches = trainer.max_steps * accumulate
        if trainer.max_steps < 0:
            batches = -(-len(dataset) * (trainer.max_epochs or 1) // (options.batch_size * trainer.world_size))
        sampler = StepSampler(
            len(dataset),
            options.batch_size,
            batches,
            lambda: trainer.global_step * accumulate,
            options.seed,
            trainer.global_rank,
            trainer.world_size,
        )
        return NumberedLoader(dataset, batch_sampler=sampler, collate_fn=dataset.collate)

    def val_dataloader(self) -> DataLoader[Any]:
        dataset = self.datasets["validation"]
        batches = -(-len(dataset) // self.options.batch_size)
        order = [
            [(index, 0) for index in range(start * self.options.batch_size, len(dataset))][: self.options.batch_size]
            for start in range(batches)
        ]
        return DataLoader(dataset, batch_sampler=order, collate_fn=dataset.collate)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if not isinstance(batch, CalibrationBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        inputs = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.inputs.items()
        }
        return replace(batch, inputs=inputs, turns=batch.turns.to(device))
