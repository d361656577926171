"""Generated clips: what the script says is what the decoded file shows and sounds like."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from acckv.benchmarks.music_avqa_questions import load_music_avqa
from acckv.data.media import read_media
from acckv.data.synthetic.clips import ClipSettings, default_root, make_questions, video_folder, write_clips
from acckv.data.synthetic.events import (
    DESCRIPTION_TYPES,
    PITCHES,
    SHAPES,
    SINGLE_TYPES,
    TIMBRES,
    ClipScript,
    ask,
    draw_script,
)
from acckv.data.synthetic.render import CELL, PITCH_HZ, RGB, render_audio, render_frames
from acckv.errors import InputError
from tests.data.media_files import frames_of, sound_of
from tests.support import not_none

SETTINGS = ClipSettings("test", n_clips=3, seed=5)

SCRIPT = ClipScript(
    slots=6,
    shapes={0: (0, 0), 2: (4, 2), 5: (5, 5)},
    sounds={0: (0, 3), 3: (5, 1), 5: (2, 0)},
    cells={0: 0, 2: 1, 5: 3},
)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clips(tmp_path_factory.mktemp("clips"), "test", 3, seed=5, workers=1, progress=False)


def test_every_question_has_the_answer_of_the_script() -> None:
    rng = np.random.default_rng(0)
    asked = {kind: {(q.text, q.answer) for _ in range(40) if (q := ask(SCRIPT, kind, rng))} for kind in SINGLE_TYPES}
    assert asked["Visual", "Colour"] == {
        ("What colour was the circle?", "red"),
        ("What colour was the ring?", "blue"),
        ("What colour was the bar?", "white"),
    }
    assert asked["Visual", "After"] == {
        ("Which shape came after the circle?", "ring"),
        ("Which shape came after the ring?", "bar"),
    }
    assert ("What pitch was the knock?", "mid") in asked["Audio", "Pitch"]
    assert ("Which sound came after the knock?", "hiss") in asked["Audio", "After"]
    assert asked["Audio-Visual", "Shape during sound"] == {
        ("Which shape was shown during the beep?", "circle"),
        ("Which shape was shown during the hiss?", "bar"),
    }
    assert ("Which sound played during the bar?", "hiss") in asked["Audio-Visual", "Sound during shape"]
    assert ("What pitch played during the circle?", "ultra") in asked["Audio-Visual", "Pitch during shape"]
    assert ("What colour was shown during the hiss?", "white") in asked["Audio-Visual", "Colour during sound"]
    texts = [not_none(ask(SCRIPT, kind, rng)).answer for kind in DESCRIPTION_TYPES]
    assert texts == [
        "red circle blue ring white bar",
        "ultra beep mid knock low hiss",
        "red circle ultra beep ; blue ring silent ; none mid knock ; white bar low hiss ;",
    ]


def test_nothing_to_ask_about() -> None:
    apart = ClipScript(2, {0: (0, 0)}, {1: (0, 0)})
    assert ask(apart, ("Visual", "After"), np.random.default_rng(0)) is None
    assert ask(apart, ("Audio-Visual", "Pitch during shape"), np.random.default_rng(0)) is None


def test_scripts_hold_the_events_asked_for() -> None:
    for seed in range(20):
        script = draw_script(np.random.default_rng(seed), "train", slots=16)
        assert len(script.shapes) == len(script.sounds) == 5
        assert len(script.shapes.keys() & script.sounds.keys()) == 3
        assert len({s for s, _ in script.shapes.values()}) == len({t for t, _ in script.sounds.values()}) == 5
        assert max(script.shapes.keys() | script.sounds.keys()) < 16


def test_no_script_is_in_two_splits() -> None:
    digests = {
        split: {
            ClipSettings(split, 150, seed=3, slots=4, both=1, video_only=1, audio_only=1).script(i).digest
            for i in range(150)
        }
        for split in ("train", "validation", "test")
    }
    assert all(len(found) > 100 for found in digests.values())
    assert not digests["train"] & digests["test"]
    assert not digests["train"] & digests["validation"]
    assert not digests["validation"] & digests["test"]


def test_equal_seeds_give_equal_files(questions: Path, tmp_path: Path) -> None:
    again = write_clips(tmp_path, "test", 3, seed=5, workers=2, progress=False)
    assert again.read_bytes() == questions.read_bytes()
    for video in video_folder(questions).iterdir():
        assert (video_folder(again) / video.name).read_bytes() == video.read_bytes()
    other = write_clips(tmp_path / "other", "test", 3, seed=6, workers=1, progress=False)
    assert other.read_bytes() != questions.read_bytes()


def test_questions_load_and_cover_all_types(questions: Path) -> None:
    records = load_music_avqa(questions, video_folder(questions))
    assert Counter(r.groups[1] for r in records) == {"/".join(kind): 3 for kind in (*SINGLE_TYPES, *DESCRIPTION_TYPES)}
    assert Counter(r.protocol for r in records) == {"word": 24, "description": 9}
    first = next(r for r in records if r.groups[1] == "Visual/Colour")
    script = SETTINGS.script(0)
    shape = first.question.removeprefix("What colour was the ").removesuffix("?")
    slot = next(s for s in script.shapes if script.shape(s) == shape)
    assert first.answer == script.colour(slot)


def test_decoded_pictures_show_the_script(questions: Path) -> None:
    for index in range(3):
        script = SETTINGS.script(index)
        media = read_media(video_folder(questions) / f"{SETTINGS.video_id(index)}.mp4")
        assert frames_of(media).shape == (32, 3, 84, 84) and media.duration == pytest.approx(16, abs=0.01)
        pictures = frames_of(media).float().view(16, 2, 3, 84, 84) / 255
        for slot in range(16):
            if slot not in script.shapes:
                assert float((pictures[slot] - pictures[slot].mean((2, 3), keepdim=True)).abs().quantile(0.99)) < 0.2
                continue
            shape, colour = script.shapes[slot]
            row, column = divmod(script.cells[slot], 2)
            for frame in pictures[slot]:
                middle = frame[
                    :, (row + 1) * CELL - 3 : (row + 1) * CELL + 3, (column + 1) * CELL - 3 : (column + 1) * CELL + 3
                ]
                seen = middle.mean((1, 2))
                distances = (torch.tensor(RGB) - seen).norm(dim=1)
                if SHAPES[shape] == "ring":
                    assert float(distances.min()) > 0.15, "the middle of a ring is empty"
                else:
                    assert int(distances.argmin()) == colour


def test_decoded_sound_is_where_and_what_the_script_says(questions: Path) -> None:
    for index in range(3):
        script = SETTINGS.script(index)
        audio = sound_of(read_media(video_folder(questions) / f"{SETTINGS.video_id(index)}.mp4")).view(16, 16_000)
        energy = audio.pow(2).mean(1)
        assert set((energy > 1e-3).nonzero().flatten().tolist()) == set(script.sounds)
        for slot, (timbre, pitch) in script.sounds.items():
            if TIMBRES[timbre] != "beep":
                continue
            hertz = int(torch.fft.rfft(audio[slot]).abs().argmax())
            assert int(np.abs(np.log(np.array([*PITCH_HZ.values()]) / hertz)).argmin()) == pitch, PITCHES[pitch]


def test_controls_keep_the_questions_and_lose_the_media(tmp_path: Path) -> None:
    plain = make_questions(ClipSettings("test", 1, slots=32))
    file = write_clips(tmp_path, "test", 1, slots=32, sound="silence", picture="blank", workers=1, progress=False)
    assert json.loads(file.read_text()) == plain
    media = read_media(next(video_folder(file).iterdir()))
    assert frames_of(media).shape[0] == 64 and float(sound_of(media).abs().max()) < 1e-4
    pictures = frames_of(media).float()
    assert float((pictures - pictures.mean((2, 3), keepdim=True)).abs().max()) < 100
    file = write_clips(tmp_path, "test", 1, sound="none", workers=1, progress=False)
    assert read_media(next(video_folder(file).iterdir())).audio is None


def test_a_complete_split_is_reused_and_a_broken_one_repaired(tmp_path: Path) -> None:
    file = write_clips(tmp_path, "validation", 2, workers=1, progress=False)
    video = sorted(video_folder(file).iterdir())[0]
    content, written = video.read_bytes(), video.stat().st_mtime_ns
    write_clips(tmp_path, "validation", 2, workers=1, progress=False)
    assert video.stat().st_mtime_ns == written, "nothing is written again"
    video.write_bytes(content[:-10])
    write_clips(tmp_path, "validation", 2, workers=1, progress=False)
    assert video.read_bytes() == content
    video.unlink()
    write_clips(tmp_path, "validation", 2, workers=1, progress=False)
    assert video.read_bytes() == content
    more = write_clips(tmp_path, "validation", 3, workers=1, progress=False)
    assert len(list(video_folder(more).iterdir())) == 3 and len(list(video_folder(file).iterdir())) == 2
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["validation-2-seed0", "validation-3-seed0"], "no scratch folder is left"


def test_files_of_others_are_never_deleted(tmp_path: Path) -> None:
    folder = tmp_path / "test-1-seed0"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="notes"):
        write_clips(tmp_path, "test", 1, workers=1, progress=False)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["test-1-seed0"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("split", "dev"),
        ("n_clips", 0),
        ("sound", "loud"),
        ("picture", "dark"),
        ("descriptions_per_clip", 4),
        ("questions_per_clip", -1),
    ],
)
def test_bad_settings_name_the_field(field: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        ClipSettings(**dict[str, Any](split="test", n_clips=1) | {field: value})
    assert caught.value.field == field


def test_too_many_events() -> None:
    with pytest.raises(InputError, match="do not fit into 4 slots"):
        draw_script(np.random.default_rng(0), "train", slots=4)
    with pytest.raises(InputError, match="at most 6 shapes"):
        draw_script(np.random.default_rng(0), "train", both=6, video_only=1)


def test_default_root_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ACCKV_CACHE", str(tmp_path))
    assert default_root() == tmp_path / "clips"
    monkeypatch.delenv("ACCKV_CACHE")
    assert default_root() == Path.home() / ".cache" / "acckv" / "clips"


def test_rendering_ranges() -> None:
    frames = render_frames(SCRIPT, np.random.default_rng(1))
    audio = render_audio(SCRIPT, np.random.default_rng(1))
    assert frames.shape == (12, 84, 84, 3) and frames.dtype == np.uint8
    assert audio.shape == (96_000,) and audio.dtype == np.float32 and np.abs(audio).max() <= 1
    quiet = np.abs(audio.reshape(6, -1)).max(1)
    assert quiet[[1, 2, 4]].max() < 0.06 < quiet[[0, 3, 5]].min()
