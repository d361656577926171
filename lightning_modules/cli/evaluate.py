"""The command line of evaluate.py: measure policies, ask about one clip, join the shards of an evaluation."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from lightning_modules.cli.ask import AskOptions, run_ask
from lightning_modules.cli.errors import parser_errors, quiet_libraries, run_cli
from lightning_modules.evaluation.options import EvaluationOptions
from lightning_modules.evaluation.run import merge_evaluations, run_evaluation

_COMMANDS = (
    "`ask VIDEO QUESTION` answers one question about one clip, and `merge FOLDER ... --output FOLDER` joins the parts "
    "of an evaluation that ran with --shard; each has a --help of its own."
)


def main() -> None:
    """Run the command line; without a command it measures."""
    first = sys.argv[1] if len(sys.argv) > 1 else ""
    COMMANDS.get(first, evaluate)(sys.argv[2:] if first in COMMANDS else sys.argv[1:])


def run() -> int:
    """Run the command line and return its exit code."""
    return run_cli(main)


def evaluate(words: Sequence[str]) -> None:
    """Measure every policy at every ratio on the same questions."""
    parser = _parser("", "Answer the same questions from every policy's compressed KV cache.", epilog=_COMMANDS)
    parser.add_argument("--config", action="config", help="YAML file of the options below.")
    parser.add_class_arguments(EvaluationOptions)
    with parser_errors(parser):
        given = parser.instantiate(parser.parse_args(words))
    given.pop("config")
    options = EvaluationOptions(**vars(given))
    quiet_libraries()
    run_evaluation(options, command=_command())


def ask(words: Sequence[str]) -> None:
    """Ask one question about one clip."""
    parser = _parser("ask", "Answer one question about one clip, from the full cache and a compressed one.")
    parser.add_class_arguments(AskOptions, as_positional=True)
    with parser_errors(parser):
        options = AskOptions(**vars(parser.instantiate(parser.parse_args(words))))
    quiet_libraries()
    run_ask(options)


def merge(words: Sequence[str]) -> None:
    """Join the shards of an evaluation."""
    parser = _parser("merge", "Join the parts of an evaluation that ran with --shard.")
    parser.add_argument("folders", nargs="+", help="output folders of the parts")
    parser.add_function_arguments(merge_evaluations, skip={"folders", "command", "console"})
    with parser_errors(parser):
        given = parser.instantiate(parser.parse_args(words))
    quiet_libraries()
    merge_evaluations(**vars(given), command=_command())


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"ask": ask, "merge": merge}


def _parser(command: str, description: str, **options: Any) -> ArgumentParser:
    program = f"{Path(sys.argv[0]).name} {command}".strip()
    return ArgumentParser(prog=program, description=description, exit_on_error=False, **options)


def _command() -> str:
    """The command line as it can be typed again."""
    script = Path(sys.argv[0])
    return shlex.join(["python", *sys.argv] if script.suffix == ".py" else [script.name, *sys.argv[1:]])
