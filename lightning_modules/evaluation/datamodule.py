"""The clips and questions of an evaluation, read a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from acckv.benchmarks import find_benchmark, load_benchmark
from acckv.benchmarks.music_avqa_questions import load_music_avqa
from acckv.data.media import read_record_media
from acckv.data.media_cache import MediaCache
from acckv.data.media_options import MediaOptions
from acckv.data.precomputed import load_precomputed, read_clip
from acckv.data.records import Record, with_system_prompt
from acckv.data.synthetic.clips import VARIANTS, default_root, video_folder, write_clips
from acckv.errors import InputError, or_error
from acckv.evaluation.journal import Journal
from acckv.evaluation.run_config import RunConfig
from acckv.models.clips import Media, PrecomputedClip

ClipReader = Callable[[Record], Media | PrecomputedClip]
GeneratedSplit = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class EvaluationData(MediaOptions):
    """The clips and questions: generated, a benchmark, your own in the MUSIC-AVQA format, or precomputed embeddings.

    Args:
        benchmark: name of a benchmark, asked and scored as its authors do; none takes the generated clips.
        root: folder of the benchmark, as its authors distribute it, or its hub id: org/name or org/name@revision.
        subset: a part of the benchmark, such as a subtask; none is all of it.
        question_file: questions in the MUSIC-AVQA format, instead of a benchmark.
        video_root: folder of the question file's `<video_id>.mp4`; none is the folder of the file.
        precomputed: folder of embeddings for a plain decoder, with questions.jsonl; see acckv.data.precomputed.
        split: of the benchmark, or of the generated or precomputed clips: train, validation or test. None is the test
            split, or what the benchmark has for it.
        variant: of the generated clips: plain as in training, long2 or long4 (times as long), crowded (every shape and
            sound there is), noisy, swapped (the sound of another clip), silent (asked about pictures alone) or blank
            (asked about sound alone). crowded and swapped have descriptions of up to 50 tokens.
        clips: number of generated clips.
        cache_dir: where generated clips are kept; none is the user's cache folder.
        seed: of the generated clips.
        media_cache: folder that decoded clips are kept in between evaluations; none decodes them anew each time.
        system_prompt: what the model is told before the media, where a question has none of its own; none leaves that
            to its chat template.
        num_workers: processes that read clips ahead, for each process that answers; 0 reads them when they are due.
    """

    benchmark: str | None = None
    root: str | None = None
    subset: str | None = None
    question_file: str | None = None
    video_root: str | None = None
    precomputed: str | None = None
    split: str | None = None
    variant: Literal["plain", "long2", "long4", "crowded", "noisy", "swapped", "silent", "blank"] = "plain"
    clips: int = 64
    cache_dir: str | None = None
    seed: int = 0
    media_cache: str | None = None
    system_prompt: str | None = None
    num_workers: int = 0

    @property
    def title(self) -> str:
        """The name in results: the benchmark, the question file, or the split, with size and seed where generated."""
        if self.benchmark is not None:
            benchmark = find_benchmark(self.benchmark)
            parts = (benchmark.title, self.split or next(iter(benchmark.splits), None), self.subset)
            return "/".join(part for part in parts if part)
        if self.question_file is not None:
            return Path(self.question_file).name
        if self.precomputed is not None:
            return f"{Path(self.precomputed).name}/{self.split or 'test'}"
        variant = "" if self.variant == "plain" else f"/{self.variant}"
        return f"generated-clips/{self.split or 'test'}{variant} ({self.clips} clips, seed {self.seed})"

    def records(self) -> list[Record]:
        """All questions; generated clips are written on first use.

        Raises:
            InputError: an option, the question file or a video is not usable.
        """
        self._check()
        return with_system_prompt(self._records(), self.system_prompt)

    def _records(self) -> list[Record]:
        if self.benchmark is not None:
            return load_benchmark(self.benchmark, str(self.root), self.split, self.subset)
        if self.precomputed is not None:
            return load_precomputed(self.precomputed, self.split or "test")
        if self.question_file is not None:
            file = Path(self.question_file)
            return load_music_avqa(file, Path(self.video_root) if self.video_root else file.parent)
        root = default_root() if self.cache_dir is None else Path(self.cache_dir)
        folder = root if self.variant == "plain" else root / "variants" / self.variant
        split = self.split or "test"
        file = write_clips(folder, split, self.clips, seed=self.seed, **VARIANTS[self.variant])
        return load_music_avqa(file, video_folder(file))

    def reader(self) -> ClipReader:
        """Reads what a question is about."""
        read = read_record_media if self.media_cache is None else MediaCache(self.media_cache).read_record_media
        return partial(read_clip, read_media=partial(read, **self.limits()))

    def _check(self) -> None:
        """Every option is of use, and at most one source is given."""
        sources = {"benchmark": self.benchmark, "question_file": self.question_file, "precomputed": self.precomputed}
        given = [name for name, value in sources.items() if value is not None]
        if len(given) > 1:
            raise InputError(f"cannot be combined with data.{given[0]}", field=f"data.{given[1]}")
        for name, source in (("root", "benchmark"), ("subset", "benchmark"), ("video_root", "question_file")):
            if getattr(self, name) is not None and sources[source] is None:
                raise InputError(f"is of use only together with data.{source}", field=f"data.{name}")
        if self.benchmark is not None and self.root is None:
            raise InputError("is missing: the folder of the benchmark, or its hub id", field="data.root")
        if self.variant != "plain" and given:
            raise InputError("is of use only with generated clips", field="data.variant")
        if self.benchmark is None and self.split not in (None, *get_args(GeneratedSplit)):
            known = ", ".join(get_args(GeneratedSplit))
            raise InputError(f"{self.split!r} is not one of {known}", field="data.split")
        if self.clips < 1:
            raise InputError(f"{self.clips} is less than 1", field="data.clips")
        if self.num_workers < 0:
            raise InputError(f"{self.num_workers} is less than 0", field="data.num_workers")
        if self.precomputed is not None and self.limits() != MediaOptions().limits():
            changed = next(name for name, value in MediaOptions().limits().items() if self.limits()[name] != value)
            raise InputError("is of no use with precomputed embeddings", field=f"data.{changed}")


def group_by_clip(records: Sequence[Record], limit: int | None = None) -> list[list[Record]]:
    """The questions about each clip, or about the first `limit` clips, in the order of the records."""
    by_clip: dict[object, list[Record]] = {}
    for record in records:
        by_clip.setdefault(record.clip, []).append(record)
    return list(by_clip.values())[:limit]


@dataclass(frozen=True)
class Clip:
    """A clip, or why it could not be read; its number is counted through all batches."""

    number: int
    media: Media | PrecomputedClip | InputError
    records: list[Record]


@dataclass(frozen=True)
class ClipBatch:
    """Clips that are answered together; `files` are as :meth:`RunConfig.files` gives them."""

    number: int
    clips: list[Clip]
    files: list[list[list[int] | None]]


@dataclass(frozen=True)
class Shard:
    """A part of an evaluation, for one of several machines: every `count`-th batch from the `index`-th on (from 0)."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str | None) -> Shard:
        """From "2/4", the second of four.

        Raises:
            InputError: it is nothing like that.
        """
        if text is None:
            return cls()
        index, _, count = text.partition("/")
        if not (index.isdecimal() and count.isdecimal() and 1 <= int(index) <= int(count)):
            raise InputError(f"{text!r} is not a part of a whole such as 2/4", field="shard")
        return cls(int(index) - 1, int(count))

    def share(self, batches: Sequence[int], rank: int = 0, world_size: int = 1) -> list[int]:
        """The batches of one process of this shard."""
        return list(batches[self.index :: self.count])[rank::world_size]


