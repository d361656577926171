"""The configuration of an evaluation (`run.json`): its questions, and every option that its answers depend on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from acckv.benchmarks import Mode
from acckv.benchmarks.judging import Judge
from acckv.data.asked_questions import Coverage
from acckv.data.records import Record
from acckv.errors import InputError
from acckv.evaluation.fingerprint import compressor_digest, digest, model_digest
from acckv.evaluation.results import Answer, Setting

_LONGEST = 40  # characters of an option that a message quotes


@dataclass(frozen=True)
class RunConfig:
    """The configuration of an evaluation.

    Attributes:
        options: by name, all that answers depend on; evaluations with the same options give the same answers.
        model: name of the AV-LLM; benchmark: of the registry, None for questions in the MUSIC-AVQA format.
        vocabulary: words that a one-word answer is looked for in.
        score: the parser that the answers were judged by; answers do not depend on it.
        clips: the questions about each clip.
        coverage: how many of them the export was not calibrated for, where there is one that says; answers do not
            depend on it.
    """

    options: dict[str, Any]
    model: str
    benchmark: str | None
    vocabulary: list[str]
    score: Mode
    clips: list[list[Record]]
    coverage: Coverage | None = None

    @property
    def settings(self) -> list[Setting]:
        """The rows of the table."""
        return [Setting(policy, ratio) for policy, ratio in self.options["policies and ratios"]]

    @property
    def judge(self) -> Judge:
        """The judge of its answers."""
        return Judge(self.benchmark, frozenset(self.vocabulary), self.score)

    @property
    def batches(self) -> range:
        """Numbers of the batches: clips that are answered together, the same ones however often a run is cut off."""
        return range(-(-len(self.clips) // self.options["batch_size"]))

    def members(self, number: int) -> range:
        """The clips of a batch."""
        size = self.options["batch_size"]
        return range(number * size, min((number + 1) * size, len(self.clips)))

    def files(self, number: int) -> list[list[list[int] | None]]:
        """By clip of a batch, size and time of the last change of each media file; None for one that is not there."""
        return [[_stamp(file) for file in _media_files(self.clips[clip][0])] for clip in self.members(number)]

    def record(self, answer: Answer) -> Record:
        """The question of an answer."""
        return self._records[answer.clip, answer.id]

    @cached_property
    def _records(self) -> dict[tuple[int, str], Record]:
        return {(clip, record.id): record for clip, records in enumerate(self.clips) for record in records}

    def is_whole(self, number: int, answers: Iterable[Answer], failed: Collection[int]) -> bool:
        """Whether every setting has one answer to every question of a batch, of the clips that could be read."""
        clips = [clip for clip in self.members(number) if clip not in failed] if number in self.batches else []
        asked = sorted(
            (*each, clip, record.id) for each in self.settings for clip in clips for record in self.clips[clip]
        )
        return asked == sorted((*answer.setting, answer.clip, answer.id) for answer in answers)

    def differences(self, other: RunConfig) -> str:
        """The options in which another evaluation differs, short values beside their names; empty if in none."""
        named = []
        for name in dict.fromkeys([*self.options, *other.options]):
            one, two = (json.dumps(config.options.get(name)) for config in (self, other))
            if one != two:
                long = max(len(one), len(two)) > _LONGEST or "weights" in name or name == "questions"
                named.append(name if long else f"{name}: {one} instead of {two}")
        return ", ".join(named)


def describe_options(
    clips: Sequence[Sequence[tuple[Record, str]]], compressors: Mapping[Setting, Any], model: Any, **options: Any
) -> dict[str, Any]:
    """All that the answers of an evaluation depend on, as JSON holds it.

    Args:
        clips: the questions about each clip, with the text that the model reads for them.
        compressors: of each row of the table; model: with its weights.
        options: the rest, by name.

    Raises:
        InputError: two questions have the same id.
    """
    questions = [(record, text) for clip in clips for record, text in clip]
    for name, times in Counter(record.id for record, _ in questions).items():
        if times > 1:
            raise InputError(f"{name!r} is there more than once", field="id")
    by_policy = {setting.policy: compressor for setting, compressor in compressors.items()}
    described = {
        **options,
        "clips": len(clips),
        "questions": digest([{**asdict(record), **_file_names(record), "prompt": text} for record, text in questions]),
        "policies and ratios": list(compressors),
        "model weights": model_digest(model),
        "compressor weights": {policy: compressor_digest(compressor) for policy, compressor in by_policy.items()},
    }
    return json.loads(json.dumps(described))


def _file_names(record: Record) -> dict[str, Any]:
    """Media by name alone: shards on several machines may keep them in different folders."""
    audio = None if record.audio is None else record.audio.name
    return {"video": record.video.name, "audio": audio, "attachments": [file.name for file in record.attachments]}


def _media_files(record: Record) -> list[Path]:
    return [record.video, *([] if record.audio is None else [record.audio]), *record.attachments]


def _stamp(file: Path) -> list[int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]
