"""CalibrationModule: an AV-LLM under AccKV-compressed attention learns to answer as it does with the full cache."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning import LightningModule
from torch import Tensor

from acckv import lora
from acckv.adapters import find_adapter, load_model
from acckv.compressor import KVCompressor
from acckv.config import CompressionConfig, LoraScope, When
from acckv.errors import InputError
from acckv.lora import LoraWeights, lora_config
from acckv.pipeline import LayerPlan
from acckv.session import Prefill, Session
from acckv.simulation import enable_checkpointing
from acckv.weights import CalibratedWeights
from lightning_modules.datamodule import CalibrationBatch
from lightning_modules.sharding import shard_frozen
from lightning_modules.step_mean import StepMean


class CalibrationModule(LightningModule):
    """Learn the weights of METHOD's table and LoRA by distillation from the full cache of the same frozen model.

    Each step draws a ratio log-uniformly, prefills the media once without gradients, lets the model answer with the
    full cache (teacher, LoRA off) and with gated entries (student), and minimises KL(teacher || student) over the
    answer tokens. The gates' temperature falls geometrically until they are nearly hard, so that what is trained is
    what is shipped.

    Args:
        base_model: 'tiny' (packaged), a folder or a hub id.
        when: compress after the media ('context') or after the whole prompt ('prompt').
        preset: training-free method that the weights start from and are residuals of: 'context' or 'paper'.
        ratio_min: least kept share drawn at a step.
        ratio_max: largest kept share drawn at a step.
        temperature_start: of the gates, in standard deviations of the score.
        temperature_end: of the gates at the end; small, so that what is trained is what is shipped.
        anneal: share of the training in which the temperature falls; it then stays at its end.
        lora_rank: 0 trains no LoRA.
        lora_alpha: LoRA scale times rank; None is twice the rank.
        lora_targets: attention projections that LoRA adapts.
        lora_scope: 'after' adapts tokens after compression only, 'all' the prompt too.
        lr_budget: peak learning rate of the layer and modality budgets.
        lr_score: peak learning rate of the saliency scorer and the signal mix.
        lr_lora: peak learning rate of LoRA.
        lr_other: peak learning rate of all other weights.
        warmup: steps of linear warm-up; a cosine to 5 % follows.
        layer_floor: least share of the uniform budget that a layer keeps.
        probe_queries: learned probe queries a head; 0 for none.
        validation_ratios: ratios of the validation KL.
        gradient_checkpointing: repeat the student's forward of each layer in backward instead of holding what is in it:
            less memory for one more forward. With `lora_scope: all` the prompt's part is held all the same.
        dtype: of the frozen model.
        seed: of the ratio draws.
    """

    def __init__(
        self,
        base_model: str = "tiny",
        when: When = "context",
        preset: str = "context",
        ratio_min: float = 0.02,
        ratio_max: float = 0.5,
        temperature_start: float = 0.5,
        temperature_end: float = 0.005,
        anneal: float = 0.6,
        lora_rank: int = 8,
        lora_alpha: float | None = None,
        lora_targets: tuple[str, ...] = ("q_proj", "v_proj"),
        lora_scope: LoraScope = "after",
        lr_budget: float = 0.05,
        lr_score: float = 0.02,
        lr_lora: float = 2e-3,
        lr_other: float = 0.01,
        warmup: int = 20,
        layer_floor: float = 0.1,
        probe_queries: int = 4,
        validation_ratios: tuple[float, ...] = (0.2, 0.05),
        gradient_checkpointing: bool = False,
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("ratio_min", ratio_min), ("ratio_max", ratio_max)):
            if not 0 < value <= 1:
                raise InputError(f"{value} is not above 0 and at most 1", field=f"model.{name}")
        if ratio_min > ratio_max:
            raise InputError(f"{ratio_min} is more than ratio_max, {ratio_max}", field="model.ratio_min")
        if not 0 < temperature_end <= temperature_start:
            raise InputError("needs 0 < temperature_end <= temperature_start", field="model.temperature_end")
        if not 0 < anneal <= 1:
            raise InputError(f"{anneal} is not above 0 and at most 1", field="model.anneal")
        self.save_hyperparameters()
        self.strict_loading = False  # a checkpoint holds what was trained, not the frozen model
        self.compression = CompressionConfig.preset(
            preset, when=when, layer_floor=layer_floor, probe_queries=probe_queries, ratio=0.1
        )
        self.session: Session | None = None
        self.step_mean = StepMean()

    @property
    def options(self) -> Any:
        return self.hparams

    # ------------------------------------------------------------------ model

    def configure_model(self) -> None:
        if self.session is not None:
            return
        options = self.options
        model, processor = load_model(options.base_model, options.dtype)
        adapter = find_adapter(model)
        sizes = adapter.dimensions
        weights = CalibratedWeights(
            sizes["layers"], sizes["kv_heads"], sizes["query_heads"], sizes["head_size"], options.probe_queries
        )
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
        self.session = self.compressor(model, processor).__enter__()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".lora_" in name)
        if options.gradient_checkpointing:
            enable_checkpointing(self.live.adapter.decoder)
        if self.device_mesh is not None:
            shard_frozen(self, self.live.adapter.decoder, self.device_mesh["data_parallel"])

    def teardown(self, stage: str) -> None:
        if self.session is not None:
            self.session.__exit__(None, None, None)

    def exported(self) -> KVCompressor:
        """A frozen copy of what was learned so far, LoRA included."""
        compressor = self.compressor
        adapter_weights = None
        if compressor.lora is not None and self.live.attached is not None:
            adapter_weights = LoraWeights(compressor.lora.config, self.live.attached.tensors())
        return KVCompressor(
            compressor.config, compressor.weights, adapter_weights, compressor.lora_scope, compressor.base
        )

    @property
    def live(self) -> Session:
        if self.session is None:
            raise RuntimeError("the model is built by configure_model, which a Trainer calls")
        return self.session

    # --------------------------------------------------------------- training

    def progress(self) -> float:
        """Share of the training that is done, 0 to 1."""
        return min(self.global_step / max(self.trainer.estimated_stepping_batches, 1), 1.0)

    def temperature(self) -> float:
        start, end = self.options.temperature_start, self.options.temperature_end
        return start * (end / start) ** min(self.progress() / self.options.anneal, 1.0)

    def draw_ratio(self, number: int) -> float:
        """The ratio of a batch: log-uniform between the bounds, a pure function of the batch's number."""
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + number)
        low, high = math.log(self.options.ratio_min), math.log(self.options.ratio_max)
        return math.exp(low + (high - low) * float(torch.rand((), generator=generator)))

    def training_step(self, batch: CalibrationBatch, batch_idx: int) -> Tensor:
        ratio, temperature = self.draw_ratio(batch.number), self.temperature()
        kl, plans = self.distill(batch, ratio, temperature)
        kept = sum(plan.log_gates.detach().exp().sum() / plan.log_gates[..., 0].numel() for plan in plans) / len(plans)
        entries = float(plans[0].log_gates.shape[-1])
        self.log_dict({"train/ratio": ratio, "train/temperature": temperature, "train/kept": kept / entries})
        self.log("kept", kept / entries, prog_bar=True, logger=False)
        # Weights that nothing reads (of a modality that is not there, of a step that the preset leaves out) get zeros
        # as gradients: DDP waits for one from each.
        unread = cast(Tensor, sum(0.0 * weight.sum() for weight in self.compressor.parameters()))
        return self.step_mean.add(batch.turns.weight.sum(), kl, kl=kl) + unread

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.log_dict(self.step_mean.finish(self), prog_bar=True, on_step=True, on_epoch=False)

    def validation_step(self, batch: CalibrationBatch, batch_idx: int) -> None:
        for ratio in self.options.validation_ratios:
            kl, _ = self.distill(batch, ratio, None)
            self.log(f"val/kl@{ratio:g}", kl, batch_size=len(batch.turns.ids), sync_dist=True)
            self.log("val/kl", kl, batch_size=len(batch.turns.ids), sync_dist=True, prog_bar=True)

    def distill(
        self, batch: CalibrationBatch, ratio: float, temperature: float | None
    ) -> tuple[Tensor, list[LayerPlan]]:
        """KL(teacher || student) over the answer tokens of a batch, in nats a token.

        Args:
            temperature: None for the hard selection.
        """
        session, turns = self.live, batch.turns
        scope_all = self.options.lora_scope == "all" and session.attached is not None
        training = torch.is_grad_enabled()
        with lora.disabled(session.adapter):
            prefill = session.prefill(batch.embedded, self.compressor.policy.rows, **batch.inputs)
            if batch.keep is not None:
                batch.keep(prefill.embedded.rows())
            with torch.no_grad():
                teacher = self._logits(prefill, None, turns)
        if scope_all:
            prefill = session.prefill(prefill.embedded, self.compressor.policy.rows, gradients=training)
        plans = session.plan(prefill, ratio, temperature)
        student = self._logits(prefill, plans, turns)
        counted = turns.weight > 0
        weight = turns.weight[counted]
        expected, found = (logits[counted].float().log_softmax(-1) for logits in (teacher, student))
        kl = F.kl_div(found, expected, log_target=True, reduction="none").sum(-1)
        return (kl * weight).sum() / weight.sum(), plans

    def _logits(self, prefill: Prefill, plans: list[LayerPlan] | None, turns: Any) -> Tensor:
        session = self.live
        return session.simulate(
            prefill,
            plans,
            input_ids=turns.ids,
            attention_mask=turns.mask(prefill.labels, self.model.dtype),
            position_ids=session.adapter.text_positions(prefill.next_position + turns.offset),
        )

    # -------------------------------------------------------------- optimiser

    def configure_optimizers(self) -> Any:
        options = self.options
        weights = cast(CalibratedWeights, self.compressor.weights)
        rates = {"budget": options.lr_budget, "saliency": options.lr_score, "signal_mix": options.lr_score}
        groups: dict[float, list[Any]] = {}
        for name, parameter in weights.named_parameters():
            rate = next((rate for part, rate in rates.items() if part in name), options.lr_other)
            groups.setdefault(rate, []).append(parameter)
        adapted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if adapted:
            groups.setdefault(options.lr_lora, []).extend(adapted)
        optimizer = torch.optim.Adam([{"params": parameters, "lr": rate} for rate, parameters in groups.items()])
        total = self.trainer.estimated_stepping_batches

        def scale(step: int) -> float:
            decay = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(step / max(total, 1), 1.0)))
            return min(1.0, (step + 1) / max(options.warmup, 1)) * decay

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
