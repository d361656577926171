"""Calibration through a real Trainer on the packaged AV-LLM: what it trains, saves, resumes and exports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from acckv import InputError, KVCompressor
from acckv.data.batching import Question, pack_questions
from acckv.method.modality import ModalityMap
from acckv.method.weights import CalibratedWeights
from acckv.models.batching import DecoderInputs
from lightning_modules.calibration.clip_cache import ClipCache
from lightning_modules.calibration.config import CalibrationConfig
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.dataset import ClipDataset, ClipLoader, StepSampler
from lightning_modules.calibration.export import ExportCompressor
from lightning_modules.calibration.losses import divergence, feature_loss
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.calibration.schedule import Schedule
from lightning_modules.calibration.teacher import answer_logits
from tests.paths import ROOT


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clips")


class StopAfter(Callback):
    """Ends a run early, as an interruption would, without changing its schedule."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def fit(
    cache: Path,
    folder: Path,
    steps: int = 4,
    stop: int | None = None,
    resume: Path | None = None,
    also: Sequence[Callback] = (),
    validate: int = 0,
    **options: Any,
) -> CalibrationModule:
    torch.manual_seed(0)
    module = CalibrationModule(**options)
    data = AVDataModule(
        when=options.get("when", "context"),
        train_clips=6,
        validation_clips=2,
        batch_size=2,
        questions_per_clip=2,
        cache_dir=str(cache),
    )
    checkpoint = ModelCheckpoint(dirpath=folder, filename="step-{step}", every_n_train_steps=2, save_top_k=-1)
    end = ExportCompressor(str(folder / "export"), new_tokens=4) if stop is None else StopAfter(stop)
    callbacks: list[Callback] = [checkpoint, end, *also]
    trainer = Trainer(
        max_steps=steps,
        max_epochs=1,  # as in configs/calib.yaml; the loader is then built before a checkpoint is restored
        callbacks=callbacks,
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=validate,
        gradient_clip_val=1.0,
        default_root_dir=folder,
    )
    trainer.fit(module, data, ckpt_path=resume)
    return module


def trained(module: CalibrationModule) -> dict[str, torch.Tensor]:
    values = {f"compressor.{name}": value for name, value in module.compressor.state_dict().items()}
    lora = module.exported().lora
    return values | (lora.tensors if lora is not None else {})


def moved_weights(module: CalibrationModule) -> set[str]:
    """Names of the weights that are not where they start."""
    weights = module.compressor.weights
    start = CalibratedWeights(*weights.shape).state_dict()
    return {name for name, value in weights.state_dict().items() if not torch.equal(value, start[name])}


@pytest.mark.parametrize(
    "options", [{}, {"low_ratio_share": 0.5}, {"low_ratio_share": 0.25}], ids=["", "between", "within"]
)
def test_resume_is_exact(cache: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    whole = fit(cache, tmp_path / "whole", **options)
    fit(cache, tmp_path / "cut", stop=2, **options)
    checkpoint = tmp_path / "cut" / "step-step=2.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    kinds = ("compressor.weights.", "compressor.low_ratio_weights.")
    assert state and all(name.startswith(kinds) or ".lora_" in name for name in state)
    resumed = fit(cache, tmp_path / "cut", resume=checkpoint, **options)
    expected, found = trained(whole), trained(resumed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "export").rglob("*.safetensors")]
    assert len(files) == (4 if options else 2)
    for file in files:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes(), file


