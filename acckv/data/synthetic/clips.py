"""Data sets of generated clips, in the file format of MUSIC-AVQA, deterministic by seed.

    questions = write_clips(root, "test", n_clips=100, seed=0)
    records = load_music_avqa(questions, video_folder(questions))

A split is a folder: `videos/<video_id>.mp4`, `avqa-<split>.json` and `manifest.json` (settings, and the size of each
file). No event script can appear in two splits (see `ClipScript.split`). A split that is complete and was made with
the same settings is not written again.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from acckv.data.synthetic.events import DESCRIPTION_TYPES, SINGLE_TYPES, SPLITS, ClipScript, ask, draw_script
from acckv.data.synthetic.render import render_audio, render_frames, write_mp4
from acckv.errors import InputError
from acckv.io.files import whole_folder
from acckv.io.json_files import read_json
from acckv.io.progress import Progress

FORMAT = 1
"""Version of the generator: raised when equal settings no longer give equal files."""
SOUNDS = ("events", "silence", "none")
PICTURES = ("events", "blank")
ABOUT = ("all", "Visual", "Audio")
CLIPS_A_JOB = 8
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "long2": {"slots": 32},
    "long4": {"slots": 64},
    "crowded": {"both": 3, "video_only": 3, "audio_only": 3},
    "noisy": {"noise": 3.0},
    "swapped": {"swap": True},
    "silent": {"sound": "silence", "about": "Visual"},
    "blank": {"picture": "blank", "about": "Audio"},
}
"""Settings of the sets that ask for more than training showed: clips two and four times as long, with every shape and
sound there is, with three times the noise, with the sound of another clip, in silence, and without pictures."""


@dataclass(frozen=True)
class ClipSettings:
    """Everything that a split's files depend on.

    Attributes:
        split: "train", "validation" or "test".
        n_clips: how many clips.
        seed: seed of events, renderings and questions.
        questions_per_clip: questions with a one-word answer a clip, as even over the types as it goes.
        descriptions_per_clip: 0 to 3 of the free-text tasks (shapes, sounds, everything) a clip.
        slots: seconds a clip.
        both: slots with a shape and a sound; `video_only`, `audio_only`: slots with one of them.
        sound: "events", digital "silence", or "none" (no sound track). Questions stay the same: a control.
        picture: "events", or "blank" (no shapes).
        noise: factor on the noise of pictures and sound.
        swap: each clip has the sound track of the next one (the last that of the first), and the questions are about
            what is then seen and heard together. Both halves belong to the split.
        about: ask about "all", or only what is seen ("Visual") or heard ("Audio"), and nothing twice.
    """

    split: str
    n_clips: int
    seed: int = 0
    questions_per_clip: int = 8
    descriptions_per_clip: int = 3
    slots: int = 16
    both: int = 3
    video_only: int = 2
    audio_only: int = 2
    sound: str = "events"
    picture: str = "events"
    noise: float = 1.0
    swap: bool = False
    about: str = "all"

    def __post_init__(self) -> None:
        choices = {"split": SPLITS, "sound": SOUNDS, "picture": PICTURES, "about": ABOUT}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise InputError(f"{getattr(self, field)!r} is not one of {', '.join(allowed)}", field=field)
        if self.n_clips < 1 + self.swap:
            raise InputError(f"at least {1 + self.swap} needed", field="n_clips")
        for field in ("noise", "questions_per_clip"):
            if getattr(self, field) < 0:
                raise InputError("cannot be negative", field=field)
        if not 0 <= self.descriptions_per_clip <= len(DESCRIPTION_TYPES):
            raise InputError(f"0 to {len(DESCRIPTION_TYPES)} descriptions a clip", field="descriptions_per_clip")

    def script(self, index: int) -> ClipScript:
        """The events of clip `index`, as they are seen and heard."""
        script = self.drawn(index)
        return replace(script, sounds=self.drawn(self.sound_of(index)).sounds) if self.swap else script

    def sound_of(self, index: int) -> int:
        """The clip whose sound track clip `index` has."""
        return (index + 1) % self.n_clips if self.swap else index

    def kinds(self, index: int) -> list[tuple[str, str]]:
        """Types of the questions about clip `index`, one-word ones first."""
        single, descriptions = (
            [kind for kind in kinds if self.about in ("all", kind[0])]
            for kinds in (SINGLE_TYPES, DESCRIPTION_TYPES[: self.descriptions_per_clip])
        )
        start = index * self.questions_per_clip
        return [single[(start + k) % len(single)] for k in range(self.questions_per_clip)] + descriptions

    def drawn(self, index: int) -> ClipScript:
        """The events that were drawn for clip `index`; it belongs to the split."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        return draw_script(rng, self.split, self.slots, self.both, self.video_only, self.audio_only)

    def video_id(self, index: int) -> str:
        return f"{SPLITS.index(self.split)}{index:07d}"


def default_root() -> Path:
    """Folder of generated data: `$ACCKV_CACHE`, or `~/.cache/acckv`."""
    return Path(os.environ.get("ACCKV_CACHE") or Path.home() / ".cache" / "acckv") / "clips"


