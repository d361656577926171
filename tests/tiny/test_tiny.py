"""The tiny AV-LLM: its checkpoint, its processor, and the training that made it."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.models.qwen2_5_omni.modeling_qwen2_5_omni as qwen
from transformers import AutoModelForMultimodalLM, AutoProcessor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from acckv import KVCompressor
from acckv.benchmarks.music_avqa_questions import load_music_avqa
from acckv.data.encoding import encode, encode_context, question_suffix
from acckv.data.media import read_media
from acckv.data.synthetic.clips import video_folder, write_clips
from acckv.data.synthetic.events import COLOURS, DESCRIPTION_TYPES, PITCHES, SHAPES, SINGLE_TYPES, TIMBRES, draw_script
from acckv.data.synthetic.render import render_audio, render_frames, write_mp4
from acckv.evaluation.answering import answer_questions
from acckv.metrics.words import word_accuracy
from acckv.models import load_model
from acckv.models.clips import Media
from acckv.models.loading import TINY_MODEL
from acckv.models.qwen_omni import timing
from acckv.tiny import pretrain as pretraining
from acckv.tiny.bank import NOTHING, SlotBank, load_bank
from acckv.tiny.build import build_model, build_processor, save, vocabulary
from acckv.tiny.encoders import COVERED, warm_up
from acckv.tiny.fast_training import fast_training
from acckv.tiny.packing import KINDS, PackedLayout, Stage
from acckv.tiny.pretrain import Pretraining, PretrainSettings
from tests.evaluation.runs import generated

SMALL = Stage(slots=3, both=2, video_only=0, audio_only=1, steps=2, batch=2)


@pytest.fixture(scope="module")
def bank() -> SlotBank:
    """Every event twice, with random features."""
    rng = np.random.default_rng(0)
    events = [(s, c) for s in range(6) for c in range(6)] * 2
    labels = [(s, c, k % 4, k % 6, k % 4 if k % 2 else (k + 1) % 4) for k, (s, c) in enumerate(events)]
    labels += [(NOTHING, NOTHING, NOTHING, t, p) for t in range(6) for p in range(4)]
    labels += [(NOTHING,) * 5] * 3
    count = len(labels)
    pixels = torch.from_numpy(rng.standard_normal((count, 36, 1176), dtype=np.float32)).half()
    mel = torch.from_numpy(rng.standard_normal((count, 32, 32), dtype=np.float32)).half()
    return SlotBank(pixels, mel, np.array(labels))


def test_vocabulary_covers_everything_that_is_said() -> None:
    words = vocabulary()
    assert len(set(words.values())) == len(words) <= 96
    assert {*COLOURS, *SHAPES, *TIMBRES, *PITCHES} <= words.keys()


def test_checkpoint_and_processor_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model, processor = build_model(), build_processor()
    save(model, tmp_path)
    again = AutoModelForMultimodalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    for (name, first), (_, second) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(first, second), name
    assert again.generation_config.eos_token_id == vocabulary()["<|im_end|>"]
    assert again.generation_config.do_sample is False
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is type(processor) and timing(loaded) == (8, 1.0)
    assert loaded.tokenizer.get_vocab() == vocabulary()
    assert loaded.tokenizer.padding_side == "left"
    text = "<|im_start|>user<|VIDEO|>What colour was the circle?<|im_end|>"
    ids = loaded.tokenizer(text)["input_ids"]
    assert ids == processor.tokenizer(text)["input_ids"] and len(ids) == 10
    assert loaded.tokenizer.decode(ids, skip_special_tokens=True) == "user what colour was the circle ?"


def test_shipped_checkpoint_is_small_and_complete() -> None:
    assert sum(path.stat().st_size for path in TINY_MODEL.iterdir()) <= 12e6
    model, processor = load_model("tiny")
    assert not model.training and 1.5e6 < sum(p.numel() for p in model.parameters()) < 1.7e6
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in model.parameters())
    assert processor.tokenizer.get_vocab() == vocabulary()


def _answers(clip: Media, questions: list[str], max_new_tokens: int) -> list[str]:
    """Greedy answers of the shipped checkpoint, each from a copy of the clip's full cache."""
    model, processor = load_model("tiny")
    with KVCompressor("full")(model, processor) as session:
        cache = session.compress(**encode_context(processor, clip))
        (answers,) = answer_questions(session, processor, cache, [questions], max_new_tokens)
    return [answer.text for answer in answers]


