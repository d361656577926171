"""Evaluate KV-cache compression: `python evaluate.py --config configs/eval.yaml`."""

from __future__ import annotations

import shlex
import sys

from jsonargparse import ArgumentParser

from lightning_modules.doors import quiet_libraries, run_door
from lightning_modules.evaluation_run import EvaluationOptions, run_evaluation


def main() -> None:
    parser = ArgumentParser(description="Answer the same questions from every policy's compressed KV cache.")
    parser.add_argument("--config", action="config", help="YAML file of the options below.")
    parser.add_class_arguments(EvaluationOptions)
    given = parser.parse_args()
    given.pop("config")
    options = EvaluationOptions(**vars(parser.instantiate(given)))
    quiet_libraries()
    run_evaluation(options, command=shlex.join(["python", *sys.argv]))


if __name__ == "__main__":
    sys.exit(run_door(main))
