"""Calibration on a plain folder of videos: the model's own answers, the split, bad folders, and the report."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from acckv import InputError, KVCompressor
from acckv.data.encoding import encode
from acckv.data.media import read_media
from acckv.data.synthetic.clips import video_folder, write_clips
from acckv.data.video_folder import hold_out, list_videos
from acckv.evaluation.results import CONTROLS
from acckv.models import load_model, load_processor
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.dataset import ClipDataset
from lightning_modules.calibration.pseudo_labels import PROMPTS, LabelSettings, PseudoLabels, label_clips
from lightning_modules.cli.train import main
from tests.paths import ROOT

ASKED = ("List the shapes in order.", "Which shape came after the ring?", "Unheard gibberish qwx?")


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos, one of them in a subfolder, and files that are no videos."""
    root = tmp_path_factory.mktemp("generated")
    videos = video_folder(
        write_clips(root, "test", 4, slots=4, both=1, video_only=1, audio_only=1, workers=1, progress=False)
    )
    folder = tmp_path_factory.mktemp("mine")
    (folder / "sub").mkdir()
    for place, video in enumerate(sorted(videos.iterdir())):
        shutil.copy(video, folder / ("sub" if place == 3 else "") / f"clip {place}.MP4")
    (folder / "notes.txt").write_text("no video")
    shutil.copy(folder / "clip 0.MP4", folder / ".hidden.mp4")
    return folder


def test_videos_and_their_split(clips: Path, tmp_path: Path) -> None:
    videos = list_videos(clips)
    assert [path.name for path in videos] == ["clip 0.MP4", "clip 1.MP4", "clip 2.MP4", "clip 3.MP4"]
    train, held = hold_out(clips, videos, 0.5)
    assert sorted([*train, *held]) == videos and len(held) == 3
    moved = shutil.copytree(clips, tmp_path / "elsewhere")
    assert [path.name for path in hold_out(moved, list_videos(moved), 0.5)[1]] == [path.name for path in held]
    assert [path.name for path in hold_out(moved, list_videos(moved)[1:], 0.5)[1]] == [path.name for path in held[1:]]


@given(st.sets(st.integers(0, 200), min_size=2, max_size=60), st.sets(st.integers(201, 400), max_size=60), st.data())
def test_no_video_changes_sides_as_others_come_and_go(names: set[int], more: set[int], data: st.DataObject) -> None:
    folder, share = Path("videos"), data.draw(st.floats(0.05, 0.95))

    def sides(numbers: set[int]) -> dict[Path, bool]:
        videos = sorted(folder / f"clip {number}.mp4" for number in numbers)
        try:
            train, held = hold_out(folder, videos, share)
        except InputError as error:  # one side would be empty; never without a word
            fitting = re.search(r"; ([0-9.]+) holds out (\d+),", str(error))
            assert fitting and len(hold_out(folder, videos, float(fitting[1]))[1]) == int(fitting[2])
            return {}
        assert sorted([*train, *held]) == videos and train and held
        return {path: path in held for path in videos}

    before, after, fewer = sides(names), sides(names | more), sides(set(sorted(names)[::2]) | more | {500, 501})
    for one, other in ((before, after), (before, fewer), (after, fewer)):
        assert all(one[path] == other[path] for path in one.keys() & other.keys())


def test_about_the_share_that_is_asked_for_is_held_out() -> None:
    videos = [Path(f"v/{number}.mp4") for number in range(4000)]
    for share in (0.1, 0.5):
        assert len(hold_out("v", videos, share)[1]) == pytest.approx(4000 * share, abs=4 * (4000 * share) ** 0.5)


def test_answers_are_those_of_plain_generate(clips: Path, tmp_path: Path) -> None:
    settings = LabelSettings("tiny", "float32", ASKED, 8)
    file = PseudoLabels(tmp_path / "answers.json", settings)
    videos = list_videos(clips)[:2]
    label_clips(file, videos, 2, "cpu")
    model: Any
    model, processor = load_model("tiny")
    records = PseudoLabels(file.path, settings).records(videos)
    assert [(record.video, record.question) for record in records] == [(v, p) for v in videos for p in ASKED]
    for record in records[:3]:
        inputs = encode(processor, [read_media(record.video)], [record.question])
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert record.answer == text.strip()


