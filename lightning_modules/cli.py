"""The command line of train.py: LightningCLI with acckv's modules and defaults."""

from __future__ import annotations

import sys

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_modules.calibration import CalibrationModule
from lightning_modules.datamodule import AVDataModule
from lightning_modules.doors import OneLineErrors

SUBCOMMANDS = ("fit", "validate")


class CalibrationParser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser whose errors are one line that names file and key."""


class CalibrationCLI(LightningCLI):
    """``fit`` calibrates and exports; ``validate`` measures the validation KL of a checkpoint."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.base_model", "data.base_model")
        parser.link_arguments("model.when", "data.when")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        every = LightningCLI.subcommands()
        return {name: every[name] for name in SUBCOMMANDS}


def main() -> None:
    """Run the command line; without a subcommand it is `fit`."""
    if len(sys.argv) > 1 and sys.argv[1] not in (*SUBCOMMANDS, "-h", "--help"):
        sys.argv.insert(1, "fit")
    CalibrationCLI(
        CalibrationModule,
        AVDataModule,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_class=CalibrationParser,
        parser_kwargs={"description": "Calibrate AccKV for an audio-video LLM and export the compressor."},
    )