def _accuracy(file: Path) -> dict[str, tuple[float, int]]:
    """By protocol: mean accuracy of the shipped checkpoint, and number of questions."""
    scores: dict[str, list[float]] = {"word": [], "description": []}
    for video, group in groupby(load_music_avqa(file, video_folder(file)), key=lambda record: record.video):
        records = list(group)
        answers = _answers(read_media(video), [record.question for record in records], 64)
        for record, answer in zip(records, answers, strict=True):
            scores[record.protocol].append(word_accuracy(answer, record.answer))
    return {protocol: (sum(own) / len(own), len(own)) for protocol, own in scores.items()}


def test_shipped_checkpoint_answers_about_clips_it_has_not_seen(tmp_path: Path) -> None:
    file = write_clips(tmp_path, "test", 4, seed=77, questions_per_clip=8, workers=1, progress=False)
    accuracy = _accuracy(file)
    assert accuracy["word"][0] >= 0.9 and accuracy["word"][1] == 32
    assert accuracy["description"][0] >= 0.95 and accuracy["description"][1] == 12


def test_questions_on_one_prefill_get_the_answers_of_prompts_of_their_own(tmp_path: Path) -> None:
    file = write_clips(tmp_path, "test", 1, seed=78, workers=1, progress=False)
    records = load_music_avqa(file, video_folder(file))[::3]
    questions, clip = [record.question for record in records], read_media(records[0].video)
    model, processor = load_model("tiny")
    together = _answers(clip, questions, 5)
    assert len({len(question_suffix(processor, question)) for question in questions}) > 1
    for record, reply in zip(records, together, strict=True):
        assert generated(model, processor, record, 5) == reply


def test_shipped_checkpoint_needs_the_media(tmp_path: Path) -> None:
    """Blank pictures and silence leave chance: the answers are not in the questions."""
    file = write_clips(tmp_path, "test", 4, seed=77, sound="silence", picture="blank", workers=1, progress=False)
    assert _accuracy(file)["word"][0] < 0.5


def test_a_packed_turn_equals_its_own_prompt(bank: SlotBank) -> None:
    torch.manual_seed(0)
    model, processor = build_model().eval(), build_processor()
    layout = PackedLayout(model, processor, SMALL, turns_a_type=1)
    batch = layout.batch(bank, np.random.default_rng(3), "train", 2)
    with torch.no_grad():
        with fast_training(len(layout.prefix)):
            packed = model(**batch.inputs).logits
        media = {k: v for k, v in batch.inputs.items() if k not in ("input_ids", "attention_mask", "position_ids")}
        start = len(layout.prefix)
        for length in layout.lengths:
            turn = batch.inputs["input_ids"][:, start : start + length]
            ids = torch.cat([batch.inputs["input_ids"][:, : len(layout.prefix)], turn], 1)
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids), **media).logits[:, -length:]
            torch.testing.assert_close(packed[:, start : start + length], alone, atol=2e-5, rtol=0)
            start += length
    assert start == layout.tokens


def test_a_packed_row_asks_what_the_chat_template_asks(bank: SlotBank) -> None:
    model, processor = build_model(), build_processor()
    layout = PackedLayout(model, processor, SMALL)
    batch = layout.batch(bank, np.random.default_rng(4), "validation", 1)
    kinds = [KINDS[k] for k in batch.kinds[0][batch.kinds[0] >= 0].tolist()]
    assert [kinds.count(kind) for kind in SINGLE_TYPES] == [2] * 8
    words = {kind: 2 * n + 1 for kind, n in zip(DESCRIPTION_TYPES[:2], (2, 3), strict=True)}
    assert {kind: kinds.count(kind) for kind in words} == words
    script = draw_script(np.random.default_rng(4), "validation", 3, 2, 0, 1)
    slot = sorted(script.shapes)[0]
    suffix = question_suffix(processor, f"What colour was the {script.shape(slot)}?").tolist()
    row, start = batch.inputs["input_ids"][0].tolist(), len(layout.prefix)
    asked = [row[start : start + len(suffix)], row[start + 10 : start + 10 + len(suffix)]]
    if suffix in asked:
        place = start + 10 * asked.index(suffix) + len(suffix) - 1
        assert batch.targets[0, place] == vocabulary()[script.colour(slot)]
        assert batch.targets[0, place + 1] == vocabulary()["<|im_end|>"]
    first, second = sorted(script.shapes)
    labels = batch.slot_labels[0]
    assert labels[first].tolist()[:3] == [*script.shapes[first], 6]
    assert labels[second].tolist()[:3] == [*script.shapes[second], script.shapes[first][0]]
    empty = next(s for s in range(3) if s not in script.shapes)
    assert labels[empty].tolist()[:3] == [6, 6, -100]
    sounds = sorted(script.sounds)
    assert labels[sounds, 3].tolist() == [6, *[script.sounds[s][0] for s in sounds[:-1]]]


