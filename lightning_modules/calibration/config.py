"""The options of a calibration, of its model and of its data, and the settings of a Trainer that it can run under."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision

from acckv.config import HeadBudgets, LoraScope, When
from acckv.data.calibration_record import Objective
from acckv.data.media_options import MediaOptions
from acckv.errors import InputError
from acckv.method.weights import WEIGHT_GROUPS

GeneralBy = Literal["context", "random_text"]
Divergence = Literal["forward", "reverse"]
Features = Literal["hidden", "attention"]
CacheKind = Literal["nothing", "embeddings", "prefill"]
Dtype = Literal["float32", "bfloat16", "float16", "auto"]
Source = Literal["clips", "music_avqa", "folder", "precomputed", "benchmark"]

#: Linear layers that LoRA adapts; a mixture of experts has only the first four by name.
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
#: What the low-ratio stage learned holds below this many times the least ratio.
LOW_RATIO_REACH = 1.5
#: Precision of all weights that a Trainer may be asked for -> dtype of those that are frozen.
FROZEN = {"bf16-true": "bfloat16", "16-true": "float16"}


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
        lr_score: peak learning rate of the saliency scorer and the signal mix.
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
        ranges |= {"mixed_share": (0, 1, "()"), "repeated_tokens": (1, math.inf, "[)")}
        ranges |= {name: positive for name in ("ratio_power", "temperature_end", "temperature_start")}
        ranges |= {name: (0, math.inf, "[)") for name in ("feature_loss_weight", "feature_loss_min_ratio")}
        _check_ranges("model", vars(self), ranges)
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


@dataclass(frozen=True, kw_only=True)
class DataConfig(MediaOptions):
    """Options of the clips and questions.

    Args:
        base_model: model whose processor encodes the clips; linked to the model's by train.py.
        when: point of compression; linked to the model's.
        calibrate_for: linked to the model's; with 'general' nothing is asked about the training clips.
        general_by: linked to the model's.
        source: origin of the clips: 'clips' generates clips with questions on first use; 'music_avqa' reads your own;
            'folder' takes plain videos and lets the model, with its full cache, answer `prompts` about each of them
            once; 'precomputed' takes embeddings of your own towers for a plain decoder; 'benchmark' takes two splits of
            a benchmark, or your own questions.jsonl (benchmark 'custom').
        train_clips: generated clips to train on.
        validation_clips: generated clips of the validation split.
        cache_dir: folder of generated clips; None is the user's cache folder.
        train_questions: question file in the MUSIC-AVQA format (source 'music_avqa').
        validation_questions: question file of the validation, in the same format.
        video_root: folder of their ``<video_id>.mp4``.
        folder: folder of videos, also in subfolders (source 'folder').
        validation_folder: folder of other videos to validate on; None holds out a share of `folder`.
        precomputed: folder of embeddings, with questions.jsonl (source 'precomputed'); see acckv.data.precomputed.
        benchmark: name of a benchmark, as for evaluate.py (source 'benchmark').
        root: folder of the benchmark, as its authors distribute it, or its hub id.
        train_split: split of the benchmark to train on.
        validation_split: split of the benchmark to validate on.
        validation_share: share of the videos (or precomputed clips) that is held out, above 0 and below 1. Each is by
            its name alone, so that none changes sides as others come; a small folder may hold out more or fewer.
        prompts: prompts asked of every clip (source 'folder'); None takes a few generic ones.
        max_new_tokens: tokens of the longest answer to them.
        dtype: dtype of the model that answers them; linked to the model's.
        load_options: options of the model and its processor; linked to the model's.
        batch_size: clips a step and process.
        questions_per_clip: questions about each clip in a step; 0 takes all.
        cache: data that is kept of a clip after its first visit. 'embeddings': it is not decoded and encoded again
            (hidden size x tokens numbers a clip). 'prefill': the base model's prefill is not run again either (its
            keys and values too), nor what it says about the clip's questions, all of which it is asked on the first
            visit (likeliest words and features of the answers' tokens), so that a step costs the student alone.
            With `when: prompt` nothing is kept.
        cache_memory_gb: memory of each process for what is kept, in GB; the rest is in files of the run's folder, which
            the system frees when the process ends.
        teacher_top_p: share of the teacher's distributions that is kept: the likeliest words that cover it, all others
            as one. The KL is then that of these words and the rest, a lower bound. 1 keeps all words, as do
            vocabularies of up to 1024.
        seed: seed of the order, and of the questions drawn.
        clips_seed: seed of the generated clips.
        num_workers: processes that read clips ahead, for each process that trains; 0 reads them when they are due.
        system_prompt: text that the model is told before the media; None leaves that to its chat template.

    Raises:
        InputError: an option is out of range, missing, or of no use with the source; it is named.
    """

    base_model: str = "tiny"
    when: When = "context"
    calibrate_for: Objective = "task"
    general_by: GeneralBy = "context"
    source: Source = "clips"
    train_clips: int = 768
    validation_clips: int = 24
    cache_dir: str | None = None
    train_questions: str | None = None
    validation_questions: str | None = None
    video_root: str | None = None
    folder: str | None = None
    validation_folder: str | None = None
    precomputed: str | None = None
    benchmark: str | None = None
    root: str | None = None
    train_split: str = "train"
    validation_split: str = "validation"
    validation_share: float = 0.1
    prompts: list[str] | None = None
    max_new_tokens: int = 64
    dtype: Dtype = "float32"
    load_options: dict[str, Any] | None = None
    batch_size: int = 8
    questions_per_clip: int = 0
    cache: CacheKind = "embeddings"
    cache_memory_gb: float = 8.0
    teacher_top_p: float = 0.999
    seed: int = 0
    clips_seed: int = 0
    num_workers: int = 0
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("train_clips", "validation_clips", "batch_size", "max_new_tokens")
        ranges: dict[str, tuple[float, float, str]] = {name: (1, math.inf, "[)") for name in counts}
        ranges |= {name: (0, math.inf, "[)") for name in ("questions_per_clip", "num_workers", "cache_memory_gb")}
        ranges |= {"teacher_top_p": (0, 1, "(]"), "validation_share": (0, 1, "()")}
        _check_ranges("data", vars(self), ranges)
        if self.prompts is not None and not all(prompt.strip() for prompt in self.prompts or [""]):
            raise InputError("holds an empty prompt, or none", field="data.prompts")
        if self.general_by == "random_text" and self.when == "prompt":
            raise InputError("is 'random_text', which is asked after the compression", field="model.general_by")
        needed = {
            "clips": (),
            "music_avqa": ("train_questions", "validation_questions"),
            "folder": ("folder",),
            "precomputed": ("precomputed",),
            "benchmark": ("benchmark", "root"),
        }
        if self.source not in needed:
            raise InputError(f"{self.source!r} is not one of {', '.join(needed)}", field="data.source")
        for name in needed[self.source]:
            if getattr(self, name) is None:
                raise InputError(f"is needed with source '{self.source}'", field=f"data.{name}")
        if self.source == "precomputed":
            if self.when == "prompt":
                message = "is 'prompt', and precomputed clips end before the question"
                raise InputError(message, field="model.when")
            for name, value in MediaOptions().limits().items():
                if getattr(self, name) != value:
                    raise InputError("is of no use with source 'precomputed'", field=f"data.{name}")


def _check_ranges(group: str, options: Mapping[str, Any], ranges: Mapping[str, tuple[float, float, str]]) -> None:
    """Refuse numbers outside of their intervals: ``(0, 1, "(]")`` is above 0 and at most 1."""
    for name, (least, most, ends) in ranges.items():
        value = options[name]
        low = value > least if ends[0] == "(" else value >= least
        high = value < most if ends[1] == ")" else value <= most
        if not (low and high):
            words = f"{'above' if ends[0] == '(' else 'at least'} {least}"
            words += "" if most == math.inf else f" and {'below' if ends[1] == ')' else 'at most'} {most}"
            raise InputError(f"{value} is not {words}", field=f"{group}.{name}")


def freeze_precision(config: Any, given: Collection[str]) -> None:
    """Let a half precision of all weights be that of the frozen model; what is learned stays float32.

    Args:
        config: options of train.py, changed in place; given: names of the model's that were given.

    Raises:
        InputError: another dtype was given.
    """
    asked = config.trainer.precision
    if asked not in FROZEN:
        return
    dtype = FROZEN[asked]
    if "dtype" in given and config.model.dtype != dtype:
        raise InputError(f"is {asked}, and model.dtype is {config.model.dtype}; give one", field="trainer.precision")
    config.trainer.precision, config.model.dtype, config.data.dtype = "32-true", dtype, dtype
    warnings.warn(
        f"trainer.precision {asked}: the frozen model is in {dtype} (model.dtype); what is learned stays float32",
        stacklevel=2,
    )


def check_trainer(trainer: Any) -> None:
    """Refuse settings under which something else would be trained than was asked for; before anything is loaded.

    Raises:
        InputError: it names the setting and what to set instead.
    """
    for name, neutral in (("overfit_batches", 0.0), ("limit_train_batches", 1.0)):
        value = getattr(trainer, name)
        # 1 is one batch, 1.0 are all
        if not trainer.fast_dev_run and (value != neutral or type(value) is not float):
            message = "would end the training before its schedule does; set trainer.max_steps or data.train_clips"
            raise InputError(message, field=f"trainer.{name}")
    plugin = trainer.precision_plugin
    if isinstance(plugin, HalfPrecision):
        raise InputError(
            f"is {plugin.precision}, which would round what is learned; take 32-true, and {FROZEN[plugin.precision]} "
            "as the model's dtype: the frozen model alone is in half precision then",
            field="trainer.precision",
        )
    if isinstance(plugin, DoublePrecision):
        raise InputError(
            "is 64-true; take 32-true, bf16-mixed, 16-mixed, bf16-true or 16-true", field="trainer.precision"
        )
