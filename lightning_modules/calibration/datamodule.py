"""AVDataModule: the clips and questions of a calibration, how they are loaded, and what is kept of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule

from acckv.data.asked_questions import AskedQuestions
from acckv.data.calibration_record import CalibrationRecord, finest_group
from acckv.data.media import read_record_media
from acckv.data.precomputed import read_clip
from acckv.data.records import Record, with_system_prompt
from acckv.models import load_processor
from lightning_modules.calibration.clip_cache import ClipCache
from lightning_modules.calibration.data_config import DataConfig
from lightning_modules.calibration.dataset import ClipDataset, ClipLoader, StepSampler
from lightning_modules.calibration.random_text import RandomText
from lightning_modules.calibration.sources import ClipSource


class AVDataModule(LightningDataModule):
    """Clips with questions for calibration, and the clip cache.

    Args:
        options: fields of :class:`lightning_modules.calibration.config.DataConfig`.

    Attributes:
        datasets: by split; empty before `setup`.
        clip_cache: what the teacher computed of the clips.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = DataConfig(**options)
        self.save_hyperparameters(dict(vars(self.options)), logger=False)  # Lightning logs no name twice
        self.datasets: dict[str, ClipDataset] = {}
        self.clip_cache = ClipCache()

    @property
    def source(self) -> ClipSource:
        """The origin of clips and questions."""
        return ClipSource(self.options, self._root or Path())

    @property
    def _root(self) -> Path | None:
        return None if self.trainer is None else Path(self.trainer.default_root_dir)

    def records(self, split: str) -> list[Record]:
        """The questions of "train" or "validation", with their answers.

        Raises:
            InputError: a file is missing or malformed.
        """
        return with_system_prompt(self.source.records(split), self.options.system_prompt)

    def prepare_data(self) -> None:
        trainer: Any = self.trainer
        self.source.prepare(torch.device("cpu") if trainer is None else trainer.strategy.root_device)

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:  # what was kept of the clips stays
            return
        options = self.options
        processor = load_processor(options.base_model, options.dtype, options.load_options)
        read = partial(read_clip, read_media=partial(read_record_media, **options.limits()))
        for split in ("train", "validation"):
            drawn = options.when, options.questions_per_clip, options.seed
            by_text = split == "train" and options.calibrate_for != "task" and options.general_by == "random_text"
            text = RandomText(processor, options.seed) if by_text else None
            asks_records = not (by_text and options.calibrate_for == "general")
            self.datasets[split] = ClipDataset(split, self.records(split), processor, *drawn, read, text, asks_records)
        self.clip_cache = ClipCache(
            options.cache if options.when == "context" else "nothing",
            options.teacher_top_p,
            options.cache_memory_gb,
            self._root,
            {split: len(dataset) for split, dataset in self.datasets.items()},
        )

    def train_dataloader(self) -> ClipLoader:
        options, dataset = self.options, self.datasets["train"]
        trainer: Any = self.trainer
        accumulate = trainer.accumulate_grad_batches
        if trainer.max_steps < 0:  # an epoch is a pass, in whole optimiser steps
            steps = -(-len(dataset) // (options.batch_size * trainer.world_size * accumulate))
        else:
            steps = trainer.max_steps
        sampler = StepSampler(
            len(dataset),
            options.batch_size,
            steps * accumulate,
            lambda: trainer.global_step * accumulate,
            options.seed,
            trainer.global_rank,
            trainer.world_size,
            accumulate,
        )
        return ClipLoader(dataset, sampler, self.clip_cache, options.num_workers)

    def val_dataloader(self) -> ClipLoader:
        return self._each_once("validation", range(len(self.datasets["validation"])))

    def drawn_dataloader(self, clips: int) -> ClipLoader:
        """Training clips drawn by the seed, each once, the same for all processes."""
        dataset = self.datasets["train"]
        drawn = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.options.seed))
        return self._each_once("train", drawn[:clips].tolist())

    def _each_once(self, split: str, clips: Sequence[int]) -> ClipLoader:
        size = self.options.batch_size
        order = [(0, list(clips[start : start + size])) for start in range(0, len(clips), size)]
        return ClipLoader(self.datasets[split], order, self.clip_cache, self.options.num_workers)

    def reorder(self, seed: int) -> None:
        """Another order, and other draws of questions, for another calibration of the same model.

        What was kept of the clips stays, but not what the teacher said: other features may be compared.
        """
        self.options = replace(self.options, seed=seed)
        self.clip_cache.forget_targets()
        for dataset in self.datasets.values():
            dataset.seed = seed

    def calibration_record(self, ratios: tuple[float, float], steps: int) -> CalibrationRecord:
        """The record of a training on this data, for its export.

        Args:
            ratios: least and largest kept share trained; steps: optimiser steps.
        """
        options, (data, _) = self.options, self.source.names
        return CalibrationRecord.of(data, self.records("train"), ratios, steps, self._kind, options.calibrate_for)

    def asked_questions(self) -> AskedQuestions | None:
        """The training questions in their words, for the export; None where none was asked."""
        return None if self.options.calibrate_for == "general" else AskedQuestions.of(self.records("train"), self._kind)

    @property
    def _kind(self) -> Callable[[Record], str]:
        """Of a question; prompts are all that tells those of plain videos apart."""
        return attrgetter("question") if self.options.source == "folder" else finest_group
