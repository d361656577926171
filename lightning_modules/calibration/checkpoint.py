"""Going on from a checkpoint: its contents, the options that hold, and its run's config."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn

from acckv.errors import InputError
from lightning_modules.calibration.schedule import Schedule

#: Options that what a checkpoint holds was learned under: with others it would not fit, or mean something else.
FIXED = (
    "base_model",
    "when",
    "head_budgets",
    "preset",
    "compression",
    "trainable",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "lora_scope",
)
#: Further ones once a low-ratio stage is over.
FIXED_BY_STAGE = ("ratio_min", "low_ratio_share")
#: Of a run, in its folder: the options that it was last started with.
CONFIG_FILE = "config.yaml"
#: Key of a checkpoint's own part, beside Lightning's.
TRAINING = "acckv_calibration"
#: The low-ratio stage's part of a checkpoint, once it is over: weights by the beginning of their names, and LoRA.
LOW_RATIO_WEIGHTS, LOW_RATIO_LORA = "compressor.low_ratio_weights.", "low_ratio_lora"


@dataclass(frozen=True)
class Resumed:
    """The point where a training goes on.

    Attributes:
        step: that the checkpoint is at; planned: steps of its run.
        low_ratio_ended: the step at which its low-ratio stage ended, None before that.
    """

    step: int
    planned: float
    low_ratio_ended: int | None

    @classmethod
    def read(cls, checkpoint: Mapping[str, Any], trainer: Any = None) -> Resumed:
        """The point that a checkpoint is at.

        Args:
            trainer: that is about to go on from it; None where nothing is trained.

        Raises:
            InputError: it is of another module, or the trainer has no step left.
        """
        if TRAINING not in checkpoint:
            raise InputError("is no checkpoint of train.py, or one of an older version", field="ckpt_path")
        step, training = checkpoint["global_step"], checkpoint[TRAINING]
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
            name, done = ("max_steps", step) if trainer.max_steps >= 0 else ("max_epochs", epochs)
            most = getattr(trainer, name)
            if most is not None and 0 <= most <= done:
                raise InputError(
                    f"is {most}, and the checkpoint has done {done}: set more to train on, "
                    "or export it as it is: python train.py export --ckpt_path FILE",
                    field=f"trainer.{name}",
                )
        return cls(step, training["planned"], training["low_ratio_ended"])

    def describe(self, schedule: Schedule) -> str:
        """The schedule that holds from now on."""
        longer = "" if self.planned == schedule.steps else f" (its run had {self.planned:g})"
        now, end = f"{schedule.temperature(self.step):.3g}", f"{schedule.options.temperature_end:g}"
        return (
            f"Goes on at step {self.step} of {schedule.steps:g}{longer}: the gates' temperature is {now} "
            f"and ends at {end}, learning rates are {schedule.rate(self.step):.0%} of their peaks."
        )


def read_checkpoint(file: str | Path) -> dict[str, Any]:
    """A checkpoint of train.py, without running any code in it.

    Raises:
        InputError: there is no such file, or it is something else.
    """
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError("no such checkpoint", source=file, field="ckpt_path") from error
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise InputError("is damaged, or no checkpoint of train.py", source=file, field="ckpt_path") from error
    if not isinstance(checkpoint, dict) or TRAINING not in checkpoint:
        raise InputError("is no checkpoint of train.py, or one of an older version", source=file, field="ckpt_path")
    return checkpoint


def find_checkpoint(name: str, folder: Path) -> Path:
    """The file that 'last' or 'best' stands for among a run's checkpoints; any other name is a path.

    Args:
        folder: of the checkpoints.

    Raises:
        InputError: there is none, or none was chosen by a monitored metric.
    """
    if name not in ("last", "best"):
        return Path(name)
    last = folder / "last.ckpt"
    if name == "last":
        return last
    states = read_checkpoint(last).get("callbacks", {})
    for state in states.values():
        if isinstance(state, Mapping) and state.get("monitor") and state.get("best_model_path"):
            return Path(state["best_model_path"])
    raise InputError("is 'best', and the run monitored nothing (checkpoint.monitor)", source=last, field="ckpt_path")


def run_config(checkpoint: Path) -> Path | None:
    """The config that was saved in the folder of a checkpoint's run, if it is still there."""
    places = (checkpoint.parent.parent / CONFIG_FILE, checkpoint.parent / CONFIG_FILE)
    return next((file for file in places if file.is_file()), None)


def check_fixed(options: Mapping[str, Any], checkpoint: Mapping[str, Any], source: str | Path | None = None) -> None:
    """Refuse options that contradict a checkpoint.

    Args:
        options: hyperparameters of :class:`~lightning_modules.calibration.module.CalibrationModule`.

    Raises:
        InputError: it names the option, its value and the checkpoint's.
    """
    saved = {"head_budgets": "equal", **checkpoint["hyper_parameters"]}  # which older ones do not name
    ended = checkpoint[TRAINING]["low_ratio_ended"] is not None
    for name in (*FIXED, *(FIXED_BY_STAGE if ended else ())):
        mine, its = (_comparable(name, values) for values in (options, saved))
        if mine != its:
            raise InputError(
                f"is {_plain(options[name])!r}, and the checkpoint was trained with {_plain(saved[name])!r}; "
                "leave the option out or start a run without --ckpt_path",
                source=source,
                field=f"model.{name}",
            )


def changed_options(group: str, options: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Options that hold another value than a checkpoint's, in words."""
    return [
        f"{group}.{name} {options[name]} (was {value})"
        for name, value in saved.items()
        if name in options and _plain(options[name]) != _plain(value)
    ]


def _comparable(name: str, options: Mapping[str, Any]) -> Any:
    if name == "lora_alpha":
        return options["lora_alpha"] or 2.0 * options["lora_rank"]
    return _plain(options[name]) or None


def _plain(value: Any) -> Any:
    """Sequences of any kind compare by what they hold, mappings too."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping) or hasattr(value, "as_dict"):
        values = value.as_dict() if hasattr(value, "as_dict") else value
        return {key: _plain(item) for key, item in dict(values).items()}
    return value
