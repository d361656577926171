"""The options of a calibration's training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from acckv.config import HeadBudgets, LoraScope, When
from acckv.data.calibration_record import Objective
from acckv.errors import InputError
from acckv.method.weights import WEIGHT_GROUPS

GeneralBy = Literal["context", "random_text"]
WarmStart = Literal["kvzip"]
Divergence = Literal["forward", "reverse"]
Features = Literal["hidden", "attention"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]

#: Linear layers that LoRA adapts; a mixture of experts has only the first four by name.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: What the low-ratio stage learned holds below this many times the least ratio.
LOW_RATIO_REACH = 1.5


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Options of the training.

    Args:
        base_model: frozen model: 'tiny' (packaged), a folder or a hub id.
        when: compress after the media ('context') or after the whole prompt ('prompt').
        head_budgets: entries of a layer's KV heads: 'equal', 'learned' with the budgets, or 'joint', one ranking over
            all heads.
        preset: training-free method that the weights start from and are residuals of: 'context' or 'paper'.
        compression: options of the preset that are to be others, such as ``{integration: true}``.
        calibrate_for: what is trained for. 'task': answers to the data's questions; what none of them asks about is
            not kept. 'general': whatever can be asked, without questions: a stretch of each clip's own context is fed
            in again, to be read as with the full cache. 'mixed': both.
        general_by: 'context' is that; 'random_text' asks questions of random words without answers in its place.
        repeated_tokens: length of that stretch.
        repeated_words: match the next words there, too, not features alone: for embeddings that are those of words.
        mixed_share: share of the steps of 'mixed' that are 'general' ones.
        divergence: loss over words. 'forward' is KL(teacher || student): the student covers all that the teacher may
            say. 'reverse' is KL(student || teacher): it says nothing that the teacher would not.
        feature_loss: features that are brought close to the teacher's in every layer besides: 'hidden' states,
            'attention' outputs or None.
        feature_loss_weight: weight of that term, a share of the teacher's mean square in the batch of all processes.
            Accumulated batches have one scale each: they equal one large batch exactly with `feature_loss: null` alone.
        feature_loss_min_ratio: least ratio at which that term counts. With next to nothing kept no layer can give its
            teacher's output, and trying costs the answer.
        warm_start: 'kvzip' begins with what KVzip (arXiv 2505.23416) keeps, measured on `warm_start_clips`: budgets as
            its ranking gives them, on the average, and a scorer that is fitted to its scores. null begins with the
            preset.
        warm_start_clips: clips of that measurement, each prefilled and read once more.
        trainable: groups of weights that are trained, of budgets, gains, probes, scorer, positions, redundancy,
            merging and alignment; the others stay at the preset.
        ratio_min: least kept share drawn at a step.
        ratio_max: largest kept share drawn at a step.
        ratio_power: exponent of the draw: 1 draws ratios log-uniformly; above 1, the low ones more often.
        low_ratio_share: share of the training that sees `ratio_min` alone, the low-ratio stage. What it learned then
            holds, LoRA included, for ratios below 1.5 times `ratio_min`; all others start from it. 0 for none.
        full_cache_probability: share of the steps in which the student reads the full cache, so that LoRA costs nothing
            there.
        temperature_start: temperature of the gates at the start, in standard deviations of the score.
        temperature_end: temperature of the gates at the end; small, so that what is trained is what is shipped.
        temperature_after_low_ratio: temperature of the gates after the low-ratio stage, in place of
            `temperature_start`.
        anneal_fraction: share of the training, or of each of its two stages, in which the temperature falls; it then
            stays at its end.
        lora_rank: rank of LoRA; 0 trains none.
        lora_alpha: LoRA scale times rank; None is twice the rank.
        lora_targets: linear layers of the decoder that LoRA adapts, by name.
        lora_scope: tokens that LoRA adapts: 'after' compression only, 'all' the prompt too.
        lr_budget: peak learning rate of the budgets of layers, modalities and heads.
        lr_score: peak learning rate of the linear scorer and the signal mix.
        lr_scorer: peak learning rate of the scorer's network.
        lr_lora: peak learning rate of LoRA.
        lr_redundancy: peak learning rate of what an entry loses for its neighbours.
        lr_other: peak learning rate of all other weights.
        warmup: steps of linear warm-up; a cosine to 5 % follows. Both begin anew after the low-ratio stage.
        validation_ratios: ratios of the validation KL.
        gradient_checkpointing: repeat the student's forward of each layer in backward instead of holding what is in it:
            less memory for one more forward. With `lora_scope: all` the prompt's part is held all the same.
        dtype: dtype of the frozen model: float32, bfloat16, float16 or auto.
        load_options: options of transformers' from_pretrained for the frozen model, such as ``{revision: main}`` or
            ``{quantization_config: {load_in_4bit: true}}``.
        seed: seed of the ratio draws.

    Raises:
        InputError: an option cannot be trained with; it is named.
    """

    base_model: str = "tiny"
    when: When = "context"
    head_budgets: HeadBudgets = "equal"
    preset: str = "context"
    compression: dict[str, Any] | None = None
    calibrate_for: Objective = "task"
    general_by: GeneralBy = "context"
    repeated_tokens: int = 128
    repeated_words: bool = False
    mixed_share: float = 0.5
    divergence: Divergence = "forward"
    feature_loss: Features | None = "attention"
    feature_loss_weight: float = 1.0
    feature_loss_min_ratio: float = 0.05
    warm_start: WarmStart | None = None
    warm_start_clips: int = 64
    trainable: tuple[str, ...] = tuple(WEIGHT_GROUPS)
    ratio_min: float = 0.02
    ratio_max: float = 0.5
    ratio_power: float = 1.6
    low_ratio_share: float = 0.0
    full_cache_probability: float = 0.1
    temperature_start: float = 0.5
    temperature_end: float = 0.005
    temperature_after_low_ratio: float = 0.1
    anneal_fraction: float = 0.6
    lora_rank: int = 16
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = LORA_TARGETS
    lora_scope: LoraScope = "after"
    lr_budget: float = 0.02
    lr_score: float = 0.02
    lr_scorer: float = 2e-3
    lr_lora: float = 2e-3
    lr_redundancy: float = 0.05
    lr_other: float = 0.01
    warmup: int = 20
    validation_ratios: tuple[float, ...] = (0.2, 0.05)
    gradient_checkpointing: bool = False
    dtype: Dtype = "float32"
    load_options: dict[str, Any] | None = None
    seed: int = 0

    @property
    def repeated_share(self) -> float:
        """Share of the steps that feed the context in again, in place of questions."""
        shares = {"task": 0.0, "general": 1.0, "mixed": self.mixed_share}
        return shares[self.calibrate_for] if self.general_by == "context" else 0.0

    @property
    def low_ratio_below(self) -> float:
        """Ratios below it are those of the low-ratio stage; 0 without one."""
        return LOW_RATIO_REACH * self.ratio_min if self.low_ratio_share else 0.0

    def __post_init__(self) -> None:
        share, part, positive = (0, 1, "(]"), (0, 1, "[)"), (0, math.inf, "()")
        ranges: dict[str, tuple[float, float, str]]
        ranges = {name: share for name in ("ratio_min", "ratio_max", "anneal_fraction")}
        ranges |= {name: part for name in ("full_cache_probability", "low_ratio_share")}
        ranges |= {"mixed_share": (0, 1, "()")}
        ranges |= {name: (1, math.inf, "[)") for name in ("repeated_tokens", "warm_start_clips")}
        ranges |= {name: positive for name in ("ratio_power", "temperature_end", "temperature_start")}
        ranges |= {name: (0, math.inf, "[)") for name in ("feature_loss_weight", "feature_loss_min_ratio")}
        check_ranges("model", vars(self), ranges)
        if self.ratio_min > self.ratio_max:
            raise InputError(f"{self.ratio_min} is more than ratio_max, {self.ratio_max}", field="model.ratio_min")
        for name in self.trainable:
            if name not in WEIGHT_GROUPS:
                raise InputError(f"{name!r} is not one of {', '.join(WEIGHT_GROUPS)}", field="model.trainable")
        if self.repeated_share and not self.repeated_words and self.feature_loss is None:
            raise InputError("is off, and features are matched alone; set feature_loss", field="model.repeated_words")
        if not self.trainable and self.lora_rank <= 0:
            raise InputError("is empty, and there is no LoRA either", field="model.trainable")
        if self.temperature_end > self.temperature_start:
            raise InputError("is above temperature_start", field="model.temperature_end")
        if not self.low_ratio_share:
            return
        if self.temperature_after_low_ratio < self.temperature_end:
            raise InputError("is below temperature_end", field="model.temperature_after_low_ratio")
        if self.low_ratio_below >= self.ratio_max:
            raise InputError(f"leaves no ratio above {LOW_RATIO_REACH:g} times ratio_min", field="model.ratio_max")
        if self.lora_scope == "all":
            raise InputError("has an adapter of its own, which cannot act on the prompt", field="model.low_ratio_share")


def check_ranges(group: str, options: Mapping[str, Any], ranges: Mapping[str, tuple[float, float, str]]) -> None:
    """Refuse numbers outside of their intervals: ``(0, 1, "(]")`` is above 0 and at most 1."""
    for name, (least, most, ends) in ranges.items():
        value = options[name]
        low = value > least if ends[0] == "(" else value >= least
        high = value < most if ends[1] == ")" else value <= most
        if not (low and high):
            words = f"{'above' if ends[0] == '(' else 'at least'} {least}"
            words += "" if most == math.inf else f" and {'below' if ends[1] == ')' else 'at most'} {most}"
            raise InputError(f"{value} is not {words}", field=f"{group}.{name}")
