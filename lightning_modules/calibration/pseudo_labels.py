"""Pseudo-labels: answers of the frozen model to generic prompts, for clips that come without questions."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from acckv import KVCompressor
from acckv.data.encoding import encode, question_suffix
from acckv.data.media import read_media
from acckv.data.media_options import MediaOptions
from acckv.data.records import Record
from acckv.errors import InputError, or_error
from acckv.evaluation.answering import answer_questions
from acckv.io.json_files import read_json, write_json
from acckv.io.progress import Progress
from acckv.models import load_model
from acckv.models.clips import KINDS, Media

FORMAT = 2
FILE = "answers.json"
PROMPTS = (
    "Describe what is seen and heard in this clip, in order.",
    "What happens first, and what happens after it?",
    "Which objects and people are visible, and what do they look like?",
    "Which sounds are heard, when, and what makes them?",
    "What is seen while the loudest sound is heard?",
    "Summarise the clip in one sentence.",
)
"""Asked of every clip unless other prompts are given."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelSettings:
    """Settings that the answers depend on besides the clip.

    Attributes:
        model: 'tiny', a folder or a hub id; dtype: that it runs in; load_options: of from_pretrained.
        prompts: asked of every clip, each in a conversation of its own.
        max_new_tokens: longest answer.
        system_prompt: what the model is told before the media.
        media: options of `read_media`.
    """

    model: str
    dtype: str
    prompts: tuple[str, ...]
    max_new_tokens: int
    load_options: dict[str, Any] | None = None
    system_prompt: str | None = None
    media: dict[str, Any] = field(default_factory=MediaOptions().limits)


class PseudoLabels:
    """Answers by clip in one JSON file, replaced as a whole, so that a run that was cut off goes on where it was.

    A clip that has changed since (size or time of the last change), and all clips under other settings, are answered
    anew.

    Raises:
        InputError: the file is there and holds something else.
    """

    def __init__(self, path: Path, settings: LabelSettings) -> None:
        self.path, self.settings = path, settings
        self.clips: dict[str, dict[str, Any]] = {}
        if path.exists():
            self._read()

    def missing(self, videos: Sequence[Path]) -> list[Path]:
        """Those that have no answers yet."""
        return [video for video in videos if not self._has(video)]

    def add(self, video: Path, sound: bool, answers: list[str], cut: list[bool] | None = None) -> None:
        """Keep the answers to the prompts, and of each whether the limit of tokens ended it."""
        ended = [False] * len(answers) if cut is None else cut
        self.clips[str(video)] = {**_stamp(video), "sound": sound, "answers": answers, "cut": ended}

    def save(self) -> None:
        write_json(self.path, {"format": FORMAT, "settings": self._settings(), "clips": self.clips}, indent=1)

    def records(self, videos: Sequence[Path]) -> list[Record]:
        """A question and answer for every clip and prompt.

        Raises:
            InputError: a clip has no answers.
        """
        records = []
        for video in videos:
            if not self._has(video):
                raise InputError("was added or changed since its answers were made; start anew", source=video)
            found = self.clips[str(video)]
            for number, (prompt, answer, cut) in enumerate(
                zip(self.settings.prompts, found["answers"], found["cut"], strict=True)
            ):
                groups = (f"prompt {number + 1}",)
                record = Record(f"{video}#{number}", video, None, prompt, None, answer, groups, "description")
                records.append(replace(record, complete=not cut))
        return records

    def sounds(self, videos: Sequence[Path]) -> list[bool]:
        """Whether each clip has a sound track."""
        return [bool(self.clips[str(video)]["sound"]) for video in videos]

    def _has(self, video: Path) -> bool:
        found = self.clips.get(str(video), {})
        return {name: found.get(name) for name in ("size", "changed")} == _stamp(video)

    def _settings(self) -> dict[str, Any]:
        return {**asdict(self.settings), "prompts": list(self.settings.prompts)}

    def _read(self) -> None:
        values = read_json(self.path, remedy="remove it")
        if not isinstance(values, dict) or values.get("format") != FORMAT or not isinstance(values.get("clips"), dict):
            raise InputError("holds no answers of this version; remove it", source=self.path)
        if values.get("settings") == self._settings():
            self.clips = values["clips"]


def label_clips(
    file: PseudoLabels, videos: Sequence[Path], batch_size: int, device: torch.device | str, num_workers: int = 0
) -> None:
    """Let the frozen model answer every prompt about every clip that has no answers yet, greedily, with its full cache.

    The file is saved after each batch.

    Raises:
        InputError: a video cannot be read; it names the file.
    """
    waiting = file.missing(videos)
    if not waiting:
        return
    settings = file.settings
    placed = "device_map" in (settings.load_options or {})
    model, processor = load_model(
        settings.model, settings.dtype, None if placed else device, load_options=settings.load_options
    )
    _warn_of_unknown_words(processor, settings.prompts)
    batches = [waiting[start : start + batch_size] for start in range(0, len(waiting), batch_size)]
    cut, asked = 0, len(waiting) * len(settings.prompts)
    seen = Progress("answering about clips", len(waiting), "clips")
    with seen, KVCompressor("full")(model) as session:
        read = partial(_read, settings.media)
        for media in DataLoader(batches, batch_size=None, collate_fn=read, num_workers=num_workers):  # type: ignore[arg-type]
            if isinstance(media, InputError):
                raise media
            for kind in KINDS:
                chosen = [clip for clip in media if clip.kind == kind]
                if chosen:
                    cache = session.compress(**encode(processor, chosen, None, settings.system_prompt))
                    questions = [settings.prompts] * len(chosen)
                    answered = answer_questions(session, processor, cache, questions, settings.max_new_tokens)
                    for clip, answers in zip(chosen, answered, strict=True):
                        ended = [answer.cut for answer in answers]
                        file.add(clip.path, clip.audio is not None, [answer.text for answer in answers], ended)
                        cut += sum(ended)
            file.save()
            seen.advance(len(media))
    if cut:
        limit = f"max_new_tokens={settings.max_new_tokens}"
        _log.warning("data.%s ended %d of %d answers; how they would have ended is not learned", limit, cut, asked)


def _read(options: dict[str, Any], videos: list[Path]) -> list[Media] | InputError:
    return or_error(lambda: [read_media(video, **options) for video in videos])


def _warn_of_unknown_words(processor: Any, prompts: Sequence[str]) -> None:
    unknown = processor.tokenizer.unk_token_id
    for prompt in prompts:
        if unknown is not None and unknown in question_suffix(processor, prompt):
            _log.warning("data.prompts: the model's vocabulary lacks words of %r", prompt)


def _stamp(video: Path) -> dict[str, int]:
    status = video.stat()
    return {"size": status.st_size, "changed": status.st_mtime_ns}
