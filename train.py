"""Calibrate a KV-cache compressor: ``python train.py --config configs/calib.yaml``."""

import sys

from lightning_modules.cli.errors import run_door


def _main() -> None:
    from lightning_modules.cli.train import main

    main()


if __name__ == "__main__":
    sys.exit(run_door(_main))
