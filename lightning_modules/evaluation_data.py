"""The clips and questions of an evaluation, read a batch at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch.utils.data import DataLoader, Dataset

from acckv.data.clips import VARIANTS, default_root, video_folder, write_clips
from acckv.data.encoded import load_encoded, read_clip
from acckv.data.music_avqa import load_music_avqa
from acckv.data.records import Record
from acckv.errors import InputError
from lightning_modules.evaluation import Clip


@dataclass(frozen=True)
class EvaluationData:
    """What is asked about: generated clips, your own in the MUSIC-AVQA format, or clips that were encoded ahead.

    Args:
        question_file: questions in the MUSIC-AVQA format; none takes the generated clips.
        video_root: folder of the question file's `<video_id>.mp4`; none is the folder of the file.
        encoded: folder of clips as embeddings, with questions.jsonl; for a plain decoder, see acckv.data.encoded.
        split: of the generated or encoded clips: train, validation or test.
        variant: of the generated clips: plain as in training, long2 or long4 (times as long), crowded (every shape and
            sound there is), noisy, swapped (the sound of another clip), silent (asked about pictures alone) or blank
            (asked about sound alone). crowded and swapped have descriptions of up to 50 tokens.
        clips: number of generated clips.
        cache_dir: where generated clips are kept; none is the user's cache folder.
        seed: of the generated clips.
    """

    question_file: str | None = None
    video_root: str | None = None
    encoded: str | None = None
    split: Literal["train", "validation", "test"] = "test"
    variant: Literal["plain", "long2", "long4", "crowded", "noisy", "swapped", "silent", "blank"] = "plain"
    clips: int = 64
    cache_dir: str | None = None
    seed: int = 0

    @property
    def benchmark(self) -> str:
        """What results name: the question file, the encoded split, or the generated one with its size and seed."""
        if self.question_file is not None:
            return Path(self.question_file).name
        if self.encoded is not None:
            return f"{Path(self.encoded).name}/{self.split}"
        variant = "" if self.variant == "plain" else f"/{self.variant}"
        return f"generated-clips/{self.split}{variant} ({self.clips} clips, seed {self.seed})"

    def records(self) -> list[Record]:
        """All questions; generated clips are written on first use.

        Raises:
            InputError: an option, the question file or a video is not usable.
        """
        if self.encoded is not None:
            if self.question_file is not None or self.video_root is not None or self.variant != "plain":
                raise InputError("cannot be combined with question_file, video_root or variant", field="data.encoded")
            return load_encoded(self.encoded, self.split)
        if self.question_file is not None:
            if self.variant != "plain":
                raise InputError("is of use only with generated clips", field="data.variant")
            file = Path(self.question_file)
            return load_music_avqa(file, Path(self.video_root) if self.video_root else file.parent)
        if self.video_root is not None:
            raise InputError("is of use only together with data.question_file", field="data.video_root")
        if self.clips < 1:
            raise InputError(f"{self.clips} is less than 1", field="data.clips")
        root = default_root() if self.cache_dir is None else Path(self.cache_dir)
        folder = root if self.variant == "plain" else root / "variants" / self.variant
        file = write_clips(folder, self.split, self.clips, seed=self.seed, **VARIANTS[self.variant])
        return load_music_avqa(file, video_folder(file))


def group_by_clip(records: list[Record], limit: int | None = None) -> list[tuple[Path, list[Record]]]:
    """Each video with its questions, in the order of the records.

    Args:
        records: the questions.
        limit: take this many clips only.
    """
    by_video: dict[Path, list[Record]] = {}
    for record in records:
        by_video.setdefault(record.video, []).append(record)
    return list(by_video.items())[:limit]


def clip_loader(clips: list[tuple[Path, list[Record]]], batch_size: int) -> DataLoader[Clip]:
    """Batches (lists) of clips, each read when its batch is due.

    Args:
        clips: as `group_by_clip` gives them.
        batch_size: clips a batch.
    """
    return DataLoader(_Clips(clips), batch_size=batch_size, collate_fn=list)


class _Clips(Dataset[Clip]):
    def __init__(self, clips: list[tuple[Path, list[Record]]]) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> Clip:
        _, records = self.clips[index]
        return Clip(index, read_clip(records[0]), records)
