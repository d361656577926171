"""A pretend accelerator: real values on the CPU, in tensors that say they are on ``sim:0`` or ``sim:1``.

What it shows, exactly and without noise:

- tensors of two devices that meet in one operation, and a CPU generator for a device tensor: an error, as on CUDA;
- ``.numpy()`` of a device tensor: an error, as on CUDA;
- host synchronisations (``.item()``, ``bool()``, ``int()``, ``.tolist()``, copies to the CPU), counted by the line that
  asks for them;
- operations, counted by name, without views and empty tensors: on a GPU each is at least one kernel launch;
- bytes held on the devices, now and at the peak.

It says nothing of speed, of a kernel's numerics or of streams. Open it around everything that touches the device::

    with SimulatedAccelerator(watch="/acckv/") as accelerator:
        place(model)
        model.generate(**on_device(inputs))
    accelerator.launches, accelerator.syncs, accelerator.peak_bytes

`tests/support/simulated_training.py` brings it to Lightning.
"""

from __future__ import annotations

import collections
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

aten = torch.ops.aten
_TORCH = os.path.dirname(torch.__file__) + os.sep
#: Operations that launch nothing.
_FREE = (
    "aten._unsafe_view",
    "aten.detach",
    "aten.empty",
    "aten.new_empty",
    "aten.lift_fresh",
    "aten._local_scalar_dense",
)


class _Backend(backend_registration._DummyBackendModule):
    """What torch asks a backend module for."""

    def _lazy_init(self) -> None: ...

    def device_count(self) -> int:
        return 2

    def get_rng_state(self, *args: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, *args: Any) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


backend_registration._setup_privateuseone_for_python_backend("sim", backend_module=_Backend())
DEVICE, SECOND_DEVICE = torch.device("sim", 0), torch.device("sim", 1)
_current: SimulatedAccelerator | None = None


class SimTensor(torch.Tensor):
    """A tensor on a pretend device; `host` holds its values."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment] # torch types it by its default

    @staticmethod
    def __new__(cls: Any, host: Tensor, device: torch.device = DEVICE, requires_grad: bool = False) -> Any:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=device,
            requires_grad=requires_grad,
        )
        tensor.host = host
        if _current is not None:
            tensor.held = _Held(_current, host)
        return tensor

    def __tensor_flatten__(self) -> tuple[list[str], torch.device]:
        return ["host"], self.device

    @staticmethod
    def __tensor_unflatten__(tensors: dict[str, Tensor], device: torch.device, size: Any, stride: Any) -> SimTensor:
        return SimTensor(tensors["host"], device)

    def tolist(self) -> Any:
        if _current is not None:
            _current._sync()
        return self.host.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert sim:0 device type tensor to numpy. Use Tensor.cpu() first")

    __array__ = numpy

    def __repr__(self) -> str:  # type: ignore[override]
        return f"SimTensor({self.host!r}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _run(func, args, kwargs or {})


class SimulatedAccelerator(TorchDispatchMode):
    """While it is open, tensors made with ``device='sim'`` are on the pretend device and all that happens is counted.

    Args:
        watch: part of a path; a sync counts where the line that asks for it, outside torch, is in a file whose path
            holds it. What the model's own code waits for is not counted.

    Attributes:
        operations: launches by name of the operation; syncs: by ``file:line``.
        bytes, peak_bytes: held by tensors on the devices.
    """

    def __init__(self, watch: str = "/acckv/") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watch = watch
        self.operations: collections.Counter[str] = collections.Counter()
        self.syncs: collections.Counter[str] = collections.Counter()
        self.bytes = self.peak_bytes = 0
        self._storages: collections.Counter[int] = collections.Counter()  # tensors that hold each

    @property
    def launches(self) -> int:
        """Operations counted so far."""
        return sum(self.operations.values())

    @property
    def synced(self) -> int:
        """Host synchronisations counted so far."""
        return sum(self.syncs.values())

    def reset(self) -> None:
        """Count from nothing again; what is held stays."""
        self.operations.clear()
        self.syncs.clear()
        self.peak_bytes = self.bytes

    def __enter__(self) -> SimulatedAccelerator:
        global _current
        if _current is not None:
            raise RuntimeError("a pretend accelerator is open already")
        _current, self._lift = self, torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device='sim') goes through the dispatcher
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *error: Any) -> None:
        global _current
        _current = None
        torch._C._set_only_lift_cpu_tensors(self._lift)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def _sync(self) -> None:
        frame: Any = sys._getframe()
        while frame is not None and frame.f_code.co_filename.startswith((_TORCH, __file__)):
            frame = frame.f_back
        if frame is not None and self.watch in frame.f_code.co_filename:
            self.syncs[f"{frame.f_code.co_filename.rsplit(self.watch, 1)[-1]}:{frame.f_lineno}"] += 1


class _Held:
    """Counts a storage as long as a tensor of it lives (weak references would keep torch from swapping tensors)."""

    def __init__(self, accelerator: SimulatedAccelerator, inner: Tensor) -> None:
        storage = inner.untyped_storage()
        self.accelerator, self.key, self.size = accelerator, storage._cdata, storage.nbytes()
        if not accelerator._storages[self.key]:
            accelerator.bytes += self.size
            accelerator.peak_bytes = max(accelerator.peak_bytes, accelerator.bytes)
        accelerator._storages[self.key] += 1

    def __del__(self) -> None:
        storages = self.accelerator._storages
        storages[self.key] -= 1
        if not storages[self.key]:
            del storages[self.key]
            self.accelerator.bytes -= self.size


def place(module: nn.Module, device: torch.device = DEVICE) -> nn.Module:
    """Put a module's parameters and buffers on a pretend device, in place (parameters become new objects)."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and not isinstance(value, SimTensor):
                part._parameters[name] = nn.Parameter(SimTensor(value.data, device), value.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, SimTensor):
                part._buffers[name] = SimTensor(buffer, device)
    return module


