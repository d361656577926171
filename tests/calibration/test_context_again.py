"""The context fed in again: its windows, its loss against plain full attention, and calibrations without questions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from acckv import InputError, KVCompressor
from acckv.data.batching import pack_questions
from acckv.data.synthetic.clips import video_folder, write_clips
from acckv.method.modality import ModalityMap
from acckv.models.batching import DecoderInputs
from acckv.runtime.context_reconstruction import REPEAT_PROMPT, drawn_window
from lightning_modules.calibration.config import CalibrationConfig
from lightning_modules.calibration.losses import outputs_of
from lightning_modules.calibration.random_text import QUESTIONS
from lightning_modules.calibration.schedule import Schedule
from tests.calibration.runs import clip_data, configured, fit, trained
from tests.cli.test_configs import run_script
from tests.families import FAMILIES, Tokenizer
from tests.paths import ROOT
from tests.reference import Reference

TOKENS = 40
OPTIONS: dict[str, Any] = {"lora_rank": 0, "repeated_tokens": TOKENS, "repeated_words": True}


def test_every_token_is_fed_in_equally_often() -> None:
    """Over all places; a window never leaves what lies between the first media token and the last."""
    labels = ModalityMap(torch.tensor([[3, 3, 0, 1, 1, 0, 2, 2, 1, 0], [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]]))
    for tokens in (1, 3, 20):
        places = 6 + tokens - 1  # of the first row
        seen = torch.zeros(10, dtype=torch.long)
        for number in range(places):
            place = (number + 0.5) / places
            first, second = drawn_window(labels, [place, place], tokens)
            kept = first[first >= 0]
            assert len(kept) <= tokens and kept.tolist() == list(range(int(kept[0]), int(kept[-1]) + 1))
            assert second[second >= 0].tolist() == [1], "a row is as it is alone"
            seen[kept] += 1
        assert seen.tolist() == [0, 0, 0, *[tokens] * 6, 0]


def test_steps_of_each_kind() -> None:
    def kinds(**options: Any) -> list[bool]:
        schedule = Schedule(CalibrationConfig(**options), 10)
        return [schedule.repeats_context(step) for step in range(10)]

    assert not any(kinds()) and all(kinds(calibrate_for="general"))
    assert kinds(calibrate_for="mixed") == [False, True] * 5
    assert sum(kinds(calibrate_for="mixed", mixed_share=0.3)) == 3
    with pytest.raises(InputError, match=r"model\.mixed_share: 1\.0 is not above 0 and below 1"):
        CalibrationConfig(mixed_share=1.0)
    with pytest.raises(InputError, match=r"model\.repeated_words: is off, and features are matched alone"):
        CalibrationConfig(calibrate_for="mixed", feature_loss=None)
    with pytest.raises(InputError, match=r"model\.repeated_tokens: 0 is not at least 1"):
        CalibrationConfig(repeated_tokens=0)


def test_the_loss_is_that_of_one_long_sequence(cache: Path) -> None:
    """The model reads context, repeat prompt and window at once, without a session; the student with entries hidden."""
    data = clip_data(cache)
    data.setup()
    batch = data.datasets["validation"].batch(3, [0, 1])
    with configured(**OPTIONS) as module:
        prefill, questions, _ = module.teacher.targets(batch, TOKENS)
        plans = module.live.plan(prefill, 0.1)
        done = module.distill(batch, 0.1, None, repeats_context=True)
        context, layers = prefill.embedded, len(plans)
        ids = module.processor.tokenizer(REPEAT_PROMPT, add_special_tokens=False)["input_ids"]

    reference, kls, shares = Reference(module.model), torch.zeros(2, TOKENS), torch.zeros(layers, 2, 2)
    for row in range(2):
        media = context.labels.media[row].nonzero().flatten()
        first, last = int(media[0]), int(media[-1]) + 1
        start = first - TOKENS + 1 + int(batch.places[row] * (last - first + TOKENS - 1))
        window = slice(max(start, first), min(start + TOKENS, last))
        before, block = context.position_ids[..., row, :], context.position_ids[..., row, window]
        prompt = torch.arange(len(ids)).expand(3, -1) + int(before[..., -1].max()) + 1
        positions = torch.cat([before, prompt, block - block.min() + int(prompt.max()) + 1], dim=-1)
        text = module.model.get_input_embeddings()(torch.tensor(ids))
        embeds = torch.cat([context.embeds[row], text, context.embeds[row, window]])
        length, count = context.embeds.shape[1], window.stop - window.start
        read: list[tuple[Tensor, list[Tensor]]] = []
        for evictions in ({}, {n: [(length, plan.log_gates[row] < -1)] for n, plan in enumerate(plans)}):
            reference.evictions = evictions
            with (
                reference.hiding() as model,
                outputs_of([each.self_attn for each in model.model.language_model.layers]) as seen,
            ):
                out = model(inputs_embeds=embeds[None], position_ids=positions[:, None], use_cache=False)
            read.append((out.logits[0, -count:].double().softmax(-1), [each[0, -count:].double() for each in seen]))
        (teacher, expected), (student, found) = read
        kls[row, :count] = (teacher * (teacher / student).log()).sum(-1)
        for layer in range(layers):
            shares[layer, 0, row] = (found[layer] - expected[layer]).square().sum()
            shares[layer, 1, row] = expected[layer].square().sum()
    assert len(questions.counted) == int((kls != 0).sum()) and float(done.weight) == len(questions.counted)
    kl = float(kls.sum() / done.weight)
    assert kl > 0.05 and float(done.kl) == pytest.approx(kl, rel=1e-3)
    features = float((shares[:, 0].sum(1) / shares[:, 1].sum(1)).mean())
    assert float(done.loss - done.kl) == pytest.approx(features, rel=1e-3)


def test_nothing_is_lost_where_nothing_is_evicted(cache: Path) -> None:
    data = clip_data(cache)
    data.setup()
    batch = data.datasets["validation"].batch(3, [0, 1])
    with configured(**OPTIONS) as module:
        with torch.no_grad():
            whole, planned = (module.distill(batch, ratio, None, repeats_context=True) for ratio in (1.0, 0.9999))
        again = module.distill(batch, 0.1, 0.3, repeats_context=True)
        again.loss.backward()
        module.options = replace(module.options, repeated_words=False)
        features = module.distill(batch, 0.1, 0.3, repeats_context=True)
    assert whole.plans is None and abs(float(whole.kl)) < 1e-5
    assert planned.plans is not None and abs(float(planned.kl)) < 1e-2
    assert float(again.kl) > 0.05 and float(features.loss) == pytest.approx(float(again.loss - again.kl), rel=1e-4)
    gradient = module.weights.saliency.grad
    assert gradient is not None and bool((gradient.abs().amax((2, 3)) > 0).all()), "of every layer and modality"


@pytest.mark.parametrize("name", ["qwen3_omni_moe", "gemma4", "videollama2"])
def test_every_kind_of_decoder_reads_its_context_again(name: str) -> None:
    """Embeddings with deepstack, with inputs by layer, and plain ones: as one forward of the decoder."""
    family = FAMILIES[name]
    model = family.build()
    with KVCompressor("keydiff")(model, Tokenizer()) as session, torch.no_grad():
        prefill = session.prefill(queries="none", **family.context(model))
        tokens, prompt = session.repetition(prefill, [0.6], 9)
        assert prompt == len(REPEAT_PROMPT.split()) and 1 <= tokens.embeds.shape[1] - prompt <= 9
        length = prefill.labels.labels.shape[1]
        mask = torch.ones(1, length + tokens.embeds.shape[1], dtype=torch.long)
        with outputs_of(list(session.adapter.decoder.layers)) as found:
            logits = session.simulate(prefill, None, embedded=tokens, attention_mask=mask)
        with outputs_of(list(session.adapter.decoder.layers)) as expected:
            session.prefill(prefill.embedded.followed_by(tokens), queries="none")
    assert logits.shape[1] == tokens.embeds.shape[1] and len(found) == len(expected) > 0
    for mine, whole in zip(found, expected, strict=True):
        assert torch.allclose(mine, whole[:, length:], atol=1e-4)


def test_tokens_of_both_kinds_are_joined() -> None:
    """An argument that only one of both has is zero for the other."""
    labels = ModalityMap(torch.zeros(1, 2, dtype=torch.long))
    one = DecoderInputs(torch.ones(1, 2, 3), torch.tensor([[0, 1]]), labels, {"deep": torch.ones(1, 2, 4)})
    other = DecoderInputs(torch.zeros(1, 2, 3), torch.tensor([[2, 3]]), labels)
    for joined, expected in ((one.followed_by(other), [1, 1, 0, 0]), (other.followed_by(one), [0, 0, 1, 1])):
        assert joined.others["deep"][0, :, 0].tolist() == joined.embeds[0, :, 0].tolist() == expected


def test_random_words_are_asked_in_place_of_questions_or_among_them(cache: Path) -> None:
    """Of every training clip the same ones at each visit; all their tokens count. Validation asks the data's."""
    asked = {}
    for objective in ("task", "general", "mixed"):
        data = clip_data(cache, calibrate_for=objective, general_by="random_text", questions_per_clip=4)
        data.setup()
        first, again = (data.datasets["train"].batch(number, [0, 1]) for number in (0, 9))
        assert first.every == again.every and all(len(drawn) == 4 for drawn in first.drawn)
        asked[objective] = first.every[0]
        assert data.datasets["validation"].batch(0, [0]).every[0][0].first > 0
    assert asked["mixed"] == asked["task"] + asked["general"] and len(asked["general"]) == QUESTIONS
    assert len({question.ids for question in asked["general"]}) == QUESTIONS
    packed = pack_questions([asked["general"][:2]])
    assert int((packed.weight > 0).sum()) == sum(len(question.ids) - 1 for question in asked["general"][:2])
    assert CalibrationConfig(calibrate_for="general", general_by="random_text").repeated_share == 0
    with pytest.raises(InputError, match=r"model\.general_by: is 'random_text', which is asked after the compression"):
        clip_data(cache, when="prompt", general_by="random_text")


