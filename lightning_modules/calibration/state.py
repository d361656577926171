"""What a calibration has learned: in the running model, in checkpoints, and in the export."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

from lightning import LightningModule
from torch import Tensor

from acckv.compressor import KVCompressor
from acckv.errors import InputError
from acckv.method.weights import CalibratedWeights
from acckv.runtime.lora import LoraWeights
from acckv.runtime.session import Session
from lightning_modules.calibration.resume import TRAINING, Resumed, check_fixed
from lightning_modules.calibration.schedule import Stages

#: What a checkpoint holds of the settled ratios: weights by the beginning of their names, and LoRA.
SETTLED, SETTLED_LORA = "compressor.low_ratio_weights.", "low_ratio_lora"


class CalibrationState(LightningModule):
    """The learned part of a calibration. A checkpoint holds it alone, without the frozen model.

    Attributes:
        compressor: with the weights; session: open on the model, with LoRA; both None before `configure_model`.
        trained_steps: optimiser steps of this process; resumed: where it went on from, if it did.
        settled_at: the step at which the low-ratio stage ended, None before that.
    """

    compressor: KVCompressor

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # a checkpoint holds what was trained
        self.session: Session | None = None
        self.trained_steps = 0
        self.resumed: Resumed | None = None
        self.settled_at: int | None = None

    @property
    def options(self) -> Any:
        return self.hparams

    @property
    def stages(self) -> Stages:
        raise NotImplementedError

    @property
    def low_ratio_below(self) -> float:
        raise NotImplementedError

    @property
    def live(self) -> Session:
        if self.session is None:
            raise RuntimeError("the model is built by configure_model, which a Trainer calls")
        return self.session

    @property
    def weights(self) -> CalibratedWeights:
        """What is learned besides LoRA."""
        return cast(CalibratedWeights, self.compressor.weights)

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
            compressor.config,
            compressor.weights,
            lora(low_ratio=False),
            compressor.lora_scope,
            compressor.base,
            low_ratio=low_ratio,
        )

    def settle(self, lora: dict[str, Tensor] | None = None) -> None:
        """Keep what was learned so far, or this LoRA, for the ratios of the low-ratio stage."""
        self.compressor.keep_low_ratio(self.low_ratio_below)
        if self.live.attached is not None:
            self.live.attached.keep_low_ratio(lora)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = self._trained()
        kept = {k: v for k, v in checkpoint["state_dict"].items() if k in trained or k.startswith(SETTLED)}
        checkpoint["state_dict"] = kept
        checkpoint[TRAINING] = {"planned": self.stages.steps, "settled_at": self.settled_at}
        if self.compressor.low_ratio is not None and self.live.attached is not None:
            checkpoint[SETTLED_LORA] = self.live.attached.tensors(low_ratio=True)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make room for what the checkpoint holds, which is loaded next.

        Raises:
            InputError: it is another module's, contradicts the options, or there is no step left to train.
        """
        self.resumed = Resumed.read(checkpoint, self._trainer)
        check_fixed(self.options, checkpoint)
        self.configure_model()
        self._restore_settled(checkpoint)
        if missing := self._trained() - checkpoint["state_dict"].keys():
            raise InputError(f"lacks {len(missing)} of the trained weights, {min(missing)} say", field="ckpt_path")

    def load_learned(self, checkpoint: dict[str, Any]) -> None:
        """Take what was learned from another checkpoint of this run."""
        self._restore_settled(checkpoint)
        self.load_state_dict(checkpoint["state_dict"], strict=False)

    def _restore_settled(self, checkpoint: dict[str, Any]) -> None:
        self.settled_at = checkpoint[TRAINING]["settled_at"]
        if self.settled_at is not None:
            self.settle(checkpoint.get(SETTLED_LORA))  # its weights are loaded next

    def _trained(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}
