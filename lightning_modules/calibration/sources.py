"""The origins of clips with questions: one class for each value of `data.source`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
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
from lightning_modules.calibration.config import DataConfig, Source
from lightning_modules.calibration.pseudo_labels import FILE, PROMPTS, LabelSettings, PseudoLabels, label_clips


class ClipSource(ABC):
    """Clips with questions to train and to validate on.

    Args:
        options: of the data; root: folder of the run.

    Attributes:
        training_data: name of the data in an export; benchmark: name of the validation questions in a table.
        kind: of a question, for the export; None leaves it to the record.
    """

    training_data: str
    benchmark: str
    kind: Callable[[Record], str] | None = None

    def __init__(self, options: DataConfig, root: Path) -> None:
        self.options, self.root = options, root

    @abstractmethod
    def records(self, split: str) -> list[Record]:
        """The questions of "train" or "validation", with their answers.

        Raises:
            InputError: a file is missing or malformed.
        """

    def prepare(self, device: torch.device) -> None:
        """Make what `records` reads, on one process of each machine."""
        for split in ("train", "validation"):
            self.records(split)


class GeneratedClips(ClipSource):
    """Clips that are generated on first use."""

    def __init__(self, options: DataConfig, root: Path) -> None:
        super().__init__(options, root)
        self.training_data = f"generated clips of seed {options.clips_seed}"
        self.benchmark = f"generated-clips/validation ({options.validation_clips} clips, seed {options.clips_seed})"

    def records(self, split: str) -> list[Record]:
        options = self.options
        count = options.train_clips if split == "train" else options.validation_clips
        file = write_clips(options.cache_dir, split, count, seed=options.clips_seed)
        return load_music_avqa(file, video_folder(file))


class QuestionFiles(ClipSource):
    """The user's own questions in the MUSIC-AVQA format."""

    def __init__(self, options: DataConfig, root: Path) -> None:
        super().__init__(options, root)
        files = options.train_questions, options.validation_questions
        self.train, self.validation = (Path(cast(str, file)) for file in files)
        self.training_data, self.benchmark = f"questions of {self.train.name}", self.validation.name

    def records(self, split: str) -> list[Record]:
        file = self.train if split == "train" else self.validation
        return load_music_avqa(file, Path(self.options.video_root) if self.options.video_root else file.parent)


class PrecomputedEmbeddings(ClipSource):
    """Clips as embeddings for a plain decoder."""

    def __init__(self, options: DataConfig, root: Path) -> None:
        super().__init__(options, root)
        self.folder = Path(cast(str, options.precomputed))
        self.training_data = f"precomputed embeddings of {self.folder.name}"
        self.benchmark = f"held-out clips of {self.folder.name}"

    def records(self, split: str) -> list[Record]:
        return load_precomputed(self.folder, split, self.options.validation_share)


class BenchmarkSplits(ClipSource):
    """Two splits of a registered benchmark, whose questions are asked in its own words."""

    def __init__(self, options: DataConfig, root: Path) -> None:
        super().__init__(options, root)
        self.found = find_benchmark(cast(str, options.benchmark))
        self.training_data = f"{self.found.title}/{options.train_split}"
        self.benchmark = f"{self.found.title}/{options.validation_split}"

    def records(self, split: str) -> list[Record]:
        options = self.options
        name = options.train_split if split == "train" else options.validation_split
        records = load_benchmark(self.found.name, cast(str, options.root), name)
        return [replace(record, question=self.found.prompt(record)) for record in records]


class VideoFolder(ClipSource):
    """Plain videos, about which the model answers prompts once, with its full cache (pseudo-labels).

    A general calibration asks nothing about the training clips: prompts are answered for validation alone.
    """

    def __init__(self, options: DataConfig, root: Path) -> None:
        super().__init__(options, root)
        self.folder = Path(cast(str, options.folder))
        self.asks_nothing = options.calibrate_for == "general"
        answers = "" if self.asks_nothing else "the model's own answers about "
        self.training_data = f"{answers}the videos of {self.folder.name}"
        self.benchmark = f"the model's own answers about held-out clips of {self.folder.name}"
        self.kind = attrgetter("question")  # prompts are all that tells questions apart

    def videos(self, split: str) -> list[Path]:
        """The videos of "train" or "validation"."""
        found, other = list_videos(self.folder), self.options.validation_folder
        if other is None:
            return hold_out(self.folder, found, self.options.validation_share)[split == "validation"]
        return found if split == "train" else list_videos(other, "data.validation_folder")

    def prepare(self, device: torch.device) -> None:
        videos = [*([] if self.asks_nothing else self.videos("train")), *self.videos("validation")]
        label_clips(self._labels(), videos, self.options.batch_size, device, self.options.num_workers)

    def records(self, split: str) -> list[Record]:
        videos, labels = self.videos(split), self._labels()
        if self.asks_nothing and split == "train":
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


SOURCES: dict[Source, type[ClipSource]] = {
    "clips": GeneratedClips,
    "music_avqa": QuestionFiles,
    "folder": VideoFolder,
    "precomputed": PrecomputedEmbeddings,
    "benchmark": BenchmarkSplits,
}
