"""Prompts and answers of an evaluation framework, against plain `generate` inside the compressor's context."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from acckv import KVCompressor
from acckv.config import CompressionConfig
from acckv.data.encoding import encode
from acckv.data.media import read_media
from acckv.data.synthetic.clips import video_folder, write_clips
from acckv.errors import InputError
from acckv.models import load_model
from acckv.plugins.answerer import Answerer, Clip, build_compressor
from acckv.plugins.media_store import MediaStore
from acckv.plugins.requests import ClipRef, Generation, Prompt, read_prompt
from acckv.policies import make_policy
from tests.paths import FIXTURES

QUESTIONS = ["What colour was the circle?", "Which sound came after the beep?", "List the shapes in order."]
GREEDY = Generation(max_new_tokens=8)
COMPRESSORS = [
    KVCompressor("full"),
    KVCompressor("keydiff", ratio=0.2),
    KVCompressor("snapkv", ratio=0.2, when="prompt"),
]


def video(**part: Any) -> dict[str, Any]:
    return {"type": "video", "url": "clip.mp4", **part}


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def user(*content: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Clip]:
    root = tmp_path_factory.mktemp("clips")
    file = write_clips(root, "test", 2, workers=1, progress=False)
    return [(ClipRef(path),) for path in sorted(video_folder(file).iterdir())]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("tiny")


# ------------------------------------------------------------------ requests


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        (user(video(), text("who?")), Prompt((ClipRef(Path("clip.mp4")),), "who?")),
        (user(video(), text("who "), text("when?")), Prompt((ClipRef(Path("clip.mp4")),), "who when?")),
        (user(text("who?")), Prompt((), "who?")),
        (
            user({"type": "image", "url": "a.png"}, {"type": "audio", "url": {"path": "b.mp3"}}, video(), text("who?")),
            Prompt((ClipRef(Path("a.png")), ClipRef(Path("b.mp3")), ClipRef(Path("clip.mp4"))), "who?"),
        ),
        ([{"role": "user", "content": "who?"}], Prompt((), "who?")),
        (user(video(start_time=2, end_time=4.5), text("")), Prompt((ClipRef(Path("clip.mp4"), 2.0, 4.5),), "")),
        (user(video(url="file:///a/b.mp4")), Prompt((ClipRef(Path("/a/b.mp4")),), "")),
        (
            user(video(url={"path": "b.mp4", "video_start": 1, "video_end": None})),
            Prompt((ClipRef(Path("b.mp4"), 1.0, None),), ""),
        ),
    ],
)
def test_messages_make_a_prompt(messages: list[dict[str, Any]], prompt: Prompt, tmp_path: Path) -> None:
    assert read_prompt(messages, "task", MediaStore(tmp_path)) == prompt
    assert not list(tmp_path.iterdir())


def test_pictures_and_sounds_in_memory_become_files(tmp_path: Path) -> None:
    store = MediaStore(tmp_path / "store")
    colours = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    wave = np.sin(np.arange(8000) / 10).astype(np.float32)
    both = np.stack([wave, 0 * wave])
    forms = [
        {"array": wave / 2, "sampling_rate": 16_000, "path": None},
        {"array": both, "sampling_rate": 16_000},
        SimpleNamespace(get_all_samples=lambda: SimpleNamespace(data=torch.from_numpy(both), sample_rate=16_000)),
    ]
    prompts = [
        read_prompt(user({"type": "audio", "url": form}, image(colours), text("what?")), "task", store)
        for form in forms
    ]
    assert prompts[0] == prompts[1] == prompts[2]  # named by what they hold
    sound, picture = prompts[0].media
    assert {path.name for path in store.folder.iterdir()} == {sound.path.name, picture.path.name}
    assert np.array_equal(np.asarray(PIL.Image.open(picture.path)), colours)
    heard = read_media(sound.path)
    assert heard.frames is None and heard.audio is not None
    assert heard.audio.numpy() == pytest.approx(wave / 2, abs=1e-6)


def image(colours: np.ndarray) -> dict[str, Any]:
    return {"type": "image", "url": PIL.Image.fromarray(colours)}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([*user(text("who?")), {"role": "assistant", "content": "me"}], "not the turns user, assistant"),
        ([], "one user turn"),
        (user(text("who?"), video()), "text before a part of type 'video'"),
        (user(video(), text("who?"), {"type": "image", "url": "a.png"}), "text before a part of type 'image'"),
        (user({"type": "tool", "url": "a.wav"}), "type 'tool' is not served"),
        (user(video(url=3)), "type 'video' is given as int, not as a path"),
    ],
)
def test_other_messages_are_refused(messages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(InputError, match=f"task: messages: .*{message}"):
        read_prompt(messages, "task", MediaStore(Path("store")))


@pytest.mark.parametrize(
    ("given", "generation"),
    [
        ({}, Generation()),
        ({"max_new_tokens": 4, "num_beams": 3}, Generation(max_new_tokens=4, num_beams=3)),
        ({"temperature": 0, "top_p": None, "do_sample": True}, Generation(temperature=0)),
        ({"temperature": 0.7}, Generation(do_sample=True, temperature=0.7)),
        ({"temperature": 0.7, "do_sample": False}, Generation(temperature=0.7)),
        ({"do_sample": True, "top_k": 5}, Generation(do_sample=True, top_k=5)),
        ({"until": "\n"}, Generation(until=("\n",))),
        ({"until": ["a", ""]}, Generation(until=("a",))),
        ({"until": None}, Generation()),
    ],
)
def test_generation_options(given: dict[str, Any], generation: Generation) -> None:
    assert Generation.read(given) == (generation, set())


def test_generation_options_that_mean_nothing() -> None:
    assert Generation.read({"max_new_tokens": 3, "image_aspect_ratio": "pad"})[1] == {"image_aspect_ratio"}
    for name in ("max_new_tokens", "num_beams"):
        for value in (0, 1.5, True, "4"):
            with pytest.raises(InputError, match=f"gen_kwargs: {name}"):
                Generation.read({name: value})


def test_an_answer_ends_at_the_first_of_the_texts_that_end_it() -> None:
    generation = Generation(until=("stop", ","))
    assert generation.cut("\n a ring, then stop") == "a ring"
    assert generation.cut("a ring stop, then") == "a ring"
    assert generation.cut("a ring ") == "a ring"
    assert generation.cut("stop") == ""


# ------------------------------------------------------------------ answers


def plain(tiny: tuple[Any, Any], compressor: KVCompressor, clip: Clip, question: str, **options: Any) -> Any:
    """`generate` as the README shows it: the new tokens' text, their ids, and the logits before each."""
    model, processor = tiny
    inputs = encode(processor, [read_media(clip[0].path)], [question])
    with compressor(model, processor):
        out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **options)
    ids = out.sequences[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip(), ids, torch.cat(out.logits)


@pytest.mark.parametrize(
    "compressor", COMPRESSORS[1:], ids=lambda compressor: f"{compressor.name}-{compressor.config.when}"
)
def test_answers_are_those_of_generate(tiny: tuple[Any, Any], clips: list[Clip], compressor: KVCompressor) -> None:
    answerer = Answerer(*tiny, compressor)
    expected = [
        [plain(tiny, compressor, clip, question, max_new_tokens=8)[0] for question in QUESTIONS] for clip in clips
    ]
    assert [answerer.answer(clip, QUESTIONS, GREEDY) for clip in clips] == expected
    assert [answerer.answer(clips[0], [question], GREEDY)[0] for question in QUESTIONS] == expected[0]
    assert len({answer for answers in expected for answer in answers}) > 2
    assert answerer.sizes.ratio == pytest.approx(compressor.config.ratio, abs=0.01)


def test_a_clip_is_compressed_once(tiny: tuple[Any, Any], clips: list[Clip]) -> None:
    answerer = Answerer(*tiny, COMPRESSORS[1])
    answerer.answer(clips[0], QUESTIONS[:2], GREEDY)
    once = answerer.sizes
    answerer.answer(clips[0], QUESTIONS[2:], GREEDY)
    answerer.losses(clips[0], QUESTIONS[0], ["red"])
    assert answerer.sizes == once and once.prompts == 1 and sum(once.full) > 0
    answerer.answer(clips[1], QUESTIONS, GREEDY)
    assert answerer.sizes.prompts == 2 and answerer.sizes.full == (once + once).full


def test_beams_and_samples_are_those_of_generate(tiny: tuple[Any, Any], clips: list[Clip]) -> None:
    compressor, question = COMPRESSORS[1], QUESTIONS[2]
    answerer = Answerer(*tiny, compressor)
    beams = Generation(max_new_tokens=8, num_beams=3)
    assert (
        answerer.answer(clips[0], [question], beams)[0]
        == plain(tiny, compressor, clips[0], question, max_new_tokens=8, num_beams=3, do_sample=False)[0]
    )
    hot = Generation(max_new_tokens=8, do_sample=True, temperature=3.0)
    torch.manual_seed(0)
    sampled = answerer.answer(clips[0], [question], hot)[0]
    torch.manual_seed(0)
    assert sampled == plain(tiny, compressor, clips[0], question, max_new_tokens=8, do_sample=True, temperature=3.0)[0]
    assert sampled != answerer.answer(clips[0], [question], GREEDY)[0]


@pytest.mark.parametrize(
    "compressor", COMPRESSORS[1:], ids=lambda compressor: f"{compressor.name}-{compressor.config.when}"
)
def test_losses_are_those_of_generated_tokens(
    tiny: tuple[Any, Any], clips: list[Clip], compressor: KVCompressor
) -> None:
    answerer = Answerer(*tiny, compressor)
    answer, ids, logits = plain(tiny, compressor, clips[0], QUESTIONS[2], max_new_tokens=5)
    loss = float(torch.nn.functional.cross_entropy(logits, ids))
    found = answerer.losses(clips[0], QUESTIONS[2], ["red", answer, "ring low"])
    assert found[1][0] == pytest.approx(loss, abs=1e-4) and found[1][1]
    assert found[0][0] > loss and not found[0][1] and not found[2][1]
    for given, (loss, _) in zip(["red", answer, "ring low"], found, strict=True):
        assert answerer.losses(clips[0], QUESTIONS[2], [given])[0][0] == pytest.approx(loss, abs=1e-4)


def test_text_alone_is_answered_by_the_plain_model(tiny: tuple[Any, Any]) -> None:
    model, processor = tiny
    answerer = Answerer(model, processor, COMPRESSORS[1])
    prompt = processor.apply_chat_template(user(text(QUESTIONS[2])), add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[prompt], return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    expected = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert answerer.answer((), [QUESTIONS[2]], GREEDY) == [expected]
    assert answerer.losses((), QUESTIONS[2], [expected, "low"])[0][1]
    assert answerer.sizes.ratio == 1.0


def test_sound_can_be_left_out(tiny: tuple[Any, Any], clips: list[Clip]) -> None:
    heard, mute = (Answerer(*tiny, COMPRESSORS[0], sound=sound) for sound in (True, False))
    heard.answer(clips[0], QUESTIONS, GREEDY)
    answers = mute.answer(clips[0], QUESTIONS, GREEDY)
    clip = replace(read_media(clips[0][0].path), audio=None)
    model, processor = tiny
    for question, answer in zip(QUESTIONS, answers, strict=True):
        inputs = encode(processor, [clip], [question])
        ids = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
        assert answer == processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert sum(mute.sizes.full) < sum(heard.sizes.full)


@pytest.mark.parametrize(
    "compressor", COMPRESSORS[1:], ids=lambda compressor: f"{compressor.name}-{compressor.config.when}"
)
def test_a_picture_and_a_sound_are_one_clip(tiny: tuple[Any, Any], compressor: KVCompressor) -> None:
    folder = FIXTURES / "omnibench/mm_data"
    picture, sound = folder / "image/1_24.png", folder / "audio/1_24.mp3"
    model, processor = tiny
    inputs = encode(processor, [read_media(picture, audio=sound)], [QUESTIONS[2]])
    with compressor(model, processor):
        ids = model.generate(**inputs, max_new_tokens=8)[:, inputs["input_ids"].shape[1] :]
    expected = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    for sound_of_videos in (True, False):  # this sound is not a video's
        answerer = Answerer(*tiny, compressor, sound=sound_of_videos)
        assert answerer.answer((ClipRef(sound), ClipRef(picture)), [QUESTIONS[2]], GREEDY) == [expected]


# ------------------------------------------------------------------ the compressor's options


def test_the_compressor_that_is_named(tmp_path: Path) -> None:
    assert build_compressor().planners.keeps_all() and build_compressor(when="prompt").config.when == "prompt"
    named = build_compressor(policy="keydiff", ratio=0.1, when="prompt", budget=None)
    assert (named.name, named.config) == ("keydiff", CompressionConfig(0.1, when="prompt"))
    named.save_pretrained(tmp_path / "export")
    options = {"class_path": "snapkv", "init_args": {"window_size": 64}}
    for given in (options, json.dumps(options), "{class_path: snapkv, init_args: {window_size: 64}}"):
        assert build_compressor(policy=given).policy == make_policy(options)
    loaded = build_compressor(str(tmp_path / "export"), ratio=0.3)
    assert loaded.config == replace(named.config, ratio=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"export": "folder", "policy": "keydiff"}, "policy: leave it out"),
        ({"ratio": 0.1}, "ratio: needs a compressor"),
        ({"budget": 16, "when": "context"}, "budget: needs a compressor"),
        ({"policy": "nonsense"}, "policy: 'nonsense' is not one of"),
        ({"policy": "{class_path: snapkv"}, "policy: .* is no YAML"),
        ({"policy": "keydiff", "ratio": 2.0}, "ratio: 2.0 is not a number"),
        ({"when": "later"}, "when: 'later' is not one of"),
    ],
)
def test_bad_options_of_a_compressor(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_compressor(**options)
