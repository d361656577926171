"""Calibrate a KV-cache compressor: `python train.py --config configs/calib.yaml`."""

import sys

from lightning_modules.cli.train import run

if __name__ == "__main__":
    sys.exit(run())
