"""One evaluation from options to files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from lightning import Trainer, seed_everything
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from acckv import CompressionConfig, KVCompressor
from acckv.adapters import load_model
from acckv.config import PolicyName, When
from acckv.controls import EvictedModality
from acckv.data.records import Record
from acckv.errors import InputError
from acckv.metrics.answers import OFFICIAL, UNPARSED, all_groups, answer_vocabulary
from acckv.modality import Modality
from acckv.report.card import write_card
from acckv.report.plots import plot_budgets, plot_pareto
from acckv.report.results import (
    AUDIO_EVICTED,
    CONTROL,
    CONTROLS,
    FULL,
    PREDICTIONS_FILE,
    RESULTS_FILE,
    VIDEO_EVICTED,
    Results,
    write_predictions,
    write_results,
)
from acckv.report.table import control_warning, render_group_tables, render_table
from lightning_modules.evaluation import Cell, EvaluationModule
from lightning_modules.evaluation_data import EvaluationData, clip_loader, group_by_clip
from lightning_modules.evaluation_report import write_report

CALIBRATED = "acckv-calibrated"
POLICIES = (*get_args(PolicyName), CALIBRATED)
PARETO_FILE, BUDGETS_FILE = "pareto.png", "budgets.png"
_TABLE_WIDTH = 120  # the group tables need this much; a narrower terminal wraps them


@dataclass(frozen=True)
class EvaluationOptions:
    """Answer the same questions from every policy's compressed cache at every ratio.

    The full cache and the controls (all audio and video entries evicted, or those of one modality) are always measured.

    Args:
        model: the AV-LLM: tiny (packaged), a folder or a hub id.
        compressor: export of a calibration, a folder or a hub id; the policy acckv-calibrated.
        policies: names, separated by commas, of full, random, streaming_llm, h2o, snapkv, pyramidkv, look_m, fastv,
            madakv, knorm, keydiff, expected_attention, kvzip, acckv and acckv-calibrated.
        ratios: kept shares of the audio and video entries, 0 to 1, separated by commas.
        when: compress after the media, before any question is seen (context), or after the whole prompt (prompt).
        limit: measure only this many clips, each with all its questions.
        output: folder of results.json, predictions.jsonl, pareto.png, budgets.png and report.html.
        seed: of random eviction and of the intervals.
        batch_size: clips that are prefilled together.
        data: what is asked about.
        word_tokens: longest one-word answer, in tokens.
        description_tokens: longest description, in tokens; those of the generated clips have up to 35,
            of their variants up to 50.
        strips: clips whose kept entries the report shows.
        update_card: write the measured table into the model card of the export, where that is a folder.
        dtype: of the model: float32, bfloat16 or float16.
        accelerator: of the Trainer: auto, cpu or gpu.
    """

    model: str = "tiny"
    compressor: str = "runs/calib/export"
    policies: list[str] | str = field(default_factory=lambda: list(POLICIES))
    ratios: list[float] | float | str = field(default_factory=lambda: [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.0])
    when: When = "context"
    limit: int | None = None
    output: str = "runs/eval"
    seed: int = 0
    batch_size: int = 24
    data: EvaluationData = field(default_factory=EvaluationData)
    word_tokens: int = 4
    description_tokens: int = 40
    strips: int = 3
    update_card: bool = True
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"

    def __post_init__(self) -> None:
        for name in ("limit", "batch_size", "word_tokens", "description_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{value} is less than 1", field=name)
        for name in ("seed", "strips"):
            if getattr(self, name) < 0:
                raise InputError(f"{getattr(self, name)} is less than 0", field=name)
        self.policy_list()
        self.ratio_list()

    def policy_list(self) -> list[str]:
        """The policies, each once.

        Raises:
            InputError: an unknown policy.
        """
        names = self.policies.split(",") if isinstance(self.policies, str) else self.policies
        cleaned = [name.strip() for name in names if name.strip()]
        for name in cleaned:
            if name not in POLICIES:
                raise InputError(f"{name!r} is not one of {', '.join(POLICIES)}", field="policies")
        return list(dict.fromkeys(cleaned))

    def ratio_list(self) -> list[float]:
        """The ratios, each once, largest first.

        Raises:
            InputError: a ratio that is no number from 0 to 1.
        """
        given = self.ratios
        parts: Sequence[float | str] = given.split(",") if isinstance(given, str) else _as_list(given)
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


def run_evaluation(
    options: EvaluationOptions,
    command: str | None = None,
    console: Console | None = None,
    questions: tuple[str, list[Record]] | None = None,
) -> Results:
    """Measure, print the tables, and write the files; nothing is written before everything has been measured.

    Args:
        options: what to measure.
        command: the command line, for the report and the model card.
        console: to print to.
        questions: (name, questions) to ask instead of those of `options.data`.

    Raises:
        InputError: an option, a file or a checkpoint is not usable.
    """
    console = console or Console()
    console = console if console.width >= _TABLE_WIDTH else Console(file=console.file, width=_TABLE_WIDTH)
    seed_everything(options.seed, verbose=False)
    cells = build_cells(options)
    benchmark, records = questions or (options.data.benchmark, options.data.records())
    clips = group_by_clip(records, options.limit)
    asked = [record for _, questions in clips for record in questions]
    model, processor = load_model(options.model, dtype=options.dtype)
    _warn_of_cut_answers(console, processor, asked, options.description_tokens)
    with _progress(console, len(asked) * len(cells)) as advance:
        module = EvaluationModule(
            model,
            processor,
            cells,
            all_groups(asked),
            answer_vocabulary(records),
            when=options.when,
            max_new_tokens={"word": options.word_tokens, "description": options.description_tokens},
            seed=options.seed,
            on_progress=advance,
        )
        _trainer(options).test(module, clip_loader(clips, options.batch_size), verbose=False)
    results = module.results(options.model, benchmark, options.seed)
    _print(console, results, module)
    _write(Path(options.output), results, module)
    dataset = clip_loader(clips, 1).dataset
    write_report(Path(options.output), results, module, dataset.__getitem__, options.strips, command)
    if options.update_card and any(cell.policy == CALIBRATED for cell in cells) and Path(options.compressor).is_dir():
        config = json.loads((Path(options.compressor) / "config.json").read_text(encoding="utf-8"))
        write_card(options.compressor, config, results, command=command)
    return results


def build_cells(options: EvaluationOptions) -> list[Cell]:
    """The rows of the table: the full cache, the controls, then every policy at every ratio.

    At ratio 0 all training-free policies hold the same cache, the control's; the calibrated compressor has a row of
    its own there, which shows whether its adapter answers without the media.

    Raises:
        InputError: the export of the calibrated compressor is not usable.
    """
    cells = [
        Cell(FULL, 1.0, KVCompressor(CompressionConfig(policy="full", when=options.when))),
        Cell(CONTROL, 0.0, KVCompressor(CompressionConfig(policy="random", when=options.when, seed=options.seed))),
        Cell(AUDIO_EVICTED, 0.0, EvictedModality(Modality.AUDIO, options.when)),
        Cell(VIDEO_EVICTED, 0.0, EvictedModality(Modality.VIDEO, options.when)),
    ]
    for policy in options.policy_list():
        if policy == FULL:
            continue
        if policy == CALIBRATED:
            compressor = _load_compressor(options)
        else:
            compressor = KVCompressor(CompressionConfig(policy=policy, when=options.when, seed=options.seed))  # type: ignore[arg-type]
        ratios = [ratio for ratio in options.ratio_list() if ratio > 0 or policy == CALIBRATED]
        cells += [Cell(policy, ratio, compressor) for ratio in ratios]
    return cells


def _load_compressor(options: EvaluationOptions) -> KVCompressor:
    name = options.compressor
    if not Path(name).exists() and (name == EvaluationOptions.compressor or name.count("/") != 1):
        remedy = "no such folder; calibrate first (python train.py --config configs/calib.yaml) or leave out the policy"
        raise InputError(f"{remedy} {CALIBRATED}", source=name, field="compressor")
    compressor = KVCompressor.from_pretrained(name, when=options.when)
    if compressor.weights is None:
        raise InputError("holds no learned weights", source=name, field="compressor")
    return compressor


def _warn_of_cut_answers(console: Console, processor: Any, asked: Sequence[Record], limit: int) -> None:
    answers = [record.answer for record in asked if record.protocol == "description"]
    longest = max((len(ids) for ids in processor.tokenizer(answers)["input_ids"]), default=0) if answers else 0
    if longest > limit:
        message = f"warning: descriptions are cut at {limit} tokens (description_tokens); the longest has {longest}"
        console.print(message, highlight=False, soft_wrap=True)


def _trainer(options: EvaluationOptions) -> Trainer:
    return Trainer(
        accelerator=options.accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,  # LoRA layers are put on and taken off within the loop
    )


@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar, or a line every tenth where the output is no terminal; gives the function that advances it."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("answers"), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("answering", total=total)
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            before, done = done, done + count
            bar.advance(task, count)
            if not console.is_terminal and 10 * before // total < 10 * done // total:
                console.print(f"answered {done} of {total}", highlight=False)

        yield advance


def _print(console: Console, results: Results, module: EvaluationModule) -> None:
    for table in render_group_tables(results):
        console.print(table)
    paired = {
        (cell.policy, cell.ratio): interval
        for cell, scores in zip(module.cells, module.scores, strict=True)
        if (interval := scores.relative_interval()) is not None
    }
    console.print(render_table(results, paired))
    for line in _leads(module):
        console.print(line, highlight=False)
    for line in _parsing(results):
        console.print(line, highlight=False)
    warning = control_warning(results)
    if warning is not None:
        console.print(warning, style="bold red", highlight=False, soft_wrap=True)


def _leads(module: EvaluationModule) -> list[str]:
    """The calibrated compressor against the best training-free policy at each ratio, paired by clip."""
    scored = dict(zip(((cell.policy, cell.ratio) for cell in module.cells), module.scores, strict=True))
    lines = []
    for (policy, ratio), scores in scored.items():
        others = {
            name: s for (name, r), s in scored.items() if r == ratio and name not in (CALIBRATED, FULL, *CONTROLS)
        }
        if policy != CALIBRATED or not 0 < ratio < 1 or not others:
            continue
        best = max(others, key=lambda name: float(others[name].accuracy.compute()["accuracy"]))
        difference, (low, high) = scores.against(others[best])
        lines.append(
            f"ratio {ratio:g}: {CALIBRATED} against {best}, the best training-free policy: "
            f"{100 * difference:+.1f} points, 95 % interval {100 * low:+.1f} to {100 * high:+.1f}"
        )
    return lines


def _parsing(results: Results) -> list[str]:
    """Share of one-word answers without a known word: of the full cache, and the largest of all rows."""
    shares = {}
    for row in results.rows:
        if UNPARSED in row.groups and row.groups[OFFICIAL].n:
            shares[f"{row.policy} at {row.ratio:g}"] = row.groups[UNPARSED].n / row.groups[OFFICIAL].n
    if not shares:
        return []
    most = max(shares, key=lambda name: shares[name])
    return [f"answers without a known word (counted as wrong): most {shares[most]:.1%}, {most}"]


def _write(output: Path, results: Results, module: EvaluationModule) -> None:
    write_predictions(output / PREDICTIONS_FILE, module.predictions)
    plot_pareto(output / PARETO_FILE, results)
    measured = [(c, s) for c, s in zip(module.cells, module.scores, strict=True) if 0 < c.ratio < 1]
    if measured:
        names = [cell.policy for cell, _ in measured]
        shown = CALIBRATED if CALIBRATED in names else names[-1]
        budgets = {cell.ratio: scores.kept_entries() for cell, scores in measured if cell.policy == shown}
        plot_budgets(output / BUDGETS_FILE, budgets, module.scores[0].full_entries(), shown)
    write_results(output / RESULTS_FILE, results)


def _as_list(given: Sequence[float] | float) -> Sequence[float]:
    return [given] if isinstance(given, (int, float)) else given
