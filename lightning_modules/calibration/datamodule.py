"""AVDataModule: where the clips and questions of a calibration come from, and how they are loaded."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from acckv.benchmarks.music_avqa_questions import load_music_avqa
from acckv.config import When
from acckv.data.calibration_record import CalibrationRecord
from acckv.data.media import MediaOptions, read_record_media
from acckv.data.precomputed import load_precomputed, read_clip
from acckv.data.records import Record, with_system_prompt
from acckv.data.synthetic.clips import video_folder, write_clips
from acckv.data.video_folder import hold_out, list_videos
from acckv.errors import InputError
from acckv.models import load_processor
from lightning_modules.calibration.dataset import CalibrationBatch, ClipDataset, Keep
from lightning_modules.calibration.loader import ClipLoader
from lightning_modules.calibration.pseudo_labels import FILE as ANSWERS_FILE
from lightning_modules.calibration.pseudo_labels import PROMPTS, AnswerFile, AnswerSettings, answer_clips
from lightning_modules.calibration.sampler import StepSampler
from lightning_modules.calibration.teacher_cache import TeacherCache

TRAINING_DATA = {
    "clips": "generated clips of seed",
    "music_avqa": "questions of",
    "folder": "the model's own answers about the videos of",
    "precomputed": "precomputed embeddings of",
}
"""Source -> training data in words, up to the name of its file or folder."""


class AVDataModule(LightningDataModule):
    """Clips for calibration.

    Args:
        base_model: whose processor encodes them; linked to the model's by train.py.
        when: linked to the model's.
        source: 'clips' generates clips with questions on first use; 'music_avqa' reads your own; 'folder' takes plain
            videos and lets the model, with its full cache, answer `prompts` about each of them once; 'precomputed'
            reads embeddings that your own towers made for a plain decoder.
        train_clips: generated clips to train on.
        validation_clips: generated clips of the validation split.
        cache_dir: where generated clips are kept; None is the user's cache folder.
        train_questions: question file in the MUSIC-AVQA format (source 'music_avqa').
        validation_questions: the same for validation.
        video_root: folder of their ``<video_id>.mp4``.
        folder: videos, also in subfolders (source 'folder').
        validation_folder: other videos to validate on; None holds out a share of the folder.
        precomputed: folder of embeddings, with questions.jsonl (source 'precomputed'); see acckv.data.precomputed.
        validation_share: of the videos (or precomputed clips) that are held out, above 0 and below 1. Each is by its
            name alone, so that none changes sides as others come; a small folder may hold out more or fewer.
        prompts: asked of every clip (source 'folder'); None takes a few generic ones.
        max_new_tokens: longest answer to them.
        dtype: of the model that answers them; linked to the model's.
        load_options: of the model and its processor; linked to the model's.
        batch_size: clips a step and process.
        questions_per_clip: questions about each clip in a step; 0 takes all.
        cache: what is held of a clip after its first visit. 'embeddings': it is not decoded and encoded again
            (hidden size x tokens numbers a clip). 'prefill': the base model's prefill is not run again either (its
            keys and values too), nor what it says about the clip's questions, all of which it is asked on the first
            visit (likeliest words and matched outputs of the answers' tokens), so that a step costs the student alone.
        cache_memory_gb: memory of each process for what is kept, in GB; the rest is in files of the run's folder, which
            the system frees when the process ends.
        teacher_top_p: of the teacher's distributions that are kept, the likeliest words that cover this share, all
            others as one: the KL is that of these words and the rest, a lower bound. 1 keeps all words, as do
            vocabularies of up to 1024.
        seed: of the order, and of the questions drawn.
        clips_seed: of the generated clips.
        num_workers: processes that read clips ahead, for each process that trains; 0 reads them when they are due.
        system_prompt: what the model is told before the media; None leaves that to its chat template.
        fps: pictures a second that are sampled.
        max_seconds: longest clip; a longer one is refused, or cut where `cut_long` is set.
        max_frames: most pictures of a file; a longer clip is sampled evenly, at fewer a second. None is any number.
        max_pixels: of a picture; larger ones are scaled down to about so many. None keeps them.
        cut_long: take the first `max_seconds` of a longer clip, with a warning, instead of refusing it.
    """

    def __init__(
        self,
        base_model: str = "tiny",
        when: When = "context",
        source: Literal["clips", "music_avqa", "folder", "precomputed"] = "clips",
        train_clips: int = 768,
        validation_clips: int = 24,
        cache_dir: str | None = None,
        train_questions: str | None = None,
        validation_questions: str | None = None,
        video_root: str | None = None,
        folder: str | None = None,
        validation_folder: str | None = None,
        precomputed: str | None = None,
        validation_share: float = 0.1,
        prompts: list[str] | None = None,
        max_new_tokens: int = 64,
        dtype: str = "float32",
        load_options: dict[str, Any] | None = None,
        batch_size: int = 8,
        questions_per_clip: int = 0,
        cache: Keep = "embeddings",
        cache_memory_gb: float = 8.0,
        teacher_top_p: float = 0.999,
        seed: int = 0,
        clips_seed: int = 0,
        num_workers: int = 0,
        system_prompt: str | None = None,
        fps: float = MediaOptions.fps,
        max_seconds: float = MediaOptions.max_seconds,
        max_frames: int | None = MediaOptions.max_frames,
        max_pixels: int | None = MediaOptions.max_pixels,
        cut_long: bool = MediaOptions.cut_long,
    ) -> None:
        super().__init__()
        self.media = MediaOptions(
            fps=fps, max_seconds=max_seconds, max_frames=max_frames, max_pixels=max_pixels, cut_long=cut_long
        )
        if source == "precomputed" and self.media != MediaOptions():
            changed = next(
                name for name, value in MediaOptions().limits().items() if self.media.limits()[name] != value
            )
            raise InputError("is of no use with source 'precomputed'", field=f"data.{changed}")
        for name, value, least in (
            ("train_clips", train_clips, 1),
            ("validation_clips", validation_clips, 1),
            ("batch_size", batch_size, 1),
            ("questions_per_clip", questions_per_clip, 0),
            ("max_new_tokens", max_new_tokens, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise InputError(f"{value} is less than {least}", field=f"data.{name}")
        if cache_memory_gb < 0:
            raise InputError(f"{cache_memory_gb} is less than 0", field="data.cache_memory_gb")
        if not 0 < teacher_top_p <= 1:
            raise InputError(f"{teacher_top_p} is not above 0 and at most 1", field="data.teacher_top_p")
        if not 0 < validation_share < 1:
            raise InputError(f"{validation_share} is not above 0 and below 1", field="data.validation_share")
        if prompts is not None and not all(prompt.strip() for prompt in prompts or [""]):
            raise InputError("holds an empty prompt, or none", field="data.prompts")
        needed = {
            "music_avqa": {"train_questions": train_questions, "validation_questions": validation_questions},
            "folder": {"folder": folder},
            "precomputed": {"precomputed": precomputed},
        }
        for name, option in needed.get(source, {}).items():
            if option is None:
                raise InputError(f"is needed with source '{source}'", field=f"data.{name}")
        if source == "precomputed" and when == "prompt":
            raise InputError("is 'prompt', and precomputed clips end before the question", field="model.when")
        self.save_hyperparameters(logger=False)  # Lightning logs no two options of one name with the model's
        self.datasets: dict[str, ClipDataset] = {}

    @property
    def options(self) -> Any:
        return self.hparams

    def prepare_data(self) -> None:
        """On one process of each machine: write the clips, or let the model answer about the videos."""
        if self.options.source == "folder":
            batch_size, device = self.options.batch_size, self._trainer.strategy.root_device
            videos = [*self.videos("train"), *self.videos("validation")]
            answer_clips(self._answers(), videos, batch_size, device, self.options.num_workers)
        else:
            for split in ("train", "validation"):
                self.records(split)

    def setup(self, stage: str | None = None) -> None:
        if self.datasets:  # what was kept of the clips stays
            return
        options = self.options
        read = partial(read_clip, read_media=partial(read_record_media, **self.media.limits()))
        processor = load_processor(options.base_model, options.dtype, options.load_options)
        folder = None if self.trainer is None else self.trainer.default_root_dir
        cache = TeacherCache(options.cache_memory_gb, folder)
        for split in ("train", "validation"):
            self.datasets[split] = ClipDataset(
                self.records(split),
                processor,
                options.when,
                options.questions_per_clip,
                options.seed,
                options.cache,
                cache,
                options.teacher_top_p,
                split,
                read,
            )

    def records(self, split: str) -> list[Record]:
        """The questions of "train" or "validation", with their answers.

        Raises:
            InputError: a file is missing or malformed.
        """
        return with_system_prompt(self._records(split), self.options.system_prompt)

    def _records(self, split: str) -> list[Record]:
        options = self.options
        if options.source == "folder":
            videos, answers = self.videos(split), self._answers()
            records = answers.records(videos)
            if options.batch_size > 1 and len(set(answers.sounds(videos))) > 1:
                mute = videos[answers.sounds(videos).index(False)]
                message = (
                    "has no sound track and others have one, and a batch cannot hold both: split the folder, "
                    "or set data.batch_size 1 and trainer.accumulate_grad_batches instead"
                )
                raise InputError(message, source=mute)
            return records
        if options.source == "precomputed":
            return load_precomputed(options.precomputed, split, options.validation_share)
        if options.source == "music_avqa":
            file = Path(options[f"{split}_questions"])
            return load_music_avqa(file, Path(options.video_root) if options.video_root else file.parent)
        file = write_clips(options.cache_dir, split, options[f"{split}_clips"], seed=options.clips_seed)
        return load_music_avqa(file, video_folder(file))

    def reorder(self, seed: int) -> None:
        """Another order, and other draws of questions, for another calibration of the same model.

        What was kept of the clips stays, but not what the teacher said: other outputs may be matched.
        """
        self.hparams["seed"] = seed
        for dataset in self.datasets.values():
            dataset.seed = seed
            dataset.forget_targets()

    @property
    def benchmark(self) -> str:
        """What an evaluation on the validation questions names."""
        options = self.options
        if options.source == "folder":
            return f"the model's own answers about held-out clips of {Path(options.folder).name}"
        if options.source == "precomputed":
            return f"held-out clips of {Path(options.precomputed).name}"
        if options.source == "music_avqa":
            return Path(options.validation_questions).name
        return f"generated-clips/validation ({options.validation_clips} clips, seed {options.clips_seed})"

    def calibration_record(self, ratios: tuple[float, float], steps: int) -> CalibrationRecord:
        """What a training on this data is, for its export.

        Args:
            ratios: least and largest kept share trained; steps: optimiser steps.
        """
        options = self.options
        place = {
            "folder": options.folder,
            "precomputed": options.precomputed,
            "music_avqa": options.train_questions,
        }.get(options.source)
        data = f"{TRAINING_DATA[options.source]} {options.clips_seed if place is None else Path(place).name}"
        # Prompts are all that tells the questions of a folder apart.
        kind = (lambda record: record.question) if options.source == "folder" else None
        return CalibrationRecord.of(data, self.records("train"), ratios, steps, kind)

    def videos(self, split: str) -> list[Path]:
        """The videos of "train" or "validation" (source 'folder')."""
        options = self.options
        found = list_videos(options.folder)
        if options.validation_folder is None:
            return hold_out(options.folder, found, options.validation_share)[split == "validation"]
        return found if split == "train" else list_videos(options.validation_folder, "data.validation_folder")

    def _answers(self) -> AnswerFile:
        options = self.options
        prompts = tuple(PROMPTS if options.prompts is None else options.prompts)
        settings = AnswerSettings(
            str(options.base_model),
            options.dtype,
            prompts,
            options.max_new_tokens,
            options.load_options,
            options.system_prompt,
            self.media.limits(),
        )
        return AnswerFile(Path(self._trainer.default_root_dir) / ANSWERS_FILE, settings)

    @property
    def _trainer(self) -> Any:
        return self.trainer

    def train_dataloader(self) -> DataLoader[Any]:
        options, dataset, trainer = self.options, self.datasets["train"], self._trainer
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
        return ClipLoader(dataset, sampler, options.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        dataset = self.datasets["validation"]
        batches = -(-len(dataset) // self.options.batch_size)
        order = [
            [(index, 0) for index in range(start * self.options.batch_size, len(dataset))][: self.options.batch_size]
            for start in range(batches)
        ]
        return ClipLoader(dataset, order, self.options.num_workers)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        if not isinstance(batch, CalibrationBatch):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        inputs = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.inputs.items()
        }
        embedded = None if batch.embedded is None else batch.embedded.to(device)
        prefill = None if batch.prefill is None else batch.prefill.to(device)
        targets = None if batch.targets is None else batch.targets.to(device)
        pending = None if batch.pending is None else replace(batch.pending, turns=batch.pending.turns.to(device))
        turns = batch.turns.to(device)
        return replace(
            batch, inputs=inputs, turns=turns, embedded=embedded, prefill=prefill, targets=targets, pending=pending
        )