def test_a_mixed_run_goes_on_as_if_it_had_never_stopped(cache: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibrate_for": "mixed", "repeated_tokens": 8, "lora_rank": 0, "warmup": 1}
    whole = fit(cache, tmp_path, **options)
    again = fit(cache, tmp_path / "again", resume=tmp_path / "step-step=2.ckpt", **options)
    assert whole.schedule.repeats_context(3) and float(whole.last_step["kl"]) > 0
    expected, found = trained(whole), trained(again)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_folder_is_calibrated_on_without_a_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is asked about the training clips, and the card says so."""
    videos = video_folder(
        write_clips(tmp_path, "test", 4, slots=4, both=1, video_only=1, audio_only=1, workers=1, progress=False)
    )
    run = tmp_path / "run"
    options = (
        *("--config", ROOT / "configs" / "folder.yaml", f"--data.folder={videos}", "--model.calibrate_for=general"),
        *(f"--trainer.default_root_dir={run}", "--data.batch_size=2", "--data.max_new_tokens=4"),
        *("--data.validation_share=0.5", "--trainer.max_steps=2", "--trainer.val_check_interval=2"),
        *("--export.new_tokens=2", "--evaluation.clips=0", "--model.lora_rank=2", "--trainer.log_every_n_steps=1"),
    )
    assert run_script(monkeypatch, "train.py", *options) == 0
    card = (run / "export" / "README.md").read_text()
    assert "`calibrate_for: general`" in card and "| kinds of questions | none |" in card
    assert "| questions outside of these | none: nothing was asked |" in card
    assert KVCompressor.from_pretrained(run / "export").asked is None
    record = json.loads((run / "export" / "config.json").read_text())["calibration"]
    answered = json.loads((run / "answers.json").read_text())["clips"]
    assert record["questions"] == 0 and record["clips"] + len(answered) == 4 and record["clips"] > 0 < len(answered)
    logged = (run / "logs" / "version_0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"kl", "val/kl@0.05", "val/context_kl@0.05"} <= {*logged}