def test_answers_go_on_where_they_were(clips: Path, tmp_path: Path) -> None:
    """What is there is not asked again, whatever cut the run off; a changed clip or setting is."""
    copy = shutil.copytree(clips, tmp_path / "copy")
    videos, settings = list_videos(copy), LabelSettings("tiny", "float32", ASKED[:1], 2)
    path = tmp_path / "answers.json"
    first = PseudoLabels(path, settings)
    broken = videos[2]
    whole = broken.read_bytes()
    broken.write_text("not a film")
    with pytest.raises(InputError, match=r"clip 2\.MP4: not a readable media file"):
        label_clips(first, videos, 1, "cpu")
    again = PseudoLabels(path, settings)
    assert again.missing(videos) == videos[2:]
    again.clips[str(videos[0])]["answers"] = ["kept"]
    broken.write_bytes(whole)
    label_clips(again, videos, 2, "cpu")
    last = PseudoLabels(path, settings)
    assert last.records(videos)[0].answer == "kept" and not last.missing(videos)
    videos[1].write_bytes(videos[1].read_bytes() + b"\0")
    assert last.missing(videos) == [videos[1]]
    assert PseudoLabels(path, LabelSettings("tiny", "float32", ASKED[:1], 3)).missing(videos) == videos
    path.write_text(path.read_text()[:50])
    with pytest.raises(InputError, match=r"answers\.json: not valid JSON .*; remove it"):
        PseudoLabels(path, settings)


def videos(split: str, **options: Any) -> list[Path]:
    return AVDataModule(source="folder", **options).source.videos(split)


