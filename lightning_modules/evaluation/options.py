"""The options of an evaluation, and the compressors that they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from lightning.pytorch.accelerators import AcceleratorRegistry

from acckv import KVCompressor
from acckv.benchmarks import Mode
from acckv.config import HeadBudgets, When
from acckv.errors import InputError
from acckv.evaluation.results import AUDIO_EVICTED, CALIBRATED, CONTROL, FULL, VIDEO_EVICTED, Setting, with_heads
from acckv.io.registry import load_plugins
from acckv.method.modality import Modality
from acckv.policies import POLICIES, Policy, Random, make_policy
from acckv.policies.single_modality import EvictedModality
from lightning_modules.evaluation.datamodule import EvaluationData, Shard


@dataclass(frozen=True)
class EvaluationOptions:
    """Answer the same questions from every policy's compressed cache at every ratio.

    The full cache and the controls (all audio and video entries evicted, or those of one modality) are always measured.

    Args:
        model: the AV-LLM: tiny (packaged), a folder or a hub id.
        compressor: export of a calibration, a folder or a hub id; the policy acckv-calibrated.
        policies: names, separated by commas, or a list of them; all by default. A policy with other options than its
            defaults is `{class_path: snapkv, init_args: {window_size: 64}}` in the list.
        ratios: kept shares of the audio and video entries, 0 to 1, separated by commas.
        when: compress after the media, before any question is seen (context), or after the whole prompt (prompt).
        head_budgets: entries of a layer's KV heads: equal, joint (one ranking over all heads) or learned (an export's);
            of several, separated by commas, each is measured. None is equal, and what an export was calibrated with.
        limit: measure only this many clips, each with all its questions.
        output: folder of results.json, predictions.jsonl, failures.json, pareto.png, budgets.png and report.html. A run
            that was cut off goes on where it was.
        overwrite: discard what the output folder holds of an evaluation with other settings.
        seed: of random eviction and of the intervals.
        batch_size: clips that are prefilled together.
        data: what is asked about.
        score: parser that the accuracy is by, official or robust; the other is reported beside it. None is official for
            a benchmark and robust for generated clips and question files.
        word_tokens: longest short answer (a word, a letter, yes or no), in tokens. None is long enough for every right
            answer with the model's tokenizer, and at least 4, or what the benchmark's authors allow.
        description_tokens: longest answer of another kind, in tokens. None is as above, and at least 40.
        timelines: clips whose kept entries the report shows over time.
        strict: a clip that cannot be read is an error. Otherwise its questions are left out, and it is listed.
        update_card: write the measured table into the model card of the export, where that is a folder.
        dtype: of the model: float32, bfloat16, float16, or auto (what the checkpoint is stored in).
        load_options: of transformers' from_pretrained, such as {revision: main} or
            {quantization_config: {load_in_4bit: true}}.
        accelerator: of the Trainer: auto, cpu, gpu, or another that Lightning knows by name (cuda, mps).
        devices: processes on this machine, each with a share of the batches.
        shard: this machine's part of the batches, such as 2/4; give each part a folder, and join them with
            `evaluate.py merge`.
        plugins: your own modules or .py files that register policies, families or benchmarks, separated by commas.
    """

    model: str = "tiny"
    compressor: str = "runs/calib/export"
    policies: list[str | dict[str, Any]] | str = field(
        default_factory=lambda: list[str | dict[str, Any]]((*POLICIES, CALIBRATED))
    )
    ratios: list[float] | float | str = field(default_factory=lambda: [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.0])
    when: When = "context"
    head_budgets: list[HeadBudgets] | str | None = None
    limit: int | None = None
    output: str = "runs/eval"
    overwrite: bool = False
    seed: int = 0
    batch_size: int = 24
    data: EvaluationData = field(default_factory=EvaluationData)
    score: Mode | None = None
    word_tokens: int | None = None
    description_tokens: int | None = None
    timelines: int = 3
    strict: bool = False
    update_card: bool = True
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    load_options: dict[str, Any] | None = None
    accelerator: str = "auto"
    devices: int = 1
    shard: str | None = None
    plugins: list[str] | str = field(default_factory=list)

    def __post_init__(self) -> None:
        load_plugins(self.plugins)
        for name in ("limit", "batch_size", "word_tokens", "description_tokens", "devices"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{value} is less than 1", field=name)
        for name in ("seed", "timelines"):
            if getattr(self, name) < 0:
                raise InputError(f"{getattr(self, name)} is less than 0", field=name)
        known = ("auto", "gpu", *sorted(AcceleratorRegistry.available_accelerators()))
        if self.accelerator not in known:
            raise InputError(f"{self.accelerator!r} is not one of {', '.join(known)}", field="accelerator")
        self.policy_list()
        self.head_budget_list()
        self.ratio_list()
        Shard.parse(self.shard)

    @property
    def mode(self) -> Mode:
        """The parser that the accuracy is by."""
        return self.score or ("robust" if self.data.benchmark is None else "official")

    def policy_list(self) -> dict[str, Policy | None]:
        """The policies by label, each once; None is the calibrated compressor.

        Raises:
            InputError: an unknown policy or option.
        """
        given = self.policies
        if isinstance(given, str):
            given = [name.strip() for name in given.split(",") if name.strip()]
        found: dict[str, Policy | None] = {}
        for one in given:
            if one == CALIBRATED:
                found[CALIBRATED] = None
            elif isinstance(one, str) and one not in POLICIES:
                raise InputError(f"{one!r} is not one of {', '.join(POLICIES)}, {CALIBRATED}", field="policies")
            else:
                policy = make_policy(one)
                found[policy.label] = policy.seeded(self.seed)
        return found

    def head_budget_list(self) -> list[str | None]:
        """The budgets of the KV heads that are measured, each once; None for those that are not chosen.

        Raises:
            InputError: one that there is not.
        """
        given, known = self.head_budgets, get_args(HeadBudgets)
        names = [name.strip() for name in given.split(",")] if isinstance(given, str) else given or ()
        for name in names:
            if name not in known:
                raise InputError(f"{name!r} is not one of {', '.join(known)}", field="head_budgets")
        return list(dict.fromkeys(names)) or [None]

    def ratio_list(self) -> list[float]:
        """The ratios, each once, largest first.

        Raises:
            InputError: a ratio that is no number from 0 to 1.
        """
        given = [self.ratios] if isinstance(self.ratios, int | float) else self.ratios
        parts: Sequence[float | str] = given.split(",") if isinstance(given, str) else given
        ratios = []
        for part in parts:
            try:
                ratio = float(part)
            except ValueError as error:
                raise InputError(f"{part!r} is not a number from 0 to 1", field="ratios") from error
            if not 0 <= ratio <= 1:
                raise InputError(f"{ratio:g} is not a number from 0 to 1", field="ratios")
            ratios.append(ratio)
        return sorted(set(ratios), reverse=True)


def build_compressors(options: EvaluationOptions) -> dict[Setting, KVCompressor]:
    """The compressor of each row of the table: the full cache, the controls, then every policy at every ratio.

    At ratio 0 all training-free policies hold the same cache, the control's; the calibrated compressor has a row of
    its own there, which shows whether its adapter answers without the media.

    Raises:
        InputError: the export of the calibrated compressor is not usable.
    """
    found: dict[Setting, KVCompressor] = {
        Setting(FULL, 1.0): KVCompressor("full", when=options.when),
        Setting(CONTROL, 0.0): KVCompressor(Random(seed=options.seed), when=options.when),
        Setting(AUDIO_EVICTED, 0.0): KVCompressor(EvictedModality(Modality.AUDIO), when=options.when),
        Setting(VIDEO_EVICTED, 0.0): KVCompressor(EvictedModality(Modality.VIDEO), when=options.when),
    }
    for (label, policy), heads in product(options.policy_list().items(), options.head_budget_list()):
        if policy is not None and policy.keeps_all:
            continue
        shared = {"when": options.when} if heads is None else {"when": options.when, "head_budgets": heads}
        compressor = _load_compressor(options, shared) if policy is None else KVCompressor(policy, **shared)
        name = with_heads(label, compressor.planners.default.head_budgets)
        ratios = [ratio for ratio in options.ratio_list() if ratio > 0 or policy is None]
        found |= {Setting(name, ratio): compressor for ratio in ratios if Setting(name, ratio) not in found}
    return found


def _load_compressor(options: EvaluationOptions, shared: dict[str, Any]) -> KVCompressor:
    name = options.compressor
    if not Path(name).exists() and (name == EvaluationOptions.compressor or name.count("/") != 1):
        remedy = "no such folder; calibrate first (python train.py --config configs/calib.yaml) or leave out the policy"
        raise InputError(f"{remedy} {CALIBRATED}", source=name, field="compressor")
    compressor = KVCompressor.from_pretrained(name, **shared)
    if compressor.weights is None:
        raise InputError("holds no learned weights", source=name, field="compressor")
    return compressor
