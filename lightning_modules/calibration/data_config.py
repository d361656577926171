"""The options of a calibration's clips and questions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from acckv.config import When
from acckv.data.calibration_record import Objective
from acckv.data.media_options import MediaOptions
from acckv.errors import InputError
from lightning_modules.calibration.config import Dtype, GeneralBy, check_ranges

CacheKind = Literal["nothing", "embeddings", "prefill"]
Source = Literal["clips", "music_avqa", "folder", "precomputed", "benchmark"]


@dataclass(frozen=True, kw_only=True)
class DataConfig(MediaOptions):
    """Options of the clips and questions.

    Args:
        base_model: model whose processor encodes the clips; linked to the model's by train.py.
        when: point of compression; linked to the model's.
        calibrate_for: linked to the model's; with 'general' nothing is asked about the training clips.
        general_by: linked to the model's.
        source: origin of the clips: 'clips' generates clips with questions on first use; 'music_avqa' reads your own;
            'folder' takes plain videos and lets the model, with its full cache, answer `prompts` about each of them
            once; 'precomputed' takes embeddings of your own towers for a plain decoder; 'benchmark' takes two splits of
            a benchmark, or your own questions.jsonl (benchmark 'custom').
        train_clips: generated clips to train on.
        validation_clips: generated clips of the validation split.
        cache_dir: folder of generated clips; None is the user's cache folder.
        train_questions: question file in the MUSIC-AVQA format (source 'music_avqa').
        validation_questions: question file of the validation, in the same format.
        video_root: folder of their ``<video_id>.mp4``.
        folder: folder of videos, also in subfolders (source 'folder').
        validation_folder: folder of other videos to validate on; None holds out a share of `folder`.
        precomputed: folder of embeddings, with questions.jsonl (source 'precomputed'); see acckv.data.precomputed.
        benchmark: name of a benchmark, as for evaluate.py (source 'benchmark').
        root: folder of the benchmark, as its authors distribute it, or its hub id.
        train_split: split of the benchmark to train on.
        validation_split: split of the benchmark to validate on.
        validation_share: share of the videos (or precomputed clips) that is held out, above 0 and below 1. Each is by
            its name alone, so that none changes sides as others come; a small folder may hold out more or fewer.
        prompts: prompts asked of every clip (source 'folder'); None takes a few generic ones.
        max_new_tokens: tokens of the longest answer to them.
        dtype: dtype of the model that answers them; linked to the model's.
        load_options: options of the model and its processor; linked to the model's.
        batch_size: clips a step and process.
        questions_per_clip: questions about each clip in a step; 0 takes all.
        cache: data that is kept of a clip after its first visit. 'embeddings': it is not decoded and encoded again
            (hidden size x tokens numbers a clip). 'prefill': the base model's prefill is not run again either (its
            keys and values too), nor what it says about the clip's questions, all of which it is asked on the first
            visit (likeliest words and features of the answers' tokens), so that a step costs the student alone.
            With `when: prompt` nothing is kept.
        cache_memory_gb: memory of each process for what is kept, in GB; the rest is in files of the run's folder, which
            the system frees when the process ends.
        teacher_top_p: share of the teacher's distributions that is kept: the likeliest words that cover it, all others
            as one. The KL is then that of these words and the rest, a lower bound. 1 keeps all words, as do
            vocabularies of up to 1024.
        seed: seed of the order, and of the questions drawn.
        clips_seed: seed of the generated clips.
        num_workers: processes that read clips ahead, for each process that trains; 0 reads them when they are due.
        system_prompt: text that the model is told before the media; None leaves that to its chat template.

    Raises:
        InputError: an option is out of range, missing, or of no use with the source; it is named.
    """

    base_model: str = "tiny"
    when: When = "context"
    calibrate_for: Objective = "task"
    general_by: GeneralBy = "context"
    source: Source = "clips"
    train_clips: int = 768
    validation_clips: int = 24
    cache_dir: str | None = None
    train_questions: str | None = None
    validation_questions: str | None = None
    video_root: str | None = None
    folder: str | None = None
    validation_folder: str | None = None
    precomputed: str | None = None
    benchmark: str | None = None
    root: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    validation_share: float = 0.1
    prompts: list[str] | None = None
    max_new_tokens: int = 64
    dtype: Dtype = "float32"
    load_options: dict[str, Any] | None = None
    batch_size: int = 8
    questions_per_clip: int = 0
    cache: CacheKind = "embeddings"
    cache_memory_gb: float = 8.0
    teacher_top_p: float = 0.999
    seed: int = 0
    clips_seed: int = 0
    num_workers: int = 0
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("train_clips", "validation_clips", "batch_size", "max_new_tokens")
        ranges: dict[str, tuple[float, float, str]] = {name: (1, math.inf, "[)") for name in counts}
        ranges |= {name: (0, math.inf, "[)") for name in ("questions_per_clip", "num_workers", "cache_memory_gb")}
        ranges |= {"teacher_top_p": (0, 1, "(]"), "validation_share": (0, 1, "()")}
        check_ranges("data", vars(self), ranges)
        if self.prompts is not None and not all(prompt.strip() for prompt in self.prompts or [""]):
            raise InputError("holds an empty prompt, or none", field="data.prompts")
        if self.general_by == "random_text" and self.when == "prompt":
            raise InputError("is 'random_text', which is asked after the compression", field="model.general_by")
        needed = {
            "clips": (),
            "music_avqa": ("train_questions", "validation_questions"),
            "folder": ("folder",),
            "precomputed": ("precomputed",),
            "benchmark": ("benchmark", "root"),
        }
        if self.source not in needed:
            raise InputError(f"{self.source!r} is not one of {', '.join(needed)}", field="data.source")
        for name in needed[self.source]:
            if getattr(self, name) is None:
                raise InputError(f"is needed with source '{self.source}'", field=f"data.{name}")
        if self.source == "precomputed":
            if self.when == "prompt":
                message = "is 'prompt', and precomputed clips end before the question"
                raise InputError(message, field="model.when")
            for name, value in MediaOptions().limits().items():
                if getattr(self, name) != value:
                    raise InputError("is of no use with source 'precomputed'", field=f"data.{name}")
