"""The command line of train.py: LightningCLI with acckv's modules and defaults."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import Namespace
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_modules.calibration import CalibrationModule
from lightning_modules.calibration_report import CalibrationReport
from lightning_modules.callbacks import EvaluateExport, ExportCompressor
from lightning_modules.datamodule import AVDataModule
from lightning_modules.doors import quiet_libraries

SUBCOMMANDS = ("fit", "validate")


class CalibrationCLI(LightningCLI):
    """``fit`` calibrates and exports; ``validate`` measures the validation KL of a checkpoint.

    Everything is written below ``trainer.default_root_dir``: ``logs/`` (CSV), ``checkpoints/``, ``export/``,
    ``eval/`` (a short evaluation of the export) and ``report.md`` with its plots and ``budgets.csv``.
    """

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.add_lightning_class_args(ExportCompressor, "export")
        parser.add_lightning_class_args(EvaluateExport, "evaluation")
        parser.add_lightning_class_args(CalibrationReport, "report")
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
        parser.link_arguments("model.base_model", "data.base_model")
        parser.link_arguments("model.when", "data.when")
        parser.link_arguments("model.dtype", "data.dtype")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        every = LightningCLI.subcommands()
        return {name: every[name] for name in SUBCOMMANDS}

    def before_instantiate_classes(self) -> None:
        config = self.config[self.config.subcommand]
        root = Path(config.trainer.default_root_dir or "runs/calib")
        config.trainer.default_root_dir = str(root)
        if config.checkpoint.dirpath is None:
            config.checkpoint.dirpath = str(root / "checkpoints")
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
    CalibrationCLI(
        CalibrationModule,
        AVDataModule,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_kwargs={"description": "Calibrate AccKV for an audio-video LLM and export the compressor."},
    )
