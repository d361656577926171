"""CalibrationModule: an AV-LLM under AccKV-compressed attention learns to answer as it does with the full cache."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning import Callback, LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from acckv.compressor import KVCompressor
from acckv.config import CompressionConfig
from acckv.errors import InputError
from acckv.io.progress import Progress
from acckv.method.plan import LayerPlan
from acckv.method.weights import WEIGHT_GROUPS, CalibratedWeights
from acckv.models import find_adapter, load_model
from acckv.policies import AccKV
from acckv.runtime.lora import LoraWeights, lora_config
from acckv.runtime.session import Session
from acckv.runtime.simulation import enable_checkpointing
from lightning_modules.calibration.checkpoint import LOW_RATIO_LORA, LOW_RATIO_WEIGHTS, TRAINING, Resumed, check_fixed
from lightning_modules.calibration.clip_cache import ClipCache
from lightning_modules.calibration.config import CalibrationConfig
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.dataset import CalibrationBatch
from lightning_modules.calibration.distributed import StepMean, shard_frozen
from lightning_modules.calibration.losses import feature_loss, features_at, outputs_of
from lightning_modules.calibration.progress import calibration_bar
from lightning_modules.calibration.schedule import Schedule, restart_rates, scheduled_adam
from lightning_modules.calibration.stopping import StopBetweenSteps
from lightning_modules.calibration.teacher import Teacher, answer_logits
from lightning_modules.calibration.trainer_settings import check_trainer
from lightning_modules.calibration.warm_start import WarmStart


@dataclass(frozen=True)
class Distillation:
    """The outcome of a batch.

    Attributes:
        kl: KL(teacher || student) over the tokens that count, in nats a token; loss: what is minimised.
        weight: of these tokens in the step's mean.
        plans: the student's, None where it read the full cache.
    """

    kl: Tensor
    loss: Tensor
    weight: Tensor
    plans: list[LayerPlan] | None


class CalibrationModule(LightningModule):
    """Learn the weights of docs/method.md and LoRA by distillation from the full cache of the same frozen model.

    Each step draws a ratio, prefills the media once without gradients, lets the model answer with the full cache
    (teacher, LoRA off) and with gated entries (student), and minimises KL(teacher || student) over the answer tokens
    and the difference of the layers' features. The gates' temperature falls until they are nearly hard, so that what is
    trained is what is shipped. A checkpoint holds what is learned, without the frozen model.

    Args:
        options: fields of :class:`lightning_modules.calibration.config.CalibrationConfig`.

    Attributes:
        compressor: with the weights; session: open on the model, with LoRA, None before `configure_model`.
        clip_cache: the data module's.
        trained_steps: optimiser steps of this process; resumed: where it went on from, if it did.
        low_ratio_ended: the step at which the low-ratio stage ended, None before that.
        last_step: results of the last optimiser step, by name.
    """

    weights_class: type[CalibratedWeights] = CalibratedWeights
    """Of the weights; another one is for studies."""
    compressor: KVCompressor

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = CalibrationConfig(**options)
        self.save_hyperparameters(dict(vars(self.options)))
        self.policy = AccKV.preset(self.options.preset, **(self.options.compression or {}))
        self.compression = CompressionConfig(ratio=0.1, when=self.options.when, head_budgets=self.options.head_budgets)
        self.strict_loading = False  # a checkpoint holds what was trained
        self.session: Session | None = None
        self.clip_cache = ClipCache()
        self.step_mean = StepMean()
        self.trained_steps = 0
        self.resumed: Resumed | None = None
        self.low_ratio_ended: int | None = None
        self.last_step: dict[str, Any] = {}

    # ------------------------------------------------------------------ model

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, AVDataModule):
            self.clip_cache = data.clip_cache

    def configure_model(self) -> None:
        if self.session is not None:
            return
        options = self.options
        model, processor = load_model(options.base_model, options.dtype, load_options=options.load_options)
        adapter = find_adapter(model)
        sizes = adapter.dimensions
        shape = sizes["layers"], sizes["kv_heads"], sizes["query_heads"], sizes["head_size"]
        weights = self.weights_class(*shape, self.policy.n_probe_queries, self.policy.n_scorer_units)
        learned = {name for group in options.trainable for name in WEIGHT_GROUPS[group]}
        if options.head_budgets != "learned":
            learned.discard("head_budget")
        for name, weight in weights.named_parameters():
            weight.requires_grad_(name in learned and weight.numel() > 0)
        lora = None
        if options.lora_rank > 0:
            alpha = options.lora_alpha or 2.0 * options.lora_rank
            config = lora_config(adapter, options.lora_rank, alpha, tuple(options.lora_targets), options.base_model)
            lora = LoraWeights(config, {})
        base = {"name": str(options.base_model), **sizes}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.model, self.processor = model, processor
        self.compressor = KVCompressor(
            self.policy, **vars(self.compression), weights=weights, lora=lora, lora_scope=options.lora_scope, base=base
        )
        self.session = self.compressor(model, processor, lora_mode="separate").__enter__()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        if options.gradient_checkpointing:
            enable_checkpointing(self.live.adapter.decoder)
        if self.device_mesh is not None:
            if self.clip_cache.keep == "prefill":
                message = (
                    "is 'prefill': one process may have kept what another has to run, and a split model needs both"
                )
                raise InputError(f"{message} in every forward; take 'embeddings'", field="data.cache")
            shard_frozen(self, self.live.adapter.decoder, self.device_mesh["data_parallel"])

    def configure_callbacks(self) -> list[Callback]:
        check_trainer(self.trainer)  # here, since nothing is prepared or loaded yet
        return [StopBetweenSteps(), *calibration_bar(self.trainer)]

    def configure_optimizers(self) -> Any:
        lora = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return scheduled_adam(self.weights, lora, self.options, lambda step: self.schedule.rate(step))

    def teardown(self, stage: str) -> None:
        if self.session is not None:
            self.session.__exit__(None, None, None)

    @property
    def live(self) -> Session:
        if self.session is None:
            raise RuntimeError("the model is built by configure_model, which a Trainer calls")
        return self.session

    @property
    def weights(self) -> CalibratedWeights:
        """The learned weights, LoRA left out."""
        return cast(CalibratedWeights, self.compressor.weights)

    @property
    def teacher(self) -> Teacher:
        return Teacher(self.live, self.clip_cache, self.options.feature_loss)

    # --------------------------------------------------------------- training

    @property
    def schedule(self) -> Schedule:
        steps = self.trainer.estimated_stepping_batches
        if self.resumed is not None and self.trainer.state.fn != TrainerFn.FITTING:
            steps = self.resumed.planned
        return Schedule(self.options, steps, self.low_ratio_ended)

    def on_fit_start(self) -> None:
        if self.trainer.max_steps >= 0:  # they alone end it: the one epoch of a run that goes on is used up
            self.trainer.fit_loop.max_epochs = -1
        if self.options.warm_start is not None and self.resumed is None:
            self._start_warm()

    def _start_warm(self) -> None:
        data, first = self.trainer.datamodule, self.trainer.is_global_zero  # type: ignore[attr-defined]
        start = WarmStart(self.policy, self.options.head_budgets, self.options.seed, shown=first)
        clips = min(self.options.warm_start_clips, len(data.datasets["train"]))
        with Progress("measuring what KVzip keeps", clips, "clips", shown=first) as progress:
            for batch in data.drawn_dataloader(clips):
                batch = data.transfer_batch_to_device(batch, self.device, 0)
                with self.live.base_projections():
                    prefill = self.teacher.prefill(batch)
                    start.add(prefill, self.live.reconstruction(prefill))
                progress.advance(len(batch.clips))
        explained = start.write(self.weights)
        self.weights.load_state_dict(self.trainer.strategy.broadcast(self.weights.state_dict()))
        rank_zero_only(print)(f"The scorer starts with {explained:.0%} of the variance of KVzip's scores.")

    def on_train_start(self) -> None:
        if self.resumed is not None:
            restart_rates(cast(LambdaLR, self.lr_schedulers()), self.options)
            rank_zero_only(print)(self.resumed.describe(self.schedule))

    def on_train_batch_start(self, batch: CalibrationBatch, batch_idx: int) -> None:
        if self.schedule.ends_low_ratio_stage(self.global_step):
            self.keep_low_ratio()
            self.low_ratio_ended = self.global_step
            cast(LightningOptimizer, self.optimizers()).optimizer.state.clear()  # what moved at one ratio alone

    def training_step(self, batch: CalibrationBatch, batch_idx: int) -> Tensor:
        ratio = self.schedule.ratio(batch.number)
        temperature = self.schedule.temperature(self.global_step)
        repeats = self.schedule.repeats_context(batch.number)
        done = self.distill(batch, ratio, temperature, repeats)
        # A tensor: a number would have to wait for the device at every step.
        kept = [plan.log_gates.detach().exp().mean() for plan in done.plans or []]
        share = torch.stack(kept).mean() if kept else done.kl.new_ones(())
        self._ratio = ratio
        self.log_dict({"train/ratio": ratio, "train/temperature": temperature, "train/kept": share})
        if self.options.repeated_share:
            self.log("train/repeats_context", float(repeats))
        # Weights that nothing reads (of a modality that is not there, of a step that the preset leaves out) get zeros
        # as gradients: DDP waits for one from each.
        unread = cast(Tensor, sum(0.0 * weight.sum() for weight in self.weights.parameters()))
        return self.step_mean.add(done.weight, done.loss, kl=done.kl) + unread

    def distill(
        self, batch: CalibrationBatch, ratio: float, temperature: float | None, repeats_context: bool = False
    ) -> Distillation:
        """Let teacher and student answer a batch, or read a stretch of its contexts again.

        Args:
            ratio: kept share; at 1 the student reads the full cache, as a session does, and there is no plan.
            temperature: None for the hard selection.
        """
        session, options = self.live, self.options
        training, teacher = torch.is_grad_enabled(), self.teacher
        prefill, questions, targets = teacher.targets(batch, options.repeated_tokens if repeats_context else 0)
        if session.adapts_prompt:
            prefill = session.prefill(prefill.embedded, session.planners.policy.queries, gradients=training)
        with torch.autocast(self.device.type, enabled=False):  # sessions select in full precision
            plans = None if session.planners.keeps_all(ratio) else session.plan(prefill, ratio, temperature)
        matched = teacher.layers if training and ratio >= options.feature_loss_min_ratio else []
        with session.adapted(ratio), outputs_of(matched) as outputs:
            student = answer_logits(session, prefill, plans, questions)
        weight = questions.weight.flatten()[questions.counted]
        kl = targets.divergence(student, weight, "forward")
        loss = kl if options.divergence == "forward" else targets.divergence(student, weight, "reverse")
        if repeats_context and not options.repeated_words:
            loss = 0.0 * loss  # what follows a media token is no word; every weight still gets a gradient
        if matched:
            features = features_at(questions.counted, outputs, student)
            loss = loss + options.feature_loss_weight * feature_loss(targets.features, features, weight.sum())
        return Distillation(kl, loss, questions.weight.sum(), plans)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.trained_steps += 1
        means = self.step_mean.finish(self)
        self.last_step = {**means, "ratio": self._ratio}
        self.log_dict(means, on_step=True, on_epoch=False)  # Lightning would read each `prog_bar` value at every step

    def validation_step(self, batch: CalibrationBatch, batch_idx: int) -> None:
        for ratio in self.options.validation_ratios:
            for name, repeats in (("kl", False), ("context_kl", True)):
                if repeats and self.options.calibrate_for == "task":
                    continue
                kl = self.distill(batch, ratio, None, repeats).kl
                self.log(f"val/{name}@{ratio:g}", kl, batch_size=len(batch.clips), sync_dist=True)
                self.log(f"val/{name}", kl, batch_size=len(batch.clips), sync_dist=True, prog_bar=not repeats)

    # ---------------------------------------------------------- what is learned

    def keep_low_ratio(self, lora: dict[str, Tensor] | None = None) -> None:
        """Keep what was learned so far, or this LoRA, for the ratios of the low-ratio stage."""
        self.compressor.keep_low_ratio(self.options.low_ratio_below)
        if self.live.attached is not None:
            self.live.attached.keep_low_ratio(lora)

    def exported(self) -> KVCompressor:
        """A frozen copy of what was learned so far, LoRA included."""
        compressor, attached = self.compressor, self.live.attached

        def lora(low_ratio: bool) -> LoraWeights | None:
            if compressor.lora is None or attached is None:
                return None
            return LoraWeights(compressor.lora.config, attached.tensors(low_ratio))

        low_ratio = None
        if compressor.low_ratio is not None:
            low_ratio = dataclasses.replace(compressor.low_ratio, lora=lora(low_ratio=True))
        return KVCompressor(
            compressor.policy,
            **vars(compressor.config),
            weights=compressor.weights,
            lora=lora(low_ratio=False),
            lora_scope=compressor.lora_scope,
            base=compressor.base,
            low_ratio=low_ratio,
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = self._trained()
        kept = {k: v for k, v in checkpoint["state_dict"].items() if k in trained or k.startswith(LOW_RATIO_WEIGHTS)}
        checkpoint["state_dict"] = kept
        checkpoint[TRAINING] = {"planned": self.schedule.steps, "low_ratio_ended": self.low_ratio_ended}
        if self.compressor.low_ratio is not None and self.live.attached is not None:
            checkpoint[LOW_RATIO_LORA] = self.live.attached.tensors(low_ratio=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for what the checkpoint holds, which is loaded next.

        Raises:
            InputError: it is another module's, contradicts the options, or there is no step left to train.
        """
        self.resumed = Resumed.read(checkpoint, self._trainer)
        check_fixed(vars(self.options), checkpoint)
        self.configure_model()
        self._restore_low_ratio(checkpoint)
        if missing := self._trained() - checkpoint["state_dict"].keys():
            raise InputError(f"lacks {len(missing)} of the trained weights, {min(missing)} say", field="ckpt_path")

    def load_learned(self, checkpoint: dict[str, Any]) -> None:
        """Take what was learned from another checkpoint of this run."""
        self._restore_low_ratio(checkpoint)
        self.load_state_dict(checkpoint["state_dict"], strict=False)

    def _restore_low_ratio(self, checkpoint: dict[str, Any]) -> None:
        self.low_ratio_ended = checkpoint[TRAINING]["low_ratio_ended"]
        if self.low_ratio_ended is not None:
            self.keep_low_ratio(checkpoint.get(LOW_RATIO_LORA))  # its weights are loaded next

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}
