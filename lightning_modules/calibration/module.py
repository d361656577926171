"""CalibrationModule: an AV-LLM under AccKV-compressed attention learns to answer as it does with the full cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from acckv.compressor import KVCompressor
from acckv.config import CompressionConfig, LoraScope, When
from acckv.data.batching import PackedTurns
from acckv.errors import InputError
from acckv.method.plan import LayerPlan
from acckv.method.weights import WEIGHT_GROUPS, CalibratedWeights
from acckv.models import find_adapter, load_model
from acckv.runtime.lora import LoraWeights, lora_config
from acckv.runtime.session import Prefill
from acckv.runtime.simulation import enable_checkpointing
from lightning_modules.calibration.checks import check_options
from lightning_modules.calibration.dataset import CalibrationBatch
from lightning_modules.calibration.fsdp import shard_frozen
from lightning_modules.calibration.losses import Divergence, Match, mismatch, outputs_of
from lightning_modules.calibration.optimizer import restart_rates, scheduled_adam
from lightning_modules.calibration.schedule import LOW_RATIO_REACH, Stages
from lightning_modules.calibration.state import CalibrationState
from lightning_modules.calibration.step_mean import StepMean
from lightning_modules.calibration.teacher_targets import TeacherTargets, outputs_at
from lightning_modules.calibration.trainer_checks import check_trainer
from lightning_modules.calibration.training_progress import calibration_bar
from lightning_modules.interrupted import StopBetweenSteps

#: Linear layers that LoRA adapts; a mixture of experts has only the first four by name.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Distillation:
    """What came of a batch.

    Attributes:
        kl: KL(teacher || student) over the answer tokens, in nats a token; loss: what is minimised.
        plans: the student's, None where it read the full cache.
    """

    kl: Tensor
    loss: Tensor
    plans: list[LayerPlan] | None


class CalibrationModule(CalibrationState):
    """Learn the weights of docs/method.md and LoRA by distillation from the full cache of the same frozen model.

    Each step draws a ratio, prefills the media once without gradients, lets the model answer with the
    full cache (teacher, LoRA off) and with gated entries (student), and minimises KL(teacher || student) over the
    answer tokens and the mismatch of the layers' attention outputs. The gates' temperature falls geometrically until
    they are nearly hard, so that what is trained is what is shipped.

    Args:
        base_model: 'tiny' (packaged), a folder or a hub id.
        when: compress after the media ('context') or after the whole prompt ('prompt').
        preset: training-free method that the weights start from and are residuals of: 'context' or 'paper'.
        compression: options of the preset that are to be others, such as ``{integration: true}``.
        divergence: KL(teacher || student) is 'forward': the student covers all that the teacher may say. 'reverse': it
            says nothing that the teacher would not.
        feature_loss: features that are brought close to the teacher's in every layer besides: 'hidden' states,
            'attention' outputs or None.
        feature_loss_weight: weight of that term, a share of the teacher's mean square in the batch of all processes.
            Accumulated batches have one scale each: they equal one large batch exactly with `feature_loss: null` alone.
        feature_loss_min_ratio: least ratio at which that term counts. With next to nothing kept no layer can give its
            teacher's output, and trying costs the answer.
        trainable: groups of weights that are trained, of budgets, gains, probes, scorer, places, redundancy, merging
            and alignment; the others stay at the preset.
        ratio_min: least kept share drawn at a step.
        ratio_max: largest kept share drawn at a step.
        ratio_power: 1 draws ratios log-uniformly; above 1, the low ones more often.
        low_ratio_share: share of the training that sees `ratio_min` alone, the low-ratio stage. What it learned then
            holds, LoRA included, for ratios below 1.5 times `ratio_min`; all others start from it. 0 for none.
        full_cache_probability: share of the steps in which the student reads the full cache, so that LoRA costs nothing
            there.
        temperature_start: of the gates, in standard deviations of the score.
        temperature_end: of the gates at the end; small, so that what is trained is what is shipped.
        temperature_after_low_ratio: of the gates after `low_ratio_share`, in place of `temperature_start`.
        anneal_fraction: share of the training in which the temperature falls, or of each part of it where there is a
            `low_ratio_share`; it then stays at its end.
        lora_rank: 0 trains no LoRA.
        lora_alpha: LoRA scale times rank; None is twice the rank.
        lora_targets: linear layers of the decoder that LoRA adapts, by name.
        lora_scope: 'after' adapts tokens after compression only, 'all' the prompt too.
        lr_budget: peak learning rate of the layer and modality budgets.
        lr_score: peak learning rate of the saliency scorer and the signal mix.
        lr_lora: peak learning rate of LoRA.
        lr_redundancy: peak learning rate of what an entry loses for its neighbours.
        lr_other: peak learning rate of all other weights.
        warmup: steps of linear warm-up; a cosine to 5 % follows. Both begin anew after `low_ratio_share`.
        layer_floor: least share of the uniform budget that a layer keeps.
        probe_queries: learned probe queries a head; 0 for none.
        validation_ratios: ratios of the validation KL.
        gradient_checkpointing: repeat the student's forward of each layer in backward instead of holding what is in it:
            less memory for one more forward. With `lora_scope: all` the prompt's part is held all the same.
        dtype: of the frozen model: float32, bfloat16, float16 or auto.
        load_options: of transformers' from_pretrained for the frozen model, such as ``{revision: main}`` or
            ``{quantization_config: {load_in_4bit: true}}``.
        seed: of the ratio draws.
    """

    weights_class: type[CalibratedWeights] = CalibratedWeights
    """Of the weights; another one is for studies."""

    def __init__(
        self,
        base_model: str = "tiny",
        when: When = "context",
        preset: str = "context",
        compression: dict[str, Any] | None = None,
        divergence: Divergence = "forward",
        feature_loss: Match | None = "attention",
        feature_loss_weight: float = 1.0,
        feature_loss_min_ratio: float = 0.05,
        trainable: tuple[str, ...] = tuple(WEIGHT_GROUPS),
        ratio_min: float = 0.02,
        ratio_max: float = 0.5,
        ratio_power: float = 1.6,
        low_ratio_share: float = 0.0,
        full_cache_probability: float = 0.1,
        temperature_start: float = 0.5,
        temperature_end: float = 0.005,
        temperature_after_low_ratio: float = 0.1,
        anneal_fraction: float = 0.6,
        lora_rank: int = 16,
        lora_alpha: float | None = None,
        lora_targets: tuple[str, ...] = LORA_TARGETS,
        lora_scope: LoraScope = "after",
        lr_budget: float = 0.02,
        lr_score: float = 0.02,
        lr_lora: float = 2e-3,
        lr_redundancy: float = 0.05,
        lr_other: float = 0.01,
        warmup: int = 20,
        layer_floor: float = 0.1,
        probe_queries: int = 4,
        validation_ratios: tuple[float, ...] = (0.2, 0.05),
        gradient_checkpointing: bool = False,
        dtype: str = "float32",
        load_options: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        check_options(self.options)
        options = {"when": when, "layer_floor": layer_floor, "probe_queries": probe_queries, "ratio": 0.1}
        self.compression = CompressionConfig.preset(preset, **{**options, **(compression or {})})
        self.step_mean = StepMean()
        self.last_step: dict[str, Any] = {}
        """What the last optimiser step came to, by name."""

    # ------------------------------------------------------------------ model

    def configure_model(self) -> None:
        if self.session is not None:
            return
        options = self.options
        model, processor = load_model(options.base_model, options.dtype, load_options=options.load_options)
        adapter = find_adapter(model)
        sizes = adapter.dimensions
        weights = self.weights_class(
            sizes["layers"], sizes["kv_heads"], sizes["query_heads"], sizes["head_size"], options.probe_queries
        )
        learned = [name for group in options.trainable for name in WEIGHT_GROUPS[group]]
        for name, weight in weights.named_parameters():
            weight.requires_grad_(name in learned)
        adapter_weights = None
        if options.lora_rank > 0:
            alpha = options.lora_alpha or 2.0 * options.lora_rank
            config = lora_config(adapter, options.lora_rank, alpha, tuple(options.lora_targets), options.base_model)
            adapter_weights = LoraWeights(config, {})
        base = {"name": str(options.base_model), **sizes}
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.model, self.processor = model, processor
        self.compressor = KVCompressor(self.compression, weights, adapter_weights, options.lora_scope, base)
        self.session = self.compressor(model, processor, lora_mode="separate").__enter__()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        if options.gradient_checkpointing:
            enable_checkpointing(self.live.adapter.decoder)
        if self.device_mesh is not None:
            data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
            if data.options.cache == "prefill":
                message = (
                    "is 'prefill': one process may have kept what another has to run, and a split model needs both"
                )
                raise InputError(f"{message} in every forward; take 'embeddings'", field="data.cache")
            shard_frozen(self, self.live.adapter.decoder, self.device_mesh["data_parallel"])

    def configure_callbacks(self) -> list[Callback]:
        check_trainer(self.trainer)  # here, since nothing is prepared or loaded yet
        return [StopBetweenSteps(), *calibration_bar(self.trainer)]

    def teardown(self, stage: str) -> None:
        if self.session is not None:
            self.session.__exit__(None, None, None)

    # --------------------------------------------------------------- training

    @property
    def stages(self) -> Stages:
        steps = self.trainer.estimated_stepping_batches
        if self.resumed is not None and self.trainer.state.fn != TrainerFn.FITTING:
            steps = self.resumed.planned
        return Stages(self.options.low_ratio_share, steps, self.settled_at)

    def temperature(self, step: int | None = None) -> float:
        """Of the gates at a step; None is this one."""
        stages, options, step = self.stages, self.options, self.global_step if step is None else step
        start = options.temperature_after_low_ratio if stages.settled(step) else options.temperature_start
        cooled = min(stages.progress(step) / options.anneal_fraction, 1.0)
        return start * (options.temperature_end / start) ** cooled

    def draw_ratio(self, number: int) -> float:
        """The ratio of a batch of the stage of all ratios: 1, or between the bounds; a function of its number alone."""
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + number)
        low, high = math.log(self.low_ratio_below or self.options.ratio_min), math.log(self.options.ratio_max)
        ratio, kind = torch.rand(2, generator=generator, device="cpu").tolist()
        full = kind < self.options.full_cache_probability
        return 1.0 if full else math.exp(low + (high - low) * ratio**self.options.ratio_power)

    @property
    def low_ratio_below(self) -> float:
        """Ratios below it are those of the low-ratio stage; 0 without one."""
        return LOW_RATIO_REACH * self.options.ratio_min if self.options.low_ratio_share else 0.0

    def on_fit_start(self) -> None:
        if self.trainer.max_steps >= 0:  # they alone end it: the one epoch of a run that goes on is used up
            self.trainer.fit_loop.max_epochs = -1

    def on_train_start(self) -> None:
        if self.resumed is not None:
            restart_rates(cast(LambdaLR, self.lr_schedulers()), self.options)
            rank_zero_only(print)(self.resumed.describe(self))

    def on_train_batch_start(self, batch: CalibrationBatch, batch_idx: int) -> None:
        if self.stages.widens(self.global_step):
            self.settle()
            self.settled_at = self.global_step
            cast(LightningOptimizer, self.optimizers()).optimizer.state.clear()  # what moved at one ratio alone

    def training_step(self, batch: CalibrationBatch, batch_idx: int) -> Tensor:
        stages, ratio, temperature = self.stages, self.draw_ratio(batch.number), self.temperature()
        if ratio < 1 and stages.is_low_ratio(self.global_step):
            ratio = self.options.ratio_min
        done, self._ratio = self.distill(batch, ratio, temperature), ratio
        # A tensor: a number would have to wait for the device at every step.
        kept = [plan.log_gates.detach().exp().mean() for plan in done.plans or []]
        share = torch.stack(kept).mean() if kept else done.kl.new_ones(())
        self.log_dict({"train/ratio": ratio, "train/temperature": temperature, "train/kept": share})
        # Weights that nothing reads (of a modality that is not there, of a step that the preset leaves out) get zeros
        # as gradients: DDP waits for one from each.
        unread = cast(Tensor, sum(0.0 * weight.sum() for weight in self.weights.parameters()))
        return self.step_mean.add(batch.turns.weight.sum(), done.loss, kl=done.kl) + unread

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.trained_steps += 1
        means = self.step_mean.finish(self)
        self.last_step = {**means, "ratio": self._ratio}
        self.log_dict(means, on_step=True, on_epoch=False)  # Lightning would read each `prog_bar` value at every step

    def validation_step(self, batch: CalibrationBatch, batch_idx: int) -> None:
        for ratio in self.options.validation_ratios:
            kl = self.distill(batch, ratio, None).kl
            self.log(f"val/kl@{ratio:g}", kl, batch_size=len(batch.turns.ids), sync_dist=True)
            self.log("val/kl", kl, batch_size=len(batch.turns.ids), sync_dist=True, prog_bar=True)

    def distill(self, batch: CalibrationBatch, ratio: float, temperature: float | None) -> Distillation:
        """Let teacher and student answer a batch.

        Args:
            ratio: kept share; at 1 the student reads the full cache, as a session does, and there is no plan.
            temperature: None for the hard selection.
        """
        session, turns, options = self.live, batch.turns, self.options
        scope_all = options.lora_scope == "all" and session.attached is not None
        training = torch.is_grad_enabled()
        prefill, targets = self.teacher_targets(batch)
        matched = self._matched() if training and ratio >= options.feature_loss_min_ratio else []
        if scope_all:
            prefill = session.prefill(prefill.embedded, self.compressor.policy.rows, gradients=training)
        with torch.autocast(self.device.type, enabled=False):  # sessions select in full precision
            plans = None if self.compressor.planners.keeps_all(ratio) else session.plan(prefill, ratio, temperature)
        with session.adapted(ratio), outputs_of(matched) as found:
            student = self._logits(prefill, plans, turns)
        weight = turns.weight.flatten()[turns.counted]
        kl = targets.divergence(student, weight, "forward")
        loss = kl
        if options.divergence == "reverse":
            loss = targets.divergence(student, weight, "reverse")
        if matched:
            outputs = outputs_at(turns.counted, found, student)
            loss = loss + options.feature_loss_weight * mismatch(targets.outputs, outputs, weight.sum())
        return Distillation(kl, loss, plans)

    def teacher_targets(self, batch: CalibrationBatch) -> tuple[Prefill, TeacherTargets]:
        """The base model with its full cache: its prefill, and what it says at the tokens of the turns that count."""
        if batch.prefill is not None and batch.targets is not None:
            return batch.prefill, batch.targets
        session, turns = self.live, batch.turns if batch.pending is None else batch.pending.turns
        with session.base_projections():
            prefill = batch.prefill
            if prefill is None:
                prefill = session.prefill(batch.embedded, self.compressor.policy.rows, **batch.inputs)
            if batch.keep is not None:
                batch.keep(prefill)
            with torch.no_grad(), outputs_of(self._matched()) as outputs:
                logits = self._logits(prefill, None, turns)
        targets = TeacherTargets.at(turns.counted, logits, outputs)
        return prefill, targets if batch.pending is None else batch.pending.take(targets)

    def _matched(self) -> list[torch.nn.Module]:
        """Modules whose outputs are matched."""
        adapter, match = self.live.adapter, self.options.feature_loss
        if match is None:
            return []
        return list(adapter.decoder.layers) if match == "hidden" else adapter.decoder_attention

    def _logits(self, prefill: Prefill, plans: list[LayerPlan] | None, turns: PackedTurns) -> Tensor:
        """Logits of the tokens that count, ``[tokens, vocabulary]``: most of a long vocabulary is never made."""
        session = self.live
        return session.simulate(
            prefill,
            plans,
            places=turns.counted,
            input_ids=turns.ids,
            attention_mask=turns.mask(prefill.labels, self.model.dtype),
            position_ids=session.adapter.text_positions(prefill.next_position + turns.offset),
        )

    # ----------------------------------------------------------------- optimiser

    def configure_optimizers(self) -> Any:
        adapted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        return scheduled_adam(self.weights, adapted, self.options, lambda: self.stages)