class EvaluationClips(LightningDataModule):
    """The batches that are not finished yet, split over the processes: each is answered once, none is filled up."""

    def __init__(self, journal: Journal, shard: Shard, read: ClipReader = read_clip, num_workers: int = 0) -> None:
        super().__init__()
        self.journal, self.shard, self.read, self.num_workers = journal, shard, read, num_workers

    def test_dataloader(self) -> DataLoader[ClipBatch]:
        """Batches, each read when it is due."""
        trainer = self.trainer
        if trainer is None:
            raise RuntimeError("is for a Trainer")
        trainer.strategy.barrier("opened")  # the first process has opened the journal
        config, finished = self.journal.config, self.journal.finished()
        mine = self.shard.share(config.batches, trainer.global_rank, trainer.world_size)
        left = [number for number in mine if number not in finished]
        read = partial(_read_batch, config, self.read)
        return DataLoader(left, batch_size=None, collate_fn=read, num_workers=self.num_workers)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: ClipBatch, device: torch.device, dataloader_idx: int) -> ClipBatch:
        """Clips stay where they are; a session moves what the processor makes of them."""
        return batch


def _read_batch(config: RunConfig, read: ClipReader, number: int) -> ClipBatch:
    files = config.files(number)  # before they are read: a change in between shows
    members = ((clip, config.clips[clip]) for clip in config.members(number))
    return ClipBatch(number, [Clip(clip, or_error(read, records[0]), records) for clip, records in members], files)
