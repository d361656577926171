"""Lightning on the pretend accelerator: what `train.py` and `evaluate.py` take to run there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry

from tests.support.simulated_accelerator import DEVICE, SimulatedAccelerator


class SimulatedDevice(Accelerator):
    """The first pretend device, as Lightning knows accelerators."""

    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> int:
        return int(devices)

    @staticmethod
    def get_parallel_devices(devices: int) -> list[torch.device]:
        return [DEVICE] * devices

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "sim"


class SimulatedStrategy(SingleDeviceStrategy):
    """One process on the first pretend device."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "device": DEVICE})


AcceleratorRegistry.register("sim", SimulatedDevice)
StrategyRegistry.register("sim", SimulatedStrategy)
#: Options of `train.py` and of a Trainer.
TRAINER = {"accelerator": "sim", "devices": 1, "strategy": "sim"}


@contextmanager
def simulated_training(monkeypatch: pytest.MonkeyPatch, watch: str = "/") -> Iterator[SimulatedAccelerator]:
    """A pretend accelerator on which Lightning trains and transformers loads.

    Args:
        watch: as for :class:`SimulatedAccelerator`.
    """
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a dispatch mode does not reach other threads
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # `.data` of a tensor subclass cannot be set
    try:
        with SimulatedAccelerator(watch) as accelerator:
            yield accelerator
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
