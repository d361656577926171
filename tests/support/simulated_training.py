"""Lightning on the pretend accelerator: what `train.py` and `evaluate.py` take to run there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer.connectors.accelerator_connector import _AcceleratorConnector

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


AcceleratorRegistry.register("sim", SimulatedDevice)


@contextmanager
def simulated_training(monkeypatch: pytest.MonkeyPatch, watch: str = "/") -> Iterator[SimulatedAccelerator]:
    """A pretend accelerator on which Lightning trains, where it is told ``accelerator='sim'``, and transformers loads.

    Args:
        watch: as for :class:`SimulatedAccelerator`.
    """
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a dispatch mode does not reach other threads
    choose = _AcceleratorConnector._choose_strategy

    def chosen(connector: Any) -> Any:  # of accelerators that it does not know itself Lightning takes the CPU
        return SingleDeviceStrategy(DEVICE) if connector._accelerator_flag == "sim" else choose(connector)

    monkeypatch.setattr(_AcceleratorConnector, "_choose_strategy", chosen)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)  # `.data` of a tensor subclass cannot be set
    try:
        with SimulatedAccelerator(watch) as accelerator:
            yield accelerator
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