def video_folder(question_file: Path) -> Path:
    """The folder of the videos that a question file of `write_clips` is about."""
    return question_file.parent / "videos"


def write_clips(
    root: str | Path | None,
    split: str,
    n_clips: int,
    seed: int = 0,
    *,
    workers: int = 2,
    progress: bool = True,
    **settings: Any,
) -> Path:
    """Write one split to `<root>/<split>-<clips>-seed<seed>`, or reuse it where it is complete, of the same settings.

    Args:
        root: folder of the data set; `default_root()` when None.
        split, n_clips, seed, settings: the fields of `ClipSettings`.
        workers: processes.

    Returns:
        the question file, `avqa-<split>.json` in that folder.

    Raises:
        InputError: bad settings, or a folder that holds other files than those of an earlier split.
    """
    chosen = ClipSettings(split=split, n_clips=n_clips, seed=seed, **settings)
    folder = (default_root() if root is None else Path(root)) / f"{split}-{n_clips}-seed{seed}"
    question_file = folder / f"avqa-{split}.json"
    if is_complete(folder, chosen):
        return question_file
    _refuse_foreign_files(folder)
    with whole_folder(folder) as scratch:
        (scratch / "videos").mkdir()
        _write_videos(scratch / "videos", chosen, workers, progress)
        questions = json.dumps(make_questions(chosen), indent=1)
        (scratch / question_file.name).write_text(questions, encoding="utf-8")
        manifest = {"format": FORMAT, "settings": asdict(chosen), "files": _sizes(scratch)}
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return question_file


def make_questions(settings: ClipSettings) -> list[dict[str, Any]]:
    """The records of a split, in the format of MUSIC-AVQA."""
    records: list[dict[str, Any]] = []
    for index in range(settings.n_clips):
        script = settings.script(index)
        rng = np.random.default_rng([settings.seed, SPLITS.index(settings.split), index, 1])
        asked = set()
        for kind in settings.kinds(index):
            question = ask(script, kind, rng)
            if question is None or (settings.about != "all" and question.text in asked):
                continue
            asked.add(question.text)
            records.append(
                {
                    "video_id": settings.video_id(index),
                    "question_id": len(records),
                    "type": json.dumps(list(question.type)),
                    "question_content": question.template,
                    "templ_values": json.dumps(list(question.values)),
                    "question_deleted": 0,
                    "anser": question.answer,
                }
            )
    return records


def is_complete(folder: Path, settings: ClipSettings) -> bool:
    """Whether `folder` holds every file of a split of these settings, each with the size it was written with."""
    manifest = _manifest(folder)
    if manifest is None or manifest.get("format") != FORMAT or not isinstance(manifest.get("settings"), dict):
        return False
    # A manifest that is older than an option was written with its default.
    if {**asdict(ClipSettings("test", 1)), **manifest["settings"]} != asdict(settings):
        return False
    return manifest["files"].items() <= _sizes(folder).items()


def _write_videos(folder: Path, settings: ClipSettings, workers: int, progress: bool) -> None:
    jobs = [
        range(first, min(first + CLIPS_A_JOB, settings.n_clips)) for first in range(0, settings.n_clips, CLIPS_A_JOB)
    ]
    with Progress(f"writing {settings.split} clips", settings.n_clips, "clips", shown=progress) as seen:
        if workers <= 1 or len(jobs) == 1:
            for job in jobs:
                seen.advance(_write_some(folder, settings, job))
            return
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            for done in as_completed([pool.submit(_write_some, folder, settings, job) for job in jobs]):
                seen.advance(done.result())


def _write_some(folder: Path, settings: ClipSettings, indices: Sequence[int]) -> int:
    for index in indices:
        frames, audio = _render(settings, index)
        if settings.swap:
            _, audio = _render(settings, settings.sound_of(index))
        write_mp4(folder / f"{settings.video_id(index)}.mp4", frames, audio)
    return len(indices)


def _render(settings: ClipSettings, index: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Pictures and sound of a clip as it was drawn."""
    script = settings.drawn(index)
    rng = np.random.default_rng([settings.seed, SPLITS.index(settings.split), index, 2])
    frames = render_frames(script, rng, blank=settings.picture == "blank", noise=settings.noise)
    if settings.sound == "none":
        return frames, None
    return frames, render_audio(script, rng, silent=settings.sound == "silence", noise=settings.noise)


def _refuse_foreign_files(folder: Path) -> None:
    """Only files that an earlier call wrote may be replaced."""
    if not folder.exists():
        return
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    manifest = _manifest(folder)
    written = {"manifest.json", *manifest["files"]} if manifest else set()
    foreign = sorted(present - written)
    if foreign:
        message = f"holds files that were not generated, e.g. {foreign[0]}; choose another folder"
        raise InputError(message, source=folder)


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = read_json(folder / "manifest.json")
    except InputError:
        return None
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.stat().st_size for path in files}
