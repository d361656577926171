"""The teacher is the student at ratio 1; second visits, packed questions and padding change no target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from acckv.data.batching import Question, pack_questions
from acckv.method.modality import ModalityMap
from acckv.models.batching import DecoderInputs
from lightning_modules.calibration.clip_cache import ClipCache
from lightning_modules.calibration.dataset import ClipDataset, ClipLoader, StepSampler
from lightning_modules.calibration.teacher import answer_logits
from tests.calibration.runs import clip_data, configured


def validation(cache: Path, **options: Any) -> ClipDataset:
    """The two clips that are validated on."""
    data = clip_data(cache, **options)
    data.setup()
    return data.datasets["validation"]


def test_the_teacher_is_the_student_at_ratio_one(cache: Path) -> None:
    batch = validation(cache).batch(0, [0, 1])
    with configured() as module, torch.no_grad():
        same = module.distill(batch, 1.0, None).kl
        less = module.distill(batch, 0.05, None).kl
    assert abs(float(same)) < 1e-5 < 1e-2 < float(less)


def test_outputs_are_matched_from_a_ratio_on(cache: Path) -> None:
    batch = validation(cache).batch(0, [0, 1])
    with configured(feature_loss_min_ratio=0.1) as module:
        done = [module.distill(batch, ratio, 0.1) for ratio in (0.09, 0.1)]
        with torch.no_grad():
            done.append(module.distill(batch, 0.1, 0.1))
    below, above, validated = ((one.kl.item(), one.loss.item()) for one in done)
    assert below[0] == below[1] and above[1] > above[0] + 1e-3
    assert validated[0] == validated[1] == pytest.approx(above[0]), "in training alone"


def test_the_teacher_is_the_base_model(cache: Path) -> None:
    """LoRA that is not zero moves the student, never the teacher."""
    batch = validation(cache).batch(0, [0, 1])
    with configured() as module, torch.no_grad():
        attached, (*_, before) = module.live.attached, module.teacher.targets(batch)
        same = module.distill(batch, 1.0, None).kl
        assert attached is not None
        for parameter in attached.parameters():
            parameter.normal_(std=0.3)
        moved = module.distill(batch, 1.0, None).kl
        *_, after = module.teacher.targets(batch)
    assert isinstance(before.words, Tensor) and isinstance(after.words, Tensor)
    assert torch.equal(before.words, after.words) and torch.equal(before.features, after.features)
    assert abs(float(same)) < 1e-5 < 1e-3 < float(moved)


@pytest.mark.parametrize("keep", ["embeddings", "prefill"])
def test_a_second_visit_starts_from_what_was_kept(cache: Path, keep: Any) -> None:
    """Rows kept apart and stacked again in another order, with other questions, give the loss of a first visit."""
    losses = []
    for kept in (keep, "nothing"):
        data = clip_data(cache, questions_per_clip=3, cache=kept)
        data.setup()
        dataset = data.datasets["validation"]
        with configured(lora_rank=0) as module:
            module.clip_cache = data.clip_cache
            first = dataset.batch(0, [0, 1])
            assert not data.clip_cache.holds(first.clips)
            before = module.distill(first, 0.1, 0.1)
            second = dataset.batch(4, [1, 0], read=kept == "nothing")
            assert first.questions.ids.tolist() != second.questions.ids.flip(0).tolist(), "other questions are drawn"
            kinds = [kind for kind in ("prefills", "embeddings", "targets") if data.clip_cache.has(kind, second.clips)]
            expected = {"prefill": ["prefills", "targets"], "embeddings": ["embeddings"], "nothing": []}
            assert kinds == expected[kept] and bool(second.inputs) == (kept == "nothing")
            after = module.distill(second, 0.1, 0.1)
            data.reorder(1)
            third = dataset.batch(4, [1, 0], read=kept == "nothing")
            assert not data.clip_cache.has("targets", third.clips)
            again = module.distill(third, 0.1, 0.1)
        losses.append([value.item() for done in (before, after, again) for value in (done.kl, done.loss)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][1] > losses[0][0] + 1e-3, "attention outputs are matched"


def test_a_clip_of_other_data_is_none_that_is_kept(cache: Path) -> None:
    """The questions about a clip of two splits may differ: what is kept of one is not taken for the other."""
    records = clip_data(cache).records("validation")
    with configured(lora_rank=0) as module:
        one, other = (ClipDataset(split, records, module.processor) for split in ("train", "validation"))
        module.clip_cache = ClipCache("prefill")
        module.distill(one.batch(0, [0]), 0.1, None)
    assert module.clip_cache.holds(one.names([0])) and not module.clip_cache.holds(other.names([0]))
    order = [(0, [0]), (0, [1])]
    read = [bool(batch.inputs) for batch in ClipLoader(one, order, module.clip_cache)]
    assert read == [False, True], "clips that are kept are not read again"


def test_embeddings_are_stacked_with_padding(cache: Path) -> None:
    """A shorter row beside a longer one gives the prefill of the row alone."""
    batch = validation(cache).batch(0, [0, 1])
    with configured(lora_rank=0) as module, torch.no_grad():
        rows = module.live.prefill(**batch.inputs).embedded.unstack()
        shorter = DecoderInputs(
            rows[1].embeds[:, 5:], rows[1].position_ids[..., 5:], ModalityMap(rows[1].labels.labels[:, 5:])
        )
        stacked = DecoderInputs.stack([rows[0], shorter])
        layers: list[Any] = [module.live.prefill(inputs).cache.layers[-1] for inputs in (stacked, shorter)]
    assert torch.allclose(layers[0].keys[1:, :, 5:], layers[1].keys, atol=1e-4)


def test_packed_questions_equal_single_ones(cache: Path) -> None:
    """A question among others is answered as it is alone, and as by the model's plain forward."""
    batch = validation(cache).batch(0, [0])
    packed, (questions,), context = batch.questions, batch.every, batch.inputs
    question_of = packed.question[0, packed.counted]
    with configured(lora_rank=0) as module, torch.no_grad():
        prefill = module.live.prefill(**context)
        together = answer_logits(module.live, prefill, None, packed)
        for number, question in enumerate(questions):
            alone = answer_logits(module.live, prefill, None, pack_questions([[question]]))
            assert torch.allclose(together[question_of == number], alone, atol=1e-4)
    ids = torch.cat([context["input_ids"], torch.tensor([questions[0].ids])], dim=1)
    with torch.no_grad():
        plain = module.model(**{**context, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0]
    counted = packed.counted[question_of == 0]
    assert torch.allclose(plain[context["input_ids"].shape[1] :][counted], together[question_of == 0], atol=1e-4)


def test_pack_questions() -> None:
    packed = pack_questions([[Question((5, 6, 7, 8, 9), 1), Question((3, 4), 0)], [Question((1, 2), 0)]])
    assert packed.ids.tolist() == [[5, 6, 7, 8, 9, 3, 4], [1, 2, 0, 0, 0, 0, 0]]
    assert packed.question.tolist() == [[0, 0, 0, 0, 0, 1, 1], [0, 0, -1, -1, -1, -1, -1]]
    assert packed.offset.tolist()[0] == [0, 1, 2, 3, 4, 0, 1]
    assert packed.weight[0].tolist() == pytest.approx([0, 3**-0.5, 3**-0.5, 3**-0.5, 0, 1, 0])
    labels = ModalityMap(torch.tensor([[3, 0, 1], [0, 1, 2]]))
    mask = packed.mask(labels, torch.float32)[0, 0] == 0
    assert mask[5].tolist() == [False, True, True] + [False] * 5 + [True, False]
    assert mask[3].tolist() == [False, True, True] + [True] * 4 + [False] * 3


def test_batches_depend_on_their_number_only() -> None:
    whole = list(StepSampler(5, 2, 6, lambda: 0, seed=1))
    assert list(StepSampler(5, 2, 6, lambda: 4, seed=1)) == whole[4:]
    assert {clip for _, clips in whole[:5] for clip in clips} == set(range(5))
    ranks = [list(StepSampler(5, 2, 6, lambda: 0, seed=1, rank=rank, world=2)) for rank in range(2)]
    double = list(StepSampler(5, 4, 6, lambda: 0, seed=1))
    for (number, one), (_, other), (same, both) in zip(*ranks, double, strict=True):
        assert number == same and sorted(one + other) == sorted(both)