def test_fast_training_puts_everything_back(bank: SlotBank) -> None:
    owners: tuple[Any, ...] = (
        qwen.Qwen2_5OmniAudioAttention,
        qwen.Qwen2_5OmniVisionAttention,
        qwen.Qwen2_5_VisionPatchEmbed,
    )
    before = [owner.forward for owner in owners] + [ALL_ATTENTION_FUNCTIONS["sdpa"]]
    with pytest.raises(KeyError), fast_training():
        assert all(owner.forward is not old for owner, old in zip(owners, before, strict=False))
        raise KeyError
    assert [owner.forward for owner in owners] + [ALL_ATTENTION_FUNCTIONS["sdpa"]] == before


def test_objects_cover_four_of_nine_tokens() -> None:
    assert COVERED == {0: [0, 1, 3, 4], 1: [1, 2, 4, 5], 2: [3, 4, 6, 7], 3: [4, 5, 7, 8]}


def test_bank_features_are_those_of_the_whole_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots cut from a clip's features and put back together are the features of that clip."""
    from acckv.tiny import bank as module

    monkeypatch.setattr(module, "CLIPS_A_PART", 1)
    module._render_part(tmp_path / "slots-9-0.npz", 9, 0)
    bank = load_bank(tmp_path, 1, 9)
    assert bank.pixels.shape == (16, 36, 1176) and bank.mel.shape == (16, 32, 32) and bank.labels.shape == (16, 5)
    assert (bank.labels[:, 0] != NOTHING).sum() == (bank.labels[:, 3] != NOTHING).sum() == 10
    rng = np.random.default_rng([9, 0])
    script = module._dense_script(rng)
    video = tmp_path / "clip.mp4"
    write_mp4(video, render_frames(script, rng), render_audio(script, rng))
    inputs = encode(build_processor(), [read_media(video)], ["Describe the clip."])
    torch.testing.assert_close(bank.pixels.float().flatten(0, 1), inputs["pixel_values_videos"], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(
        bank.mel.float().permute(1, 0, 2).flatten(1), inputs["input_features"][0], atol=2e-3, rtol=1e-3
    )


def test_encoder_warm_up_learns(bank: SlotBank) -> None:
    """On a bank that it may learn by heart, the encoders name what a slot holds."""
    torch.manual_seed(0)
    model = build_model()
    few = SlotBank(bank.pixels[:6], bank.mel[:6], bank.labels[:6])
    accuracy = warm_up(model, few, few, 70, 0, lambda _: None, slots_a_step=6)
    assert accuracy["timbre"] > 0.9 and accuracy["pitch"] > 0.9


def test_a_stopped_run_resumes_to_the_same_weights(
    bank: SlotBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining, "load_bank", lambda *_: bank)
    settings = PretrainSettings(
        output=tmp_path / "whole",
        encoder_steps=1,
        evaluate_every=1,
        evaluation_clips=1,
        warm_up_steps=2,
        stages=(SMALL, SMALL),
    )
    settings.output.mkdir()
    whole = Pretraining(settings)
    whole.run(resume=False)
    assert whole.progress.step == 4 and (settings.output / "model" / "model.safetensors").is_file()

    parted = replace(settings, output=tmp_path / "parted")
    parted.output.mkdir()
    first = Pretraining(parted)
    monkeypatch.setattr(first, "_in_time", lambda: first.progress.step < 3)
    first.run(resume=False)
    assert first.progress.step == 3
    second = Pretraining(parted)
    second.run(resume=True)
    assert second.progress.step == 4
    for (name, a), (_, b) in zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    state = torch.load(parted.output / "checkpoint.pt", weights_only=True)
    assert state["progress"]["step"] == 4


def test_command_line_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        pretraining.main(["--help"])
    assert stopped.value.code == 0
    assert "tiny" in capsys.readouterr().out