def test_bad_folders(clips: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data\.folder: is needed with source 'folder'"):
        AVDataModule(source="folder")
    with pytest.raises(InputError, match=r"nowhere: data\.folder: no such folder"):
        videos("train", folder=str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"data\.folder: holds no video"):
        videos("train", folder=str(tmp_path))
    with pytest.raises(InputError, match=r"data\.validation_folder: holds no video"):
        videos("validation", folder=str(clips), validation_folder=str(tmp_path))
    shutil.copy(clips / "clip 0.MP4", tmp_path)
    with pytest.raises(InputError, match="holds one video, of which none can be held out"):
        videos("train", folder=str(tmp_path))
    for options, field in (({"prompts": []}, "prompts"), ({"validation_share": 1.0}, "validation_share")):
        with pytest.raises(InputError, match=rf"data\.{field}"):
            AVDataModule(source="folder", folder=str(clips), **options)


def test_sound_and_silence_need_batches_of_one(clips: Path, tmp_path: Path) -> None:
    videos = list_videos(clips)
    for batch_size in (1, 2):
        data = AVDataModule(source="folder", folder=str(clips), validation_share=0.1, batch_size=batch_size)
        data.trainer = type("Root", (), {"default_root_dir": str(tmp_path)})()
        answers = PseudoLabels(tmp_path / "answers.json", LabelSettings("tiny", "float32", PROMPTS, 64))
        for place, video in enumerate(videos):
            answers.add(video, place % 2 == 0, ["red"] * len(PROMPTS))
        answers.save()
        if batch_size == 1:
            assert len(data.records("train")) == 3 * len(PROMPTS)
        else:
            with pytest.raises(InputError, match="has no sound track and others have one"):
                data.records("train")


def test_a_folder_is_calibrated_on_from_end_to_end(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str, *more: str) -> Path:
        folder = tmp_path / name
        words = [
            *("train.py", "--config", str(ROOT / "configs" / "folder.yaml"), f"--data.folder={clips}"),
            *(f"--trainer.default_root_dir={folder}", "--data.batch_size=2", "--data.max_new_tokens=8"),
            *("--trainer.max_steps=4", "--trainer.val_check_interval=4", "--report.every_n_steps=1"),
            *(
                "--checkpoint.every_n_train_steps=2",
                "--checkpoint.save_top_k=-1",
                "--trainer.enable_progress_bar=false",
            ),
            *("--evaluation.policies=[acckv-calibrated]", "--evaluation.ratios=[0.1]", "--export.new_tokens=2"),
            *("--evaluation.clips=1", "--data.prompts=[Describe the clip.]", *more),
        ]
        monkeypatch.setattr(sys, "argv", words)
        main()
        return folder

    whole = run("whole")
    weights = KVCompressor.from_pretrained(whole / "export").weights
    assert weights is not None and weights.saliency.abs().max() > 0
    config, card = ((whole / "export" / name).read_text() for name in ("config.json", "README.md"))
    record = json.loads(config)["calibration"]
    assert record.pop("data") == f"the model's own answers about the videos of {clips.name}"
    trained = {
        "kinds": {"Describe the clip.": 3},
        "ratio_min": 0.02,
        "ratio_max": 0.5,
        "steps": 4,
        "calibrate_for": "task",
    }
    assert record == {"clips": 3, "questions": 3, **trained}
    assert "| kinds of questions | Describe the clip. (3) |" in card and "| acckv-calibrated | 0.1 |" in card
    answers = json.loads((whole / "answers.json").read_text())
    assert len(answers["clips"]) == 4 and all(entry["answers"] for entry in answers["clips"].values())
    results = json.loads((whole / "eval" / "results.json").read_text())
    assert [(row["policy"], row["ratio"]) for row in results["rows"]] == [
        *(("full", 1.0), *((name, 0.0) for name in CONTROLS), ("acckv-calibrated", 0.1), ("acckv-calibrated", 0.0))
    ]
    assert results["rows"][0]["accuracy"] == 1.0, "the right answers are the model's own"

    report = (whole / "report.md").read_text()
    assert "4 of 4 optimiser steps" in report and "| every entry evicted (control) | 0 |" in report
    assert "| layer | video at 0.5 | audio at 0.5 |" in report and "| 5 |" in report
    for name in ("kept.png", "budget_history.png"):
        assert f"]({name})" in report and (whole / name).read_bytes().startswith(b"\x89PNG")

    # A run that stopped at step 2 goes on: same weights, and a history without a gap or a step twice.
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    resumed = run("cut", "--evaluation.clips=0", f"--ckpt_path={whole / 'checkpoints' / 'step-2.ckpt'}")
    again = KVCompressor.from_pretrained(resumed / "export").weights
    assert again is not None
    assert all(torch.equal(a, b) for a, b in zip(weights.parameters(), again.parameters(), strict=True))
    history = (whole / "budgets.csv").read_text()
    assert history.splitlines()[0] == "step,temperature,ratio,layer,modality,share"
    assert len(history.splitlines()) == 1 + 5 * 5 * 6 * 2
    assert history.splitlines()[1].endswith(",1") and (resumed / "budgets.csv").read_text() == history


def test_a_cut_answer_is_learned_without_an_end(clips: Path, tmp_path: Path) -> None:
    """The limit ended it, not the model, which is not to learn to stop there."""
    settings = LabelSettings("tiny", "float32", ASKED[:2], 2)
    file = PseudoLabels(tmp_path / "answers.json", settings)
    label_clips(file, list_videos(clips)[:1], 1, "cpu")
    processor = load_processor("tiny")
    records = PseudoLabels(file.path, settings).records(list_videos(clips)[:1])
    assert [record.complete for record in records] == [False, True], "a list of shapes, and one shape"
    questions = ClipDataset("train", records, processor).questions(0)
    for record, question in zip(records, questions, strict=True):
        ids = processor.tokenizer(record.answer, add_special_tokens=False)["input_ids"]
        end = [processor.tokenizer.eos_token_id] if record.complete else []
        assert [*question.ids[question.first + 1 :]] == [*ids, *end]
