"""System prompt, limits of reading and worker processes in evaluate.py, its ask, train.py and the plug-in."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from acckv import KVCompressor
from acckv.benchmarks import load_benchmark
from acckv.config import When
from acckv.data.encoding import encode
from acckv.data.media import read_media
from acckv.data.media_options import MediaOptions
from acckv.data.video_folder import hold_out, list_videos
from acckv.errors import InputError
from acckv.models import load_model
from acckv.plugins.answerer import Answerer
from acckv.plugins.media_store import MediaStore
from acckv.plugins.requests import ClipRef, Generation, Prompt, read_prompt
from lightning_modules.calibration.clip_cache import ClipCache
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.dataset import ClipDataset, ClipLoader
from lightning_modules.cli.ask import AskOptions, run_ask
from lightning_modules.cli.train import main
from lightning_modules.evaluation.datamodule import EvaluationData
from lightning_modules.evaluation.options import EvaluationOptions
from lightning_modules.evaluation.run import run_evaluation
from tests.data.media_files import GREYS, burst, write_video

QUESTION, SYSTEM, OTHER = "What colour was the ring?", "Describe the clip.", "Which sound came after the beep?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of 8 s; a question about each, one again with a system prompt of its own, and a file that is none."""
    folder = tmp_path_factory.mktemp("own")
    for place, name in enumerate(("a.mp4", "b.mp4")):
        greys = [GREYS[(k // 4 + place) % 4] for k in range(16)]
        write_video(folder / name, [k / 2 for k in range(16)], greys, burst(8, 1.5 + place)[None])
    (folder / "broken.mp4").write_text("no media")
    lines = [{"video": name, "question": QUESTION, "answer": "red"} for name in ("a.mp4", "b.mp4", "broken.mp4")]
    lines.append({**lines[0], "system_prompt": OTHER})
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("tiny")


def evaluate(folder: Path, output: Path, policies: str = "full", **changes: Any) -> dict[str, str]:
    """The full cache's answers by the number of their question."""
    data = EvaluationData(benchmark="custom", root=str(folder), **changes)
    options = EvaluationOptions(
        policies=policies, ratios=0.5, timelines=1, batch_size=1, accelerator="cpu", output=str(output), data=data
    )
    run_evaluation(options, console=Console(file=io.StringIO(), width=140))
    lines = map(json.loads, (output / "predictions.jsonl").read_text().splitlines())
    return {line["id"]: line["prediction"] for line in lines if line["policy"] == "full"}


def plain(tiny: tuple[Any, Any], video: Path, system: str | None, limit: int = 64, **options: Any) -> str:
    model, processor = tiny
    inputs = encode(processor, [read_media(video, **options)], [QUESTION], system)
    new = model.generate(**inputs, max_new_tokens=limit, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_an_evaluation_reads_and_tells_as_it_is_asked_to(folder: Path, tiny: tuple[Any, Any], tmp_path: Path) -> None:
    options = {"max_frames": 4, "max_pixels": 24 * 16}
    answers = evaluate(folder, tmp_path / "one", "keydiff", system_prompt=SYSTEM, **options)
    told = {"0": ("a.mp4", SYSTEM), "1": ("b.mp4", SYSTEM), "3": ("a.mp4", OTHER)}
    assert answers == {id: plain(tiny, folder / name, system, **options) for id, (name, system) in told.items()}
    described = json.loads((tmp_path / "one" / "run.json").read_text())["options"]
    assert described["media"] == MediaOptions(max_frames=4, max_pixels=24 * 16).limits()
    with pytest.raises(InputError, match=r"other settings \(.*media"):
        evaluate(folder, tmp_path / "one", "keydiff", system_prompt=SYSTEM)
    with pytest.raises(InputError, match=r"other settings \(.*questions"):
        evaluate(folder, tmp_path / "one", "keydiff", **options)


def test_worker_processes_change_no_answer(folder: Path, tmp_path: Path) -> None:
    none, two = (evaluate(folder, tmp_path / str(count), num_workers=count) for count in (0, 2))
    assert none == two and len(two) == 3
    for file in ("predictions.jsonl", "failures.json", "journal.jsonl"):
        assert (tmp_path / "0" / file).read_text() == (tmp_path / "2" / file).read_text()
    failure = json.loads((tmp_path / "2" / "failures.json").read_text())[0]["error"]
    assert "broken.mp4: not a readable media file" in failure and len(failure.splitlines()) == 1


def test_ask_reads_and_tells_as_it_is_asked_to(folder: Path, tiny: tuple[Any, Any]) -> None:
    video = folder / "a.mp4"
    changes: dict[str, Any] = {"max_seconds": 3.0, "cut_long": True, "fps": 1.0}
    options = AskOptions(str(video), QUESTION, system_prompt=SYSTEM, accelerator="cpu", **changes)
    with pytest.warns(UserWarning, match=r"a\.mp4: is longer than max_seconds; its first 3 s are read"):
        full, _ = run_ask(options, Console(file=io.StringIO()))
        assert full.text == plain(tiny, video, SYSTEM, 40, **changes)
    with pytest.raises(InputError, match=r"^system_prompt: is blank"):
        AskOptions(str(video), QUESTION, system_prompt=" ")
    with pytest.raises(InputError, match=r"^max_frames: 1 is less than 2"):
        AskOptions(str(video), QUESTION, max_frames=1)


def test_precomputed_embeddings_take_no_options_of_reading() -> None:
    with pytest.raises(InputError, match=r"data\.fps: is of no use with precomputed embeddings"):
        EvaluationData(precomputed="clips", fps=1.0).records()
    with pytest.raises(InputError, match=r"data\.max_frames: is of no use with source 'precomputed'"):
        AVDataModule(source="precomputed", precomputed="clips", max_frames=8)


def test_the_plug_in_takes_system_messages_and_limits(folder: Path, tiny: tuple[Any, Any], tmp_path: Path) -> None:
    clip, limit = (ClipRef(folder / "a.mp4"),), Generation(max_new_tokens=8)
    for when in ("context", "prompt"):
        answerer = Answerer(*tiny, KVCompressor("full", when=when), media=MediaOptions(max_frames=4))
        for system in (SYSTEM, None, OTHER):  # a cache is kept of a clip after one system prompt alone
            expected = plain(tiny, folder / "a.mp4", system, 8, max_frames=4)
            assert answerer.answer(clip, [QUESTION], limit, system) == [expected]
    assert answerer.cut == 0
    answerer.answer(clip, [QUESTION], Generation(max_new_tokens=1))
    assert answerer.cut == 1
    video = {"type": "video", "url": str(folder / "a.mp4")}
    user: dict[str, Any] = {"role": "user", "content": [video, {"type": "text", "text": "?"}]}
    store = MediaStore(tmp_path)
    told = read_prompt([{"role": "system", "content": SYSTEM}, user], "task", store)
    assert told == Prompt(clip, "?", SYSTEM) and read_prompt([user], "task", store) == Prompt(clip, "?")
    for messages in ([user, user], [user, {"role": "system", "content": "?"}], [{**user, "role": "system"}, user]):
        with pytest.raises(InputError, match="task: messages"):
            read_prompt(messages, "task", store)


def train(folder: Path, root: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> Any:
    words = [
        *("train.py", "--data.source=folder", f"--data.folder={folder}", f"--trainer.default_root_dir={root}"),
        *("--trainer.max_steps=3", "--trainer.accelerator=cpu", "--data.batch_size=1", "--data.max_new_tokens=4"),
        *("--data.prompts=[Describe the clip.]", "--trainer.enable_progress_bar=false", "--evaluation.clips=0"),
        *("--export.new_tokens=2", "--model.lora_rank=2", "--data.validation_share=0.5", "--data.max_frames=4", *more),
    ]
    monkeypatch.setattr(sys, "argv", words)
    main()
    return KVCompressor.from_pretrained(root / "export").weights


@pytest.mark.parametrize("when", ["context", "prompt"])
def test_workers_give_the_batches_of_a_calibration(folder: Path, tiny: tuple[Any, Any], when: When) -> None:
    """The slow test below trains on them."""
    records = load_benchmark("custom", folder)
    order = [(0, [2, 0]), (1, [1]), (2, [0, 1])]  # clips a, b, the broken one, and a with a system prompt
    good = [record for record in records if record.video.name != "broken.mp4"]
    batches = [
        list(ClipLoader(ClipDataset("train", good, tiny[1], when), order, ClipCache(), workers)) for workers in (0, 2)
    ]
    for one, other in zip(*batches, strict=True):
        assert one.number == other.number and torch.equal(one.questions.ids, other.questions.ids)
        assert one.inputs.keys() == other.inputs.keys() and one.clips == other.clips and one.every == other.every
        for name, value in one.inputs.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.inputs[name])), name
    broken = ClipDataset("train", records, tiny[1], when)
    for workers in (0, 2):
        with pytest.raises(InputError, match=r"broken\.mp4: not a readable media file") as caught:
            list(ClipLoader(broken, [(0, [0]), (0, [2])], ClipCache(), workers))
        assert len(str(caught.value).splitlines()) == 1 and str(caught.value.source).endswith("broken.mp4")


@pytest.mark.slow
def test_a_calibration_is_the_same_with_worker_processes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4", "d.mp4"):
        shutil.copy(folder / f"{'ab'[ord(name[0]) % 2]}.mp4", videos / name)
    assert 0 < len(hold_out(videos, list_videos(videos), 0.5)[1]) < 4
    for keep in ("nothing", "prefill"):
        none, two = (
            train(
                videos, tmp_path / f"{keep}{count}", monkeypatch, f"--data.num_workers={count}", f"--data.cache={keep}"
            )
            for count in (0, 2)
        )
        for name, tensor in none.state_dict().items():
            assert torch.equal(tensor, two.state_dict()[name]), name
    assert (tmp_path / "nothing0" / "answers.json").read_text() == (tmp_path / "nothing2" / "answers.json").read_text()
    (train_video, *_), _ = hold_out(videos, list_videos(videos), 0.5)
    train_video.write_text("no media")
    with pytest.raises(InputError, match=r"\.mp4: not a readable media file") as caught:
        train(videos, tmp_path / "broken", monkeypatch, "--data.num_workers=2")
    assert len(str(caught.value).splitlines()) == 1
