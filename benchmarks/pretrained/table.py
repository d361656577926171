"""Rows of this package's policies and exports, through its own evaluation."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

import acckv
from acckv import KVCompressor
from acckv.config import HeadBudgets
from acckv.evaluation.fingerprint import compressor_digest
from acckv.evaluation.results import CALIBRATED, PREDICTIONS_FILE, REFERENCE_NAMES, Answer, read_predictions, with_heads
from benchmarks.pretrained.clips import longest_answer, tokenize, write_clips
from benchmarks.pretrained.kinds import KINDS, SIZES, make_clip
from benchmarks.pretrained.results import Cell, Row, append_rows, read_rows
from benchmarks.pretrained.scoring import score
from lightning_modules.evaluation.datamodule import EvaluationData
from lightning_modules.evaluation.options import EvaluationOptions
from lightning_modules.evaluation.run import run_evaluation

SYSTEM = f"acckv {acckv.__version__}"


class Learned(NamedTuple):
    """A calibration in words, and the digest of what it learned; both empty where nothing was."""

    calibrated_on: str
    digest: str


NOTHING = Learned("", "")


@dataclass(frozen=True)
class Measurement:
    """The decoder and the clips that rows are about.

    Attributes:
        output: folder of everything; decoder: folder of the decoder; digest: of its weights.
        model, processor: the decoder, loaded.
        length: of a clip in tokens; clips: of each kind; seed: of random eviction and of the intervals.
        batch_size: clips that are prefilled together.
    """

    output: Path
    decoder: Path
    digest: str
    model: Any
    processor: Any
    length: int
    clips: int
    seed: int
    batch_size: int

    def cell(
        self, kind: str, policy: str, head_budgets: str, ratio: float, learned: Learned = NOTHING, system: str = SYSTEM
    ) -> Cell:
        """The cell of a policy at a ratio, on clips of a kind."""
        return Cell(
            decoder=self.digest,
            kind=kind,
            length=self.length,
            clips=self.clips,
            system=system,
            policy=policy,
            head_budgets="" if policy in REFERENCE_NAMES else head_budgets,
            calibrated_on=learned.calibrated_on,
            export=learned.digest,
            ratio=ratio,
            seed=self.seed,
        )

    def missing(self, cells: Iterable[Cell]) -> list[Cell]:
        """Those of some cells that have no row yet."""
        known = {row.cell for row in read_rows(self.output)}
        return [cell for cell in cells if cell not in known]


def measure_policies(
    given: Measurement, kind: str, policies: Sequence[str], head_budgets: Sequence[HeadBudgets], ratios: Sequence[float]
) -> None:
    """Add the rows of training-free policies that are missing, with those of the full cache and the controls.

    All that is missing shares one run, and so one prefill of each clip. A policy that ranks no entries of a head has
    equal head budgets alone.
    """
    methods = [(policy, heads) for policy in policies for heads in head_budgets if _has(policy, heads)]
    wanted = (given.cell(kind, *method, ratio) for method in methods for ratio in ratios if 0 < ratio < 1)
    lacking = given.missing(wanted)
    if lacking:
        _run(given, kind, NOTHING, lacking)


def _has(policy: str, head_budgets: HeadBudgets) -> bool:
    return KVCompressor(policy, head_budgets=head_budgets).planners.default.head_budgets == head_budgets


def measure_export(given: Measurement, kind: str, export: Path, ratios: Sequence[float]) -> None:
    """Add the rows of a calibrated export that are missing."""
    compressor = KVCompressor.from_pretrained(export)
    found, heads = compressor.calibration, compressor.planners.default.head_budgets
    on = "unknown"
    if found is not None:
        on = ": ".join(filter(None, (found.calibrate_for, "+".join(found.kinds)))) + f", {found.steps} steps"
    learned = Learned(on, compressor_digest(compressor))
    lacking = given.missing(given.cell(kind, CALIBRATED, heads, ratio, learned) for ratio in ratios)
    if lacking:
        _run(given, kind, learned, lacking, compressor=str(export))


def _run(given: Measurement, kind: str, learned: Learned, cells: Sequence[Cell], **options: Any) -> None:
    """One evaluation, of the policies, head budgets and ratios of some cells; what was cut off goes on where it was."""
    size, tokenizer = SIZES[given.length], given.processor.tokenizer
    clips = given.output / "clips" / f"{kind}-{given.length}-{given.clips}"
    write_clips(clips, [kind], {"test": given.clips}, size, given.model, tokenizer)
    methods = {with_heads(cell.policy, cell.head_budgets): (cell.policy, cell.head_budgets) for cell in cells}
    policies, head_budgets = (list(dict.fromkeys(names)) for names in zip(*methods.values(), strict=True))
    ratios = sorted({cell.ratio for cell in cells}, reverse=True)
    settings = [given.digest, given.seed, given.batch_size, learned.digest, policies, head_budgets, ratios]
    name = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    folder = given.output / "evaluations" / f"{clips.name}-{name}"
    limit, started = longest_answer(kind, given.clips, size, tokenizer), time.monotonic()
    results = run_evaluation(
        EvaluationOptions(
            model=str(given.decoder),
            policies=policies,
            head_budgets=head_budgets,
            ratios=ratios,
            output=str(folder),
            data=EvaluationData(precomputed=str(clips)),
            word_tokens=limit,
            description_tokens=limit,
            batch_size=given.batch_size,
            seed=given.seed,
            timelines=0,
            update_card=False,
            accelerator="cpu",
            **options,
        ),
        console=Console(quiet=True, width=200),
        model=(given.model, given.processor),
    )
    minutes = (time.monotonic() - started) / 60 / len(results.rows)
    answers: dict[tuple[str, float], list[Answer]] = {}
    for answer in read_predictions(folder / PREDICTIONS_FILE):
        answers.setdefault(answer.setting, []).append(answer)
    text = tokenize(make_clip(kind, "test", 0, size), tokenizer).text
    rows = []
    for row in results.rows:
        policy, heads = methods.get(row.policy, (row.policy, ""))
        cell = given.cell(kind, policy, heads, row.ratio, learned if policy == CALIBRATED else NOTHING)
        own = answers[row.setting]
        scores = [(one.clip, score(KINDS[kind].scored, one.prediction, one.answer)) for one in own]
        rows.append(Row.of(cell, scores, row.kept_entries + text, sum(one.cut for one in own), minutes))
    append_rows(given.output, rows)