def on_device(tree: Any, device: torch.device = DEVICE) -> Any:
    """The same structure with its CPU tensors on a pretend device."""
    return tree_map(lambda x: SimTensor(x, device) if type(x) is torch.Tensor else x, tree)


def on_cpu(tree: Any) -> Any:
    """The same structure with the values of its tensors on the CPU."""
    return tree_map(lambda x: x.host if isinstance(x, SimTensor) else x, tree)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: checked as an accelerator would, counted, and done on the CPU."""
    tensors = list(_tensors((*args, *kwargs.values())))
    devices = {x.device for x in tensors if isinstance(x, SimTensor)}
    if func is aten._fused_sdp_choice.default:
        return 0  # plain matrix products
    moves = func in (aten._to_copy.default, aten.copy_.default)
    if devices and not moves:
        _check_devices(func, tensors, devices)
    if _current is not None and devices:
        if not (func.is_view or str(func).startswith(_FREE)):
            _current.operations[str(func)] += 1
        if func is aten._local_scalar_dense.default or _leaves_device(func, args, kwargs):
            _current._sync()
    here = _device_of_result(func, args, kwargs, devices)
    inner_args = _mapped(_values, args)
    inner = {name: _mapped(_values, value) for name, value in kwargs.items()}
    if inner.get("device") is not None and here is not None:
        inner["device"] = torch.device("cpu")
    generator = inner.get("generator")
    if here is not None and generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"Expected a 'sim' device type for generator but found 'cpu' ({func})")
    out = func(*inner_args, **inner)
    if here is None:
        return out
    if func is aten._to_copy.default:
        return SimTensor(out.clone() if any(out is _values(x) for x in tensors) else out, here)
    out = _mapped(lambda x: SimTensor(x, here) if isinstance(x, Tensor) and not isinstance(x, SimTensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if devices else out


def _mapped(change: Any, value: Any) -> Any:
    """`change` of an operation's argument or result: one thing, or a sequence (pytrees of any kind would be slow)."""
    if isinstance(value, (list, tuple)):
        parts = [_mapped(change, x) for x in value]
        return parts if isinstance(value, list) else tuple(parts)
    return change(value)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _values(x: Any) -> Any:
    return x.host if isinstance(x, SimTensor) else x


def _check_devices(func: Any, tensors: list[Tensor], devices: set[torch.device]) -> None:
    """Refuse what CUDA refuses; numbers without dimensions and indices may be on the CPU there."""
    strangers = [x for x in tensors if not isinstance(x, SimTensor) and x.dim()]
    if len(devices) > 1 or (strangers and "index" not in str(func)):
        names = sorted(str(device) for device in devices | {x.device for x in strangers})
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {' and '.join(names)}")


def _leaves_device(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an operation copies from a pretend device to the CPU, which waits for the device."""
    if func is aten._to_copy.default:
        return kwargs.get("device") is not None and torch.device(kwargs["device"]).type != DEVICE.type
    if func is aten.copy_.default:
        return not isinstance(args[0], SimTensor) and isinstance(args[1], SimTensor)
    return func is aten.nonzero.default  # its size is not known before


def _device_of_result(func: Any, args: Any, kwargs: dict[str, Any], devices: set[torch.device]) -> torch.device | None:
    if kwargs.get("device") is not None:
        device = torch.device(kwargs["device"])
        return torch.device(DEVICE.type, device.index or 0) if device.type == DEVICE.type else None
    if func is aten.copy_.default:
        return args[0].device if isinstance(args[0], SimTensor) else None
    return next(iter(devices), None)
