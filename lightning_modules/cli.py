"""The command line of train.py: LightningCLI with acckv's modules and defaults."""

from __future__ import annotations

import sys

from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_modules.calibration import CalibrationModule
from lightning_modules.datamodule import AVDataModule

SUBCOMMANDS = ("fit", "validate")


class CalibrationCLI(LightningCLI):
    """``fit`` calibrates and exports; ``validate`` measures the validation KL of a checkpoint."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.base_model", "data.base_model")
        parser.link_arguments("model.when", "data.when")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        every = LightningCLI.subcommands()
        return {name: every[name] for name in SUBCOMMANDS}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; without a subcommand it is `fit`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] not in (*SUBCOMMANDS, "-h", "--help"):
        arguments = ["fit", *arguments]
    CalibrationCLI(
        CalibrationModule,
        AVDataModule,
        args=arguments,
        save_config_kwargs={"overwrite": True},
        auto_configure_optimizers=False,
        parser_kwargs={"description": "Calibrate AccKV for an audio-video LLM and export the compressor."},
    )
