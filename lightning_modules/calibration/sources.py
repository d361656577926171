"""The clips and questions of a calibration, by `data.source`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from acckv.benchmarks import find_benchmark, load_benchmark
from acckv.benchmarks.music_avqa_questions import load_music_avqa
from acckv.data.precomputed import load_precomputed
from acckv.data.records import Record
from acckv.data.synthetic.clips import video_folder, write_clips
from acckv.data.video_folder import hold_out, list_videos
from acckv.errors import InputError
from lightning_modules.calibration.data_config import DataConfig
from lightning_modules.calibration.pseudo_labels import FILE, PROMPTS, LabelSettings, PseudoLabels, label_clips


@dataclass(frozen=True)
class ClipSource:
    """Clips with questions to train and to validate on; `root` is the folder of the run."""

    options: DataConfig
    root: Path

    def records(self, split: str) -> list[Record]:
        """The questions of "train" or "validation", with their answers.

        Raises:
            InputError: a file is missing or malformed.
        """
        options, training = self.options, split == "train"
        match options.source:
            case "clips":
                count = options.train_clips if training else options.validation_clips
                file = write_clips(options.cache_dir, split, count, seed=options.clips_seed)
                return load_music_avqa(file, video_folder(file))
            case "music_avqa":
                file = Path(cast(str, options.train_questions if training else options.validation_questions))
                return load_music_avqa(file, Path(options.video_root) if options.video_root else file.parent)
            case "folder":
                return self._pseudo_labelled(split)
            case "precomputed":
                return load_precomputed(cast(str, options.precomputed), split, options.validation_share)
            case "benchmark":
                found = find_benchmark(cast(str, options.benchmark))
                name = options.train_split if training else options.validation_split
                records = load_benchmark(found.name, cast(str, options.root), name)
                return [replace(record, question=found.prompt(record)) for record in records]

    @property
    def names(self) -> tuple[str, str]:
        """The training data in the words of an export, and the validation questions as the title of a table."""
        options = self.options
        match options.source:
            case "clips":
                size = f"{options.validation_clips} clips, seed {options.clips_seed}"
                return f"generated clips of seed {options.clips_seed}", f"generated-clips/validation ({size})"
            case "music_avqa":
                files = options.train_questions, options.validation_questions
                train, validation = (Path(cast(str, file)).name for file in files)
                return f"questions of {train}", validation
            case "folder":
                answers, folder = "the model's own answers about ", Path(cast(str, options.folder)).name
                asked = "" if self._asks_nothing else answers
                return f"{asked}the videos of {folder}", f"{answers}held-out clips of {folder}"
            case "precomputed":
                folder = Path(cast(str, options.precomputed)).name
                return f"precomputed embeddings of {folder}", f"held-out clips of {folder}"
            case "benchmark":
                title = find_benchmark(cast(str, options.benchmark)).title
                return f"{title}/{options.train_split}", f"{title}/{options.validation_split}"

    def prepare(self, device: torch.device) -> None:
        """Make what `records` reads, on one process of each machine."""
        if self.options.source == "folder":
            videos = [*([] if self._asks_nothing else self.videos("train")), *self.videos("validation")]
            label_clips(self._labels(), videos, self.options.batch_size, device, self.options.num_workers)
        else:
            for split in ("train", "validation"):
                self.records(split)

    # ------------------------------- plain videos, about which the model answers prompts once, with its full cache

    @property
    def _asks_nothing(self) -> bool:
        """A general calibration asks nothing about the training clips: prompts are answered for validation alone."""
        return self.options.calibrate_for == "general"

    def videos(self, split: str) -> list[Path]:
        """The videos of "train" or "validation", of the source 'folder'."""
        folder, other = cast(str, self.options.folder), self.options.validation_folder
        found = list_videos(folder)
        if other is None:
            return hold_out(folder, found, self.options.validation_share)[split == "validation"]
        return found if split == "train" else list_videos(other, "data.validation_folder")

    def _pseudo_labelled(self, split: str) -> list[Record]:
        videos, labels = self.videos(split), self._labels()
        if self._asks_nothing and split == "train":
            return [Record(str(video), video, None, "", None, "", (), "description") for video in videos]
        records, sounds = labels.records(videos), labels.sounds(videos)
        if self.options.batch_size > 1 and len(set(sounds)) > 1:
            message = (
                "has no sound track and others have one, and a batch cannot hold both: split the folder, "
                "or set data.batch_size 1 and trainer.accumulate_grad_batches instead"
            )
            raise InputError(message, source=videos[sounds.index(False)])
        return records

    def _labels(self) -> PseudoLabels:
        options = self.options
        settings = LabelSettings(
            str(options.base_model),
            options.dtype,
            tuple(PROMPTS if options.prompts is None else options.prompts),
            options.max_new_tokens,
            options.load_options,
            options.system_prompt,
            options.limits(),
        )
        return PseudoLabels(self.root / FILE, settings)