class NoteTrained(Callback):
    """Copies of what is trained before each step, and the ratios that were drawn."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.ratios: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        self.before.append({name: value.clone() for name, value in trained(module).items()})
        self.ratios.append(float(trainer.callback_metrics["train/ratio"]))


def test_all_ratios_start_from_what_the_lowest_learned(cache: Path, tmp_path: Path) -> None:
    """The lowest alone at first; then that is kept, LoRA included, and the others go on from it."""
    noted = NoteTrained()
    options = {"low_ratio_share": 0.5, "ratio_min": 0.1, "ratio_max": 0.3, "full_cache_probability": 0.0, "warmup": 1}
    module = fit(cache, tmp_path, also=[noted], **options)
    assert noted.ratios[:2] == [pytest.approx(0.1)] * 2 and all(0.15 <= ratio <= 0.3 for ratio in noted.ratios[2:])
    loaded = KVCompressor.from_pretrained(tmp_path / "export")
    assert loaded.low_ratio is not None and loaded.low_ratio.below == pytest.approx(0.15)

    def held(compressor: KVCompressor) -> dict[str, torch.Tensor]:
        values = {f"compressor.weights.{name}": value for name, value in compressor.weights.state_dict().items()}
        return values | compressor.lora.tensors

    def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(one[name], two[name]) for name in one)

    assert held(loaded).keys() == noted.before[0].keys()
    assert same(held(loaded.low_ratio), noted.before[2]) and not same(noted.before[1], noted.before[2])
    last = {
        name: value for name, value in trained(module).items() if not name.startswith("compressor.low_ratio_weights.")
    }
    assert same(last, held(loaded)) and not same(held(loaded), held(loaded.low_ratio))
    lora = loaded.lora.tensors
    assert not same({name: loaded.low_ratio.lora.tensors[name] for name in lora}, lora)
    with loaded(module.model, module.processor, lora_mode="separate") as session:
        with session.adapted(0.1):
            assert (
                same(session.attached.tensors(low_ratio=True), loaded.low_ratio.lora.tensors)
                and session.attached.is_low
            )
        assert same(session.attached.tensors(), lora) and not session.attached.is_low


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_scope": "all"}, "model.low_ratio_share: has an adapter of its own"),
        ({"ratio_min": 0.2, "ratio_max": 0.3}, "model.ratio_max: leaves no ratio above 1.5 times ratio_min"),
        ({"temperature_after_low_ratio": 0.001}, "model.temperature_after_low_ratio: is below temperature_end"),
    ],
)
def test_options_that_do_not_go_with_a_low_ratio_stage(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        CalibrationModule(low_ratio_share=0.5, **options)
    CalibrationModule(**options)


@pytest.mark.parametrize(
    ("step", "low", "after", "progress", "rate"),
    [(0, True, False, 0, 1), (3, True, False, 0.5, 0.525), (6, False, True, 0, 1), (10, False, True, 1, 0.05)],
)
def test_stages(step: int, low: bool, after: bool, progress: float, rate: float) -> None:
    options = CalibrationConfig(low_ratio_share=0.6, warmup=0)
    schedule = Schedule(options, 10)
    assert (schedule.in_low_ratio_stage(step), schedule.after_low_ratio_stage(step)) == (low, after)
    assert schedule.ends_low_ratio_stage(step) == (step == 6)
    assert schedule.progress(step) == progress and schedule.rate(step) == pytest.approx(rate)
    start = 0.5 if low else 0.1
    cooled = min(progress / 0.6, 1.0)
    assert schedule.temperature(step) == pytest.approx(start ** (1 - cooled) * 0.005**cooled)
    assert schedule.ratio(step) in (0.02, 1.0) if low else schedule.ratio(step) >= 0.03
    alone = Schedule(CalibrationConfig(), 10)
    assert not alone.in_low_ratio_stage(step) and not alone.after_low_ratio_stage(step)
    assert alone.progress(step) == step / 10
    endless = Schedule(CalibrationConfig(), float("inf"))
    assert endless.progress(step) == 0 and endless.rate(step) == (step + 1) / 20
    with pytest.raises(InputError, match=r"model.low_ratio_share: is a share of a training that has no end"):
        Schedule(options, float("inf"))


class Fail(Callback):
    """Raises after a step."""

    def on_train_batch_end(self, *args: Any) -> None:
        raise RuntimeError("the disk is full")


def test_a_run_that_fails_leaves_nothing_behind(cache: Path, tmp_path: Path) -> None:
    """The session is closed; a checkpoint of the moment holds LoRA all the same."""
    shadowed = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    module = CalibrationModule()
    trainer = Trainer(
        max_steps=4,
        callbacks=[OnExceptionCheckpoint(tmp_path), Fail()],
        logger=False,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
    )
    data = AVDataModule(train_clips=6, validation_clips=2, batch_size=2, questions_per_clip=1, cache_dir=str(cache))
    with pytest.raises(RuntimeError, match="the disk is full"):
        trainer.fit(module, data)
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == shadowed
    assert module.live.attached is None and not any(".lora_" in name for name, _ in module.named_modules())
    with pytest.raises(InputError, match="session: is closed"):
        module.live.prefill(input_ids=torch.tensor([[1]]))
    saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)["state_dict"]
    assert any(".lora_" in name for name in saved)


@pytest.mark.parametrize(
    "options",
    [
        {"lora_scope": "all"},
        {"lora_rank": 0, "preset": "paper"},
        {"when": "prompt", "preset": "paper"},
        {"compression": {"integration": True}, "divergence": "reverse", "feature_loss": "hidden"},
        {"lora_targets": ("q_proj", "v_proj"), "feature_loss": "attention", "full_cache_probability": 0.0},
    ],
    ids=["scope-all", "weights-only", "prompt", "hidden", "attention"],
)
def test_variants_train_and_export(cache: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    """ExportCompressor compares live and reloaded answers, and raises where they differ."""
    module = fit(cache, tmp_path, steps=2, **options)
    moved = moved_weights(module)
    assert "layer_budget" in moved and "saliency" in moved
    assert (tmp_path / "export" / "adapter").exists() == (options.get("lora_rank") != 0)


def test_only_the_groups_that_learn_move(cache: Path, tmp_path: Path) -> None:
    module = fit(cache, tmp_path, steps=2, trainable=("budgets", "redundancy"), lora_rank=0)
    assert moved_weights(module) == {"layer_budget", "modality_budget", "redundancy"}
    with pytest.raises(InputError, match=r"model\.trainable: 'head' is not one of budgets, "):
        CalibrationModule(trainable=("head",))
    with pytest.raises(InputError, match=r"model\.trainable: is empty"):
        CalibrationModule(trainable=(), lora_rank=0)


def test_losses() -> None:
    """Both divergences against their sums, and the difference of layers as a share."""
    teacher, student, weight = torch.randn(5, 7), torch.randn(5, 7), torch.rand(5)
    p, q = teacher.softmax(-1), student.softmax(-1)
    for kind, one, other in (("forward", p, q), ("reverse", q, p)):
        expected = ((one * (one / other).log()).sum(-1) * weight).sum() / weight.sum()
        assert divergence(teacher, student, weight, kind) == pytest.approx(float(expected), abs=1e-5)  # type: ignore[arg-type]
    layers = torch.randn(2, 5, 4)
    twice = torch.stack([2 * layers[0], layers[1]])
    assert feature_loss(layers, twice, torch.tensor(3.0)) == pytest.approx(0.5)
    other = torch.randn(1, 5, 4)
    share = (other - layers[:1]).square().sum() / layers[:1].square().sum()
    assert feature_loss(layers[:1], other, torch.tensor(3.0)) == pytest.approx(float(share))


def test_ratios_are_drawn_by_number() -> None:
    module = CalibrationModule(ratio_min=0.02, ratio_max=0.5, full_cache_probability=0.25)
    schedule = Schedule(module.options, 400)
    drawn = [schedule.ratio(number) for number in range(400)]
    assert drawn[:3] == [schedule.ratio(number) for number in range(3)]
    assert 60 < drawn.count(1.0) < 140
    rest = [ratio for ratio in drawn if ratio < 1]
    assert 0.02 <= min(rest) < 0.022 and 0.3 < max(rest) <= 0.5
    assert sorted(rest)[len(rest) // 2] < 0.1  # low ones more often than the geometric mean, 0.1


def test_the_teacher_is_the_student_at_ratio_one(cache: Path) -> None:
    module = CalibrationModule()
    module.configure_model()
    data = AVDataModule(train_clips=6, validation_clips=2, batch_size=2, cache_dir=str(cache))
    data.setup()
    batch = next(iter(data.val_dataloader()))
    with torch.no_grad():
        same = module.distill(batch, 1.0, None).kl
        less = module.distill(batch, 0.05, None).kl
    module.teardown("fit")
    assert abs(float(same)) < 1e-5 < 1e-2 < float(less)


def test_outputs_are_matched_from_a_ratio_on(cache: Path) -> None:
    module = CalibrationModule(feature_loss_min_ratio=0.1)
    module.configure_model()
    data = AVDataModule(train_clips=6, validation_clips=2, batch_size=2, cache_dir=str(cache))
    data.setup()
    batch = next(iter(data.val_dataloader()))
    done = [module.distill(batch, ratio, 0.1) for ratio in (0.09, 0.1)]
    with torch.no_grad():
        done.append(module.distill(batch, 0.1, 0.1))
    module.teardown("fit")
    below, above, validated = ((one.kl.item(), one.loss.item()) for one in done)
    assert below[0] == below[1] and above[1] > above[0] + 1e-3
    assert validated[0] == validated[1] == pytest.approx(above[0]), "in training alone"


def test_the_teacher_is_the_base_model(cache: Path) -> None:
    """LoRA that is not zero moves the student, never the teacher."""
    module = CalibrationModule()
    module.configure_model()
    data = AVDataModule(train_clips=6, validation_clips=2, batch_size=2, cache_dir=str(cache))
    data.setup()
    batch = next(iter(data.val_dataloader()))
    _, before = module.teacher.targets(batch)
    with torch.no_grad():
        same = module.distill(batch, 1.0, None).kl
        for parameter in module.live.attached.parameters():
            parameter.normal_(std=0.3)
        moved = module.distill(batch, 1.0, None).kl
    _, after = module.teacher.targets(batch)
    module.teardown("fit")
    assert torch.equal(before.words, after.words) and torch.equal(before.features, after.features)
    assert abs(float(same)) < 1e-5 < 1e-3 < float(moved)


@pytest.mark.parametrize("keep", ["embeddings", "prefill"])
def test_a_second_visit_starts_from_what_was_kept(cache: Path, keep: Any) -> None:
    """Rows kept apart and stacked again in another order, with other questions, give the loss of a first visit."""
    module = CalibrationModule(lora_rank=0)
    module.configure_model()
    losses = []
    for kept in (keep, "nothing"):
        data = AVDataModule(
            train_clips=6, validation_clips=2, batch_size=2, questions_per_clip=3, cache_dir=str(cache), cache=kept
        )
        data.setup()
        module.clip_cache = data.clip_cache
        dataset = data.datasets["validation"]
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
    module.teardown("fit")
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][1] > losses[0][0] + 1e-3, "attention outputs are matched"


def test_a_clip_of_other_data_is_none_that_is_kept(cache: Path) -> None:
    """The questions about a clip of two splits may differ: what is kept of one is not taken for the other."""
    records = AVDataModule(validation_clips=2, cache_dir=str(cache)).records("validation")
    module = CalibrationModule(lora_rank=0)
    module.configure_model()
    one, other = (ClipDataset(split, records, module.processor) for split in ("train", "validation"))
    module.clip_cache = ClipCache("prefill")
    module.distill(one.batch(0, [0]), 0.1, None)
    module.teardown("fit")
    assert module.clip_cache.holds(one.names([0])) and not module.clip_cache.holds(other.names([0]))
    order = [(0, [0]), (0, [1])]
    read = [bool(batch.inputs) for batch in ClipLoader(one, order, module.clip_cache)]
    assert read == [False, True], "clips that are kept are not read again"


def test_embeddings_are_stacked_with_padding(cache: Path) -> None:
    """A shorter row beside a longer one gives the prefill of the row alone."""
    module = CalibrationModule(lora_rank=0)
    module.configure_model()
    data = AVDataModule(train_clips=6, validation_clips=2, batch_size=2, cache_dir=str(cache))
    data.setup()
    dataset = data.datasets["validation"]
    batch = dataset.batch(0, [0, 1])
    with torch.no_grad():
        rows = module.live.prefill(**batch.inputs).embedded.unstack()
        shorter = DecoderInputs(
            rows[1].embeds[:, 5:], rows[1].position_ids[..., 5:], ModalityMap(rows[1].labels.labels[:, 5:])
        )
        ragged = DecoderInputs.stack([rows[0], shorter])
        prefill = module.live.prefill(ragged)
        alone = module.live.prefill(shorter)
    module.teardown("fit")
    assert torch.allclose(prefill.cache.layers[-1].keys[1:, :, 5:], alone.cache.layers[-1].keys, atol=1e-4)


def test_packed_questions_equal_single_ones(cache: Path) -> None:
    """A question among others is answered as it is alone, and as by the model's plain forward."""
    module = CalibrationModule(lora_rank=0)
    module.configure_model()
    data = AVDataModule(train_clips=6, validation_clips=2, batch_size=2, cache_dir=str(cache))
    data.setup()
    batch = data.datasets["validation"].batch(0, [0])
    packed, (questions,), context = batch.questions, batch.every, batch.inputs
    with torch.no_grad():
        prefill = module.live.prefill(**context)
        together, question_of = (
            answer_logits(module.live, prefill, None, packed),
            packed.question[0, packed.counted],
        )
        for number, question in enumerate(questions):
            alone = answer_logits(module.live, prefill, None, pack_questions([[question]]))
            assert torch.allclose(together[question_of == number], alone, atol=1e-4)
        module.teardown("fit")
        ids = torch.cat([context["input_ids"], torch.tensor([questions[0].ids])], dim=1)
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


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match=r"model\.ratio_min"):
        CalibrationModule(ratio_min=0.5, ratio_max=0.1)
    with pytest.raises(InputError, match=r"model\.feature_loss_min_ratio: -1 is not at least 0"):
        CalibrationModule(feature_loss_min_ratio=-1)
    with pytest.raises(InputError, match=r"data\.train_questions: is needed"):
        AVDataModule(source="music_avqa")
    with pytest.raises(InputError, match=r"lora_targets: 'qkv' names no linear layer of the decoder"):
        CalibrationModule(lora_targets=("qkv",)).configure_model()


