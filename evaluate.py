"""Evaluate KV-cache compression: `python evaluate.py --config configs/eval.yaml`.

`python evaluate.py ask VIDEO "question"` asks about one clip, `python evaluate.py merge FOLDER FOLDER --output FOLDER`
joins the shards of an evaluation.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable

from jsonargparse import ArgumentParser

from lightning_modules.cli.ask import AskOptions, run_ask
from lightning_modules.cli.errors import quiet_libraries, run_door
from lightning_modules.evaluation.options import EvaluationOptions
from lightning_modules.evaluation.run import merge_evaluations, run_evaluation

_DOORS = (
    "`evaluate.py ask VIDEO QUESTION` answers one question about one clip, and `evaluate.py merge FOLDER ... --output "
    "FOLDER` joins the parts of an evaluation that ran with --shard; each has a --help of its own."
)


def main() -> None:
    door = DOORS.get(sys.argv[1], evaluate) if len(sys.argv) > 1 else evaluate
    door()


def evaluate() -> None:
    """Measure every policy at every ratio on the same questions."""
    parser = ArgumentParser(
        description="Answer the same questions from every policy's compressed KV cache.", epilog=_DOORS
    )
    parser.add_argument("--config", action="config", help="YAML file of the options below.")
    parser.add_class_arguments(EvaluationOptions)
    given = parser.parse_args()
    given.pop("config")
    options = EvaluationOptions(**vars(parser.instantiate(given)))
    quiet_libraries()
    run_evaluation(options, command=shlex.join(["python", *sys.argv]))


def ask() -> None:
    """Ask one question about one clip."""
    parser = ArgumentParser(
        prog="evaluate.py ask",
        description="Answer one question about one clip, from the full cache and a compressed one.",
    )
    parser.add_class_arguments(AskOptions, as_positional=True)
    given = parser.parse_args(sys.argv[2:])
    options = AskOptions(**vars(parser.instantiate(given)))
    quiet_libraries()
    run_ask(options)


def merge() -> None:
    """Join the shards of an evaluation."""
    parser = ArgumentParser(
        prog="evaluate.py merge", description="Join the parts of an evaluation that ran with --shard."
    )
    parser.add_argument("folders", nargs="+", help="output folders of the parts")
    parser.add_function_arguments(merge_evaluations, skip={"folders", "command", "console"})
    given = parser.parse_args(sys.argv[2:])
    quiet_libraries()
    merge_evaluations(**vars(parser.instantiate(given)), command=shlex.join(["python", *sys.argv]))


DOORS: dict[str, Callable[[], None]] = {"ask": ask, "merge": merge}

if __name__ == "__main__":
    sys.exit(run_door(main))
