"""The command line of train.py: LightningCLI with acckv's modules and defaults."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from acckv.errors import InputError
from acckv.io.registry import load_plugins
from lightning_modules.calibration.checkpoint import (
    CONFIG_FILE,
    changed_options,
    check_fixed,
    find_checkpoint,
    read_checkpoint,
    run_config,
)
from lightning_modules.calibration.datamodule import AVDataModule
from lightning_modules.calibration.export import CalibrationTrainer, ExportCompressor
from lightning_modules.calibration.module import CalibrationModule
from lightning_modules.calibration.progress import TrainingProgress
from lightning_modules.calibration.report import CalibrationReport, EvaluateExport
from lightning_modules.calibration.trainer_settings import freeze_precision
from lightning_modules.cli.errors import (
    CONFIG_OPTIONS,
    given_options,
    option_values,
    parser_errors,
    quiet_libraries,
    run_cli,
)

SUBCOMMANDS = ("fit", "validate", "export")
ROOT = "runs/calib"
#: Of a checkpoint: the options of the model and of the data.
SAVED = {"model": "hyper_parameters", "data": "datamodule_hyper_parameters"}
#: Options of the data that are linked to the model's.
LINKED = ("base_model", "when", "calibrate_for", "general_by", "dtype", "load_options")


class SaveRunConfig(SaveConfigCallback):
    """Keep the options in the run's folder too, where those of a checkpoint are looked for.

    Args:
        given: the options, without the paths that follow from `trainer.default_root_dir`.
    """

    def __init__(self, *args: Any, given: Namespace, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given = given

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            for name in ("ckpt_path", "weights_only"):  # of this start alone
                self.given.pop(name, None)
            file = Path(trainer.default_root_dir) / CONFIG_FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.given, file, skip_none=False, overwrite=True, multifile=False)


class CalibrationCLI(LightningCLI):
    """``fit`` calibrates and exports; ``validate`` measures the validation KL of a checkpoint; ``export`` exports one.

    Everything is written below ``trainer.default_root_dir``: ``logs/`` (CSV), ``checkpoints/``, ``export/``,
    ``eval/`` (a short evaluation of the export), ``report.md`` with its plots and ``budgets.csv``, and ``config.yaml``.

    With ``--ckpt_path FILE`` the options that are given hold, and others are the checkpoint's; those that it cannot
    have been trained under are refused. Without a ``--config`` that of the checkpoint's run is read.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--plugins",
            type=list[str] | str,
            default=[],
            help="Your own modules or .py files that register families or benchmarks, separated by commas.",
        )
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExportCompressor, "export")
        parser.add_lightning_class_args(EvaluateExport, "evaluation")
        parser.add_lightning_class_args(CalibrationReport, "report")
        parser.add_lightning_class_args(TrainingProgress, "progress")
        parser.set_defaults(
            {
                "checkpoint.filename": "step-{step}",
                "checkpoint.auto_insert_metric_name": False,
                "checkpoint.every_n_train_steps": 100,
                "checkpoint.save_last": True,
                "checkpoint.enable_version_counter": False,
                "trainer.use_distributed_sampler": False,  # the loader splits batches over processes itself
            }
        )
        for name in LINKED:
            parser.link_arguments(f"model.{name}", f"data.{name}")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        every = {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}
        return {name: every[name] for name in SUBCOMMANDS}

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand != "export":
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser = self.init_parser(**kwargs)  # the group of its arguments would have the name of the callback's options
        self._add_arguments(parser)
        text = "The checkpoint: a file, or 'last' or 'best' (by checkpoint.monitor) of the run."
        parser.add_argument("--ckpt_path", type=str | None, help=text)
        self._subcommand_method_arguments[subcommand] = ["ckpt_path"]
        return parser

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(exit_on_error=False, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        with parser_errors(parser):
            super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """In place of Lightning's, which lets a checkpoint's options win over those of the command line."""
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        if config.ckpt_path is None:
            return
        folder = config.checkpoint.dirpath or Path(config.trainer.default_root_dir or ROOT) / "checkpoints"
        file = find_checkpoint(str(config.ckpt_path), Path(folder))
        checkpoint = read_checkpoint(file)
        config.ckpt_path = str(file)
        inherited: dict[str, dict[str, Any]] = {}
        for group, key in SAVED.items():
            given = given_options(group, sys.argv[1:])
            skipped = given | ({*LINKED} if group == "data" else set())
            saved = checkpoint.get(key, {})
            inherited[group] = {name: saved[name] for name in saved if name in config[group] and name not in skipped}
        with parser_errors(self.parser):
            self.config = self.parser.parse_object({subcommand: inherited}, self.config)
        config = self.config[subcommand]
        check_fixed(config.model, checkpoint, file)
        changed = [
            text for group, key in SAVED.items() for text in changed_options(group, config[group], checkpoint[key])
        ]
        if changed:
            rank_zero_only(print)(f"Other options than the checkpoint's: {', '.join(changed)}.")

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, ModuleNotFoundError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise InputError(f"{cause} (a logger or callback needs a package)", field="trainer") from error

    def before_instantiate_classes(self) -> None:
        config = self.config[self.config.subcommand]
        load_plugins(config.plugins)
        root = Path(config.trainer.default_root_dir or ROOT)
        config.trainer.default_root_dir = str(root)
        freeze_precision(config, given_options("model", sys.argv[1:]))
        self.save_config_kwargs["given"] = config.clone()
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(root / "checkpoints")
        if not sys.stdout.isatty():
            config.trainer.enable_progress_bar = False  # there are lines instead
        if config.trainer.fast_dev_run:
            config.checkpoint.save_last = False  # Lightning would write it all the same
        if config.trainer.logger is None:
            config.trainer.logger = Namespace(
                class_path="lightning.pytorch.loggers.CSVLogger",
                init_args=Namespace(save_dir=str(root), name="logs"),
            )


def main() -> None:
    """Run the command line; without a subcommand it is `fit`."""
    quiet_libraries()
    if len(sys.argv) > 1 and sys.argv[1] not in (*SUBCOMMANDS, "-h", "--help"):
        sys.argv.insert(1, "fit")
    _read_run_config(sys.argv)
    CalibrationCLI(
        CalibrationModule,
        AVDataModule,
        trainer_class=CalibrationTrainer,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_kwargs={"description": "Calibrate AccKV for an audio-video LLM and export the compressor."},
    )


def run() -> int:
    """Run the command line and return its exit code."""
    return run_cli(main)


def _read_run_config(argv: list[str]) -> None:
    """Put the config of a checkpoint's run before all other options, where no other config is named."""

    def last(option: str, default: str = "") -> str:
        return next((value for _, value in reversed(option_values(argv, option)) if value), default)

    name = last("--ckpt_path")
    if name in ("", "null") or option_values(argv, *CONFIG_OPTIONS):
        return
    root = Path(last("--trainer.default_root_dir", ROOT))
    folder = Path(last("--checkpoint.dirpath", str(root / "checkpoints")))
    config = run_config(find_checkpoint(name, folder))
    if config is not None:
        argv[2:2] = ["--config", str(config)]