@pytest.mark.slow
def test_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    """SIGKILL in the middle, resume with --ckpt_path: the weights of an uninterrupted run."""

    def command(name: str, *more: str) -> list[str]:
        out = tmp_path / name
        return [
            *(sys.executable, "train.py", "--config", "configs/calib.yaml", "--trainer.max_steps=12"),
            *("--data.train_clips=8", "--data.validation_clips=2", "--data.batch_size=2"),
            *(f"--data.cache_dir={tmp_path / 'clips'}", f"--trainer.default_root_dir={out}"),
            *("--checkpoint.every_n_train_steps=2", "--trainer.val_check_interval=100", *more),
        ]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = {"cwd": ROOT, "env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.run(command("whole"), check=True, **run)  # type: ignore[call-overload]
    process = subprocess.Popen(command("cut"), **run)  # type: ignore[call-overload]
    last = tmp_path / "cut" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 240
    while not last.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last.exists() and not (tmp_path / "cut" / "export").exists()
    reached = torch.load(last, weights_only=True)["global_step"]
    assert 0 < reached < 12
    subprocess.run(command("cut", f"--ckpt_path={last}"), check=True, **run)  # type: ignore[call-overload]
    exports = [KVCompressor.from_pretrained(tmp_path / name / "export") for name in ("whole", "cut")]
    for name, value in exports[0].state_dict().items():
        assert torch.equal(value, exports[1].state_dict()[name]), name
    for name, value in exports[0].lora.tensors.items():
        assert torch.equal(value, exports[1].lora.tensors[name]), name
