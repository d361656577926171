"""The pretend accelerator refuses and counts what a real one would refuse and make one wait for."""

from __future__ import annotations

import pytest
import torch

from tests.support.simulated_accelerator import (
    DEVICE,
    SECOND_DEVICE,
    SimTensor,
    SimulatedAccelerator,
    on_cpu,
    on_device,
    place,
)


def test_values_are_those_of_the_cpu() -> None:
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(4, 3), torch.randn(2, 4)
    expected = layer(x).relu()
    with SimulatedAccelerator():
        found = place(layer)(on_device(x)).relu()
        assert found.device == DEVICE and torch.equal(on_cpu(found), expected)


def test_devices_do_not_mix() -> None:
    with SimulatedAccelerator():
        x = torch.ones(3, device="sim")
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match=r"sim:0 and sim:1"):
            x + torch.ones(3, device=SECOND_DEVICE)
        assert on_cpu(x + torch.tensor(2.0)).tolist() == [3.0] * 3  # a number may be on the CPU
        assert on_cpu(x[torch.tensor([0, 2])]).tolist() == [1.0, 1.0]  # and so may an index
        assert (x.to(SECOND_DEVICE) + 1).device == SECOND_DEVICE


def test_a_generator_of_the_cpu_and_numpy_are_refused() -> None:
    with SimulatedAccelerator():
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, generator=torch.Generator(), device="sim")
        with pytest.raises(TypeError, match="numpy"):
            torch.ones(3, device="sim").numpy()


def test_launches_syncs_and_bytes_are_counted() -> None:
    with SimulatedAccelerator(watch="/tests/support/") as accelerator:
        x = torch.ones(1000, device="sim")
        accelerator.reset()
        y = x.view(10, 100).transpose(0, 1)
        assert (accelerator.launches, accelerator.synced) == (0, 0)
        z = y + 1
        assert accelerator.operations == {"aten.add.Tensor": 1} and accelerator.synced == 0
        assert accelerator.bytes == 8000
        float(z.sum()), bool((z > 1).all()), z.tolist(), z.cpu(), z.nonzero()
        assert accelerator.synced == 5
        assert all(place.startswith("test_simulated_accelerator.py:") for place in accelerator.syncs)
        del x, y, z
        assert accelerator.bytes == 0 and accelerator.peak_bytes >= 8000


def test_one_at_a_time() -> None:
    with SimulatedAccelerator(), pytest.raises(RuntimeError, match="open already"), SimulatedAccelerator():
        pass
    assert not isinstance(torch.ones(1), SimTensor)
