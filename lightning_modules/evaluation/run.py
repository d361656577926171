"""One evaluation from options to files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch.distributed
from lightning import Trainer, seed_everything
from rich.console import Console

from acckv import KVCompressor
from acckv.benchmarks import Benchmark, Mode, find_benchmark
from acckv.benchmarks.judging import answer_vocabulary
from acckv.data.asked_questions import Coverage
from acckv.data.records import Record
from acckv.errors import InputError
from acckv.evaluation.answer_limits import LEAST, WORDS, answer_limits, longest_references
from acckv.evaluation.journal import Batch, Journal, by_number, read_batches, read_config, write_evaluation
from acckv.evaluation.progress import EvaluationProgress
from acckv.evaluation.results import Results, Setting, is_calibrated
from acckv.evaluation.run_config import RunConfig, describe_options
from acckv.evaluation.scores import score_batches
from acckv.io.json_files import read_json
from acckv.io.progress import Progress
from acckv.io.registry import load_plugins
from acckv.models import load_model
from acckv.report.card import write_card
from acckv.report.table import print_tables
from lightning_modules.evaluation.datamodule import EvaluationClips, Shard, group_by_clip
from lightning_modules.evaluation.module import Asking, EvaluationModule
from lightning_modules.evaluation.options import EvaluationOptions, build_compressors
from lightning_modules.evaluation.report import measure_timelines, write_files
from lightning_modules.evaluation.versions import versions
from lightning_modules.interrupted import was_interrupted

_PACKAGES = ("acckv", "torch", "transformers", "lightning")
_NAMED = 5  # missing batches that a message names


def run_evaluation(
    options: EvaluationOptions,
    command: str | None = None,
    console: Console | None = None,
    questions: tuple[str, list[Record]] | None = None,
    model: tuple[Any, Any] | None = None,
) -> Results:
    """Measure, print the tables, and write the files. Each batch of answers is on the disk as soon as it is there.

    With several devices each process returns the results, and the first one prints and writes. A shard returns the
    results of its own batches, and writes only these batches.

    Args:
        command: the command line, for the report and the model card.
        questions: (name, questions) to ask instead of those of `options.data`.
        model: (model, processor) in memory that are used instead of loading `options.model` again; they are left on the
            evaluation's device.

    Raises:
        InputError: an option, a file or a checkpoint is not usable, or the output folder holds another evaluation.
    """
    console, output = console or Console(), Path(options.output)
    seed_everything(options.seed, verbose=False)
    shard, trainer = Shard.parse(options.shard), _trainer(options)
    compressors = build_compressors(options)
    title, records = questions or (options.data.title, options.data.records())
    benchmark = None if questions or options.data.benchmark is None else find_benchmark(options.data.benchmark)
    loaded: Any
    with Progress("loading the model", console=console, shown=model is None and trainer.is_global_zero):
        loaded, processor = model or load_model(options.model, options.dtype, load_options=options.load_options)
    longest = longest_references(records, processor.tokenizer)
    asking = _asking(options, benchmark, longest)
    config = _config(options, title, benchmark, records, compressors, loaded, asking, trainer)
    journal = Journal(output, config, _writer(shard, trainer))
    if trainer.is_global_zero:
        _warn_of_cut_answers(console, longest, asking)
        journal.open(options.overwrite)
    progress = EvaluationProgress(console if trainer.is_global_zero else None, config)

    def finish(batch: Batch) -> None:
        journal.append(batch)
        progress.finish(batch)

    module = EvaluationModule(
        loaded,
        processor,
        compressors,
        asking,
        config.judge,
        strict=options.strict,
        on_answers=progress.add,
        on_batch=finish,
    )
    clips = EvaluationClips(journal, shard, options.data.reader(), options.data.num_workers)
    with progress, _left_tidy(journal, console if model is None and trainer.is_global_zero else None):
        progress.start(shard.share(config.batches, trainer.global_rank, trainer.world_size), journal)
        try:
            _answer(trainer, module, clips)
        finally:
            loaded.to(trainer.strategy.root_device)  # a Trainer leaves it on the CPU, and the report asks it again
    batches, mine = journal.finished(), shard.share(config.batches)
    outcome = score_batches(config, [batches[number] for number in mine])
    if shard.count > 1 and trainer.is_global_zero:
        console.print(
            f"part {options.shard} is answered, {len(mine)} of {len(config.batches)} batches; "
            "join all parts with: python evaluate.py merge FOLDER FOLDER ... --output FOLDER",
            highlight=False,
            soft_wrap=True,
        )
    elif trainer.is_global_zero:
        measured = partial(measure_timelines, module, outcome, options.timelines, options.data.reader())
        print_tables(console, outcome)
        write_files(output, outcome, command, measured)
        measured_export = any(map(is_calibrated, outcome.results.policies))
        if options.update_card and measured_export and Path(options.compressor).is_dir():
            export = read_json(Path(options.compressor) / "config.json")
            write_card(options.compressor, export, outcome.results, command=command)
    return outcome.results


def merge_evaluations(
    folders: Sequence[str],
    output: str,
    score: Mode | None = None,
    overwrite: bool = False,
    plugins: Sequence[str] | str = (),
    command: str | None = None,
    console: Console | None = None,
) -> Results:
    """Join the shards of one evaluation: print the tables and write the files that one machine would have written.

    Args:
        folders: output folders of the shards, separated by blanks.
        output: folder of the joint evaluation.
        score: parser that the accuracy is by, official or robust; None is official for a benchmark, else robust.
        overwrite: discard what the output folder holds of an evaluation with other settings.
        plugins: as of the evaluation.
        command: the command line, for the report.
        console: to print to.

    Raises:
        InputError: a folder holds no evaluation or one with other settings, or batches are missing.
    """
    load_plugins(plugins)
    configs = [read_config(Path(folder)) for folder in folders]
    if not configs:
        raise InputError("is empty; name the output folders of the shards", field="folders")
    config = configs[0]
    for folder, other in zip(folders, configs, strict=True):
        if differences := other.differences(config):
            raise InputError(f"has other settings than {folders[0]} ({differences})", source=folder)
    config = replace(config, score=score or ("official" if config.benchmark else "robust"))
    batches = by_number(batch for folder in folders for batch in read_batches(Path(folder), config.score))
    missing = [str(number) for number in config.batches if number not in batches]
    if missing:
        few = ", ".join(missing[:_NAMED]) + (", ..." if len(missing) > _NAMED else "")
        raise InputError(f"{len(missing)} of {len(config.batches)} batches are in no folder ({few})", field="folders")
    Journal(Path(output), config).check(overwrite)
    write_evaluation(Path(output), config, batches.values())
    outcome = score_batches(config, batches.values())
    print_tables(console or Console(), outcome)
    write_files(Path(output), outcome, command)
    return outcome.results


@contextmanager
def _left_tidy(journal: Journal, console: Console | None) -> Iterator[None]:
    """Nothing is left behind of an evaluation without answers, and one that Ctrl-C stopped says how it goes on."""
    try:
        yield
    except InputError:
        journal.remove_if_empty()
        raise
    except (KeyboardInterrupt, SystemExit) as stopped:
        if was_interrupted(stopped) and console is not None:
            held = f"Stopped. The answers so far are in {journal.folder}; the same command goes on from there."
            console.print(held, highlight=False, soft_wrap=True)
        raise


def _answer(trainer: Trainer, module: EvaluationModule, clips: EvaluationClips) -> None:
    """Answer what is left, in every process.

    Raises:
        InputError: in one of the processes; the first one raises it, and the others end.
    """
    refused: InputError | None = None
    try:
        trainer.test(module, clips, verbose=False)
    except InputError as error:
        refused = error
    if trainer.world_size > 1:
        everyones: list[InputError | None] = [None] * trainer.world_size
        torch.distributed.all_gather_object(everyones, refused)
        refused = next((error for error in everyones if error is not None), None)
    if refused is not None and not trainer.is_global_zero:
        sys.exit()  # with code 0: an end with another would have the first process killed before it says why
    if refused is not None:
        raise refused


def _asking(options: EvaluationOptions, benchmark: Benchmark | None, longest: Mapping[str, int]) -> Asking:
    least = LEAST if benchmark is None else dict.fromkeys(longest, benchmark.max_new_tokens)
    limits = answer_limits(longest, least, options.word_tokens, options.description_tokens)
    return Asking(attrgetter("question") if benchmark is None else benchmark.prompt, limits)


def _config(
    options: EvaluationOptions,
    title: str,
    benchmark: Benchmark | None,
    records: Sequence[Record],
    compressors: Mapping[Setting, KVCompressor],
    model: Any,
    asking: Asking,
    trainer: Trainer,
) -> RunConfig:
    clips = group_by_clip(records, options.limit)
    asked = [[(record, asking.prompt(record)) for record in clip] for clip in clips]
    described = describe_options(
        asked,
        compressors,
        model,
        benchmark=title,
        when=options.when,
        seed=options.seed,
        batch_size=options.batch_size,
        max_new_tokens=asking.max_new_tokens,
        dtype=options.dtype,
        load_options=options.load_options,
        media=options.data.limits(),
        device=trainer.strategy.root_device.type,
        versions={name: found for name, found in versions().items() if name in _PACKAGES},
    )
    vocabulary = sorted(answer_vocabulary(records)) if benchmark is None else []
    name = None if benchmark is None else benchmark.name
    coverage = _coverage(compressors, [prompt for clip in asked for _, prompt in clip])
    return RunConfig(described, options.model, name, vocabulary, options.mode, clips, coverage)


def _coverage(compressors: Mapping[Setting, KVCompressor], questions: Sequence[str]) -> Coverage | None:
    """Of the export, which all its rows share; None where there is none that says what its calibration asked."""
    asked = next((each.asked for each in compressors.values() if each.asked is not None), None)
    return None if asked is None else asked.coverage(questions)


def _writer(shard: Shard, trainer: Trainer) -> str:
    """Tells the processes' journals apart."""
    part = f"-{shard.index + 1}of{shard.count}" if shard.count > 1 else ""
    return part + (f"-{trainer.global_rank}" if trainer.global_rank else "")


def _warn_of_cut_answers(console: Console, longest: Mapping[str, int], asking: Asking) -> None:
    for protocol, tokens in longest.items():
        limit = asking.max_new_tokens[protocol]
        if tokens > limit:
            option = "word_tokens" if protocol in WORDS else "description_tokens"
            message = f"warning: answers are cut at {limit} tokens ({option}); the longest right one has {tokens}"
            console.print(message, highlight=False, soft_wrap=True)


def _trainer(options: EvaluationOptions) -> Trainer:
    return Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        strategy="ddp" if options.devices > 1 else "auto",
        use_distributed_sampler=False,  # it would fill up uneven shares with clips that were answered already
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        inference_mode=False,  # LoRA layers are put on and taken off within the loop
    )
