"""Tests run side by side, one process a core (pytest-xdist), so each keeps to one thread."""

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

torch.set_num_threads(1)


@pytest.fixture
def matrix_attention() -> Iterator[None]:
    """The pretend device multiplies matrices where the CPU has a fused kernel: so both round alike."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
