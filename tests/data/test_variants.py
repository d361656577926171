"""Variants of the generated clips: longer, fuller, noisier, swapped, silent, blank; answers right by construction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from acckv.benchmarks.music_avqa_questions import fill_template
from acckv.data.media import read_media
from acckv.data.synthetic.clips import VARIANTS, ClipSettings, is_complete, make_questions, video_folder, write_clips
from acckv.data.synthetic.events import SHAPES, TIMBRES, ClipScript
from acckv.errors import InputError
from lightning_modules.evaluation.datamodule import EvaluationData
from tests.data.media_files import frames_of, sound_of

CLIPS = 12


def settings(variant: str, **changes: Any) -> ClipSettings:
    return ClipSettings(**{"split": "test", "n_clips": CLIPS, "seed": 4, **VARIANTS[variant], **changes})


def expected(script: ClipScript, kind: list[str], subject: str | None) -> str:
    """The answer, looked up in the events as seen and heard; `subject` is what the question names."""
    seen = {slot: (script.shape(slot), script.colour(slot)) for slot in sorted(script.shapes)}
    heard = {slot: (script.timbre(slot), script.pitch(slot)) for slot in sorted(script.sounds)}
    if kind[1] == "Description":
        if kind[0] == "Visual":
            return " ".join(f"{colour} {shape}" for shape, colour in seen.values())
        if kind[0] == "Audio":
            return " ".join(f"{pitch} {sound}" for sound, pitch in heard.values())
        moments = sorted({*seen, *heard})
        pairs = [(seen.get(slot, ("", "none")), heard.get(slot, ("", "silent"))) for slot in moments]
        return " ".join(" ".join(f"{c} {s} {p} {t} ;".split()) for (s, c), (t, p) in pairs)
    if kind[1] == "After":
        names = [name for name, _ in (seen if kind[0] == "Visual" else heard).values()]
        return names[names.index(str(subject)) + 1]
    by_shape = {shape: slot for slot, (shape, _) in seen.items()}
    by_sound = {sound: slot for slot, (sound, _) in heard.items()}
    slot = by_shape[str(subject)] if subject in SHAPES else by_sound[str(subject)]
    place = {"Colour": seen, "Pitch": heard, "Shape": seen, "Sound": heard}[kind[1].split()[0]]
    index = {"Colour": 1, "Pitch": 1, "Shape": 0, "Sound": 0}[kind[1].split()[0]]
    return place[slot][index]


@pytest.mark.parametrize("variant", VARIANTS)
def test_answers_are_right(variant: str) -> None:
    chosen = settings(variant)
    records = make_questions(chosen)
    scripts = {chosen.video_id(index): chosen.script(index) for index in range(CLIPS)}
    assert {record["video_id"] for record in records} == set(scripts)
    for record in records:
        kind, values = json.loads(record["type"]), json.loads(record["templ_values"])
        assert record["anser"] == expected(scripts[record["video_id"]], kind, values[0] if values else None)
        assert chosen.about in ("all", kind[0])
    texts = [(r["video_id"], fill_template(r["question_content"], json.loads(r["templ_values"]))) for r in records]
    assert len(texts) == len(set(texts)), "nothing is asked twice"
    assert len(records) >= 6 * CLIPS


def test_what_variants_change() -> None:
    plain = settings("plain")
    assert [settings(name).script(0).slots for name in ("plain", "long2", "long4")] == [16, 32, 64]
    crowded = settings("crowded").script(3)
    assert len(crowded.shapes) == len(SHAPES) and len(crowded.sounds) == len(TIMBRES)
    assert settings("noisy").script(2) == plain.script(2) and make_questions(settings("noisy")) == make_questions(plain)
    swapped = settings("swapped")
    for index in range(CLIPS):
        script, neighbour = swapped.script(index), plain.script((index + 1) % CLIPS)
        assert script.shapes == plain.script(index).shapes and script.sounds == neighbour.sounds
        assert plain.script(index).split == neighbour.split == "test"
    moved = [i for i in range(CLIPS) if set(swapped.script(i).shapes) & set(swapped.script(i).sounds)]
    asked = {(r["video_id"], json.loads(r["type"])[1]) for r in make_questions(swapped)}
    during = {video for video, kind in asked if "during" in kind}
    assert during <= {swapped.video_id(i) for i in moved} and len(moved) < CLIPS, "some clips have no such moment"
    with pytest.raises(InputError, match="n_clips: at least 2"):
        settings("swapped", n_clips=1)


def test_swapped_files_hold_the_pictures_and_the_sound_of_two_clips(tmp_path: Path) -> None:
    """Sound crosses the encoder unchanged but for its noise, so the tracks are compared by correlation."""
    media = {}
    for name in ("plain", "swapped", "silent", "blank", "long2"):
        file = write_clips(tmp_path / name, "test", 2, seed=4, workers=1, progress=False, **VARIANTS[name])
        media[name] = [read_media(path) for path in sorted(video_folder(file).iterdir())]
    for index in range(2):
        plain, swapped = media["plain"], media["swapped"]
        assert torch.equal(frames_of(swapped[index]), frames_of(plain[index]))
        assert torch.equal(sound_of(swapped[index]), sound_of(plain[1 - index]))
        assert sound_of(media["silent"][index]).abs().max() < 1e-3
        assert torch.equal(frames_of(media["silent"][index]), frames_of(plain[index]))
        assert frames_of(media["blank"][index]).float().flatten(2).std(-1).max() < 40
        assert frames_of(plain[index]).float().flatten(2).std(-1).max() > 40
    assert len(frames_of(media["long2"][0])) == 64 and len(sound_of(media["long2"][0])) == 32 * 16_000


def test_a_manifest_from_before_an_option_still_counts(tmp_path: Path) -> None:
    file = write_clips(tmp_path, "test", 1, questions_per_clip=1, slots=8, workers=1, progress=False)
    manifest = json.loads((file.parent / "manifest.json").read_text())
    for option in ("noise", "swap", "about"):
        del manifest["settings"][option]
    (file.parent / "manifest.json").write_text(json.dumps(manifest))
    same = ClipSettings("test", 1, questions_per_clip=1, slots=8)
    assert is_complete(file.parent, same)
    assert not is_complete(file.parent, ClipSettings("test", 1, questions_per_clip=1, slots=8, noise=2.0))


def test_evaluation_takes_a_variant(tmp_path: Path) -> None:
    data = EvaluationData(variant="blank", clips=2, cache_dir=str(tmp_path))
    assert data.title == "generated-clips/test/blank (2 clips, seed 0)"
    records = data.records()
    assert {record.groups[0] for record in records} == {"Audio"}
    assert records[0].video.parent.parent.parent == tmp_path / "variants" / "blank"
    with pytest.raises(InputError, match=r"data\.variant: is of use only"):
        EvaluationData(variant="blank", question_file="x.json").records()
