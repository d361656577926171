"""LoRA folded into copies of the weights: an adapted token then costs what a token of the base model costs."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NoReturn

import psutil
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import Parameter

from acckv.errors import InputError
from acckv.models.base import ModelAdapter
from acckv.runtime.lora import DEFAULT, LOW_RATIO, AttachedLora, LoraSets, SessionLora
from acckv.runtime.patching import patch_method

#: How a session applies LoRA: from copies of the weights with it in them, by peft's layers beside them, or whichever
#: the weights and the free memory allow.
LoraMode = Literal["auto", "merged", "separate"]
#: Share of the free memory that 'auto' takes for the copies.
MEMORY_SHARE = 0.5


def attach(adapter: ModelAdapter, lora: LoraSets, mode: LoraMode) -> SessionLora:
    """Put LoRA on a model.

    Args:
        mode: 'auto' merges where weights are plain and the copies take at most half of the memory that is free, and
            warns where they would take more.

    Raises:
        InputError: the mode is 'merged' and the weights cannot be; or as :class:`AttachedLora`.
    """
    low_ratio = None if lora.low_ratio is None else lora.low_ratio.tensors
    attached = AttachedLora(adapter, lora.default.config, lora.default.tensors or None, low_ratio)
    if mode == "separate" or (mode == "auto" and not lora.default.tensors):  # fresh ones are there to be trained
        return attached
    if obstacle := _obstacle(attached):
        if mode == "auto":
            return attached
        attached.remove()
        raise InputError(f"is 'merged', but {obstacle}; choose 'separate'", field="lora_mode")
    if mode == "auto" and (missing := _missing_memory(attached)):
        warnings.warn(
            f"LoRA is not merged: {missing}. It runs beside the weights, which is slower; "
            "lora_mode='merged' insists, lora_mode='separate' takes this as it is",
            stacklevel=4,
        )
        return attached
    return MergedLora(attached)


class MergedLora(SessionLora):
    """The projections' weights with LoRA in them, beside the base model's own, which stand aside meanwhile.

    A change between base, LoRA and the LoRA of the lowest ratios sets pointers, and no values. Memory: a copy of the
    adapted weights for each set that has been used. A merged weight is computed in float32 and rounded once to the type
    of the base weight.

    Args:
        attached: what is merged; its layers are taken off the model.
    """

    def __init__(self, attached: AttachedLora) -> None:
        self._sets = attached.sets
        layers = attached.layers
        parts = [{name: _factors(layer, name) for name in self._sets} for layer in layers]
        self._modules: list[nn.Module] = [layer.get_base_layer() for layer in layers]
        attached.remove()
        self._base: list[Any] = [module.weight for module in self._modules]
        self._factors = parts
        self._merged: dict[str, list[Any]] = {}
        self._off = 0
        decoder = attached.adapter.decoder
        self._guards = ExitStack()
        self._guards.callback(decoder.register_state_dict_pre_hook(_refuse_state).remove)
        for owner in (attached.adapter.model, decoder):  # before anything of the model is loaded
            self._guards.callback(owner.register_load_state_dict_pre_hook(_refuse_state).remove)
        self._guards.enter_context(patch_method(decoder, "_apply", self._move))
        self._select(self.is_low)

    def select(self, is_low: bool) -> None:
        if is_low != self.is_low:
            self._select(is_low)

    def _select(self, is_low: bool) -> None:
        self.is_low = is_low
        if not self._off:
            self._put(self._weights(LOW_RATIO if is_low and LOW_RATIO in self._sets else DEFAULT))

    def _weights(self, name: str) -> list[Any]:
        """The merged weights of a set, made when they are first used."""
        if name not in self._merged:
            pairs = zip(self._base, self._factors, strict=True)
            self._merged[name] = [
                Parameter(merged_weight(base, *factors[name]), requires_grad=False) for base, factors in pairs
            ]
        return self._merged[name]

    def _move(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """To another device or type, as ``model.to`` does: the base weights go, and are merged anew."""
        self._put(self._base)
        try:
            return original(*args, **kwargs)
        finally:
            self._base = [module.weight for module in self._modules]
            self._merged.clear()
            self._select(self.is_low)

    def _put(self, weights: list[Any]) -> None:
        for module, weight in zip(self._modules, weights, strict=True):
            module._parameters["weight"] = weight

    @contextmanager
    def disabled(self) -> Iterator[None]:
        self._off += 1
        self._put(self._base)
        try:
            yield
        finally:
            self._off -= 1
            self._select(self.is_low)

    def remove(self) -> None:
        self._guards.close()
        self._put(self._base)
        self._merged.clear()


def _refuse_state(*_: Any) -> NoReturn:
    raise InputError(
        "holds weights with LoRA merged into them while its session is open; save or load them before or after, or "
        "open the session with lora_mode='separate'",
        field="model",
    )


@torch.no_grad()
def merged_weight(base: Tensor, down: Tensor, up: Tensor, scaling: float) -> Tensor:
    """``base + scaling * up @ down`` in float32, rounded once to the type of `base`.

    Args:
        base: ``[out, in]``; down: ``[rank, in]``; up: ``[out, rank]``.
    """
    up, down = (factor.to(base.device, torch.float32) for factor in (up, down))
    return torch.addmm(base.float(), up, down, alpha=scaling).to(base.dtype)


def _factors(layer: Any, name: str) -> tuple[Tensor, Tensor, float]:
    return layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), layer.scaling[name]


def _obstacle(attached: AttachedLora) -> str | None:
    """The reason why the weights cannot be merged, or None."""
    places = collections.Counter(
        id(module) for _, module in attached.adapter.decoder.named_modules(remove_duplicate=False)
    )
    for layer in attached.layers:
        module, weight = layer.get_base_layer(), layer.get_base_layer().weight
        plain = type(layer) is LoraLinear and type(module).forward is nn.Linear.forward
        if not plain or layer.lora_variant or layer.fan_in_fan_out:
            return f"{type(module).__name__} layers keep weights that cannot be added to"
        if places[id(module)] > 1:  # LoRA acts in one of them alone
            return "layers of the decoder share a module"
        of_its_device = type(weight.data) is type(torch.empty(0, device=weight.device))
        if not of_its_device or weight.device.type == "meta" or not weight.is_floating_point():
            return "the weights are quantised, offloaded or split over processes"
    return None


def _missing_memory(attached: AttachedLora) -> str | None:
    """The memory that the copies would take, where that is too much, or None."""
    needed: collections.Counter[torch.device] = collections.Counter()
    for layer in attached.layers:
        weight = layer.get_base_layer().weight
        needed[weight.device] += len(attached.sets) * weight.numel() * weight.element_size()
    for device, size in needed.items():
        free = _free_memory(device)
        if size > MEMORY_SHARE * free:
            size_of, free_on = f"{size / 1e9:.1f} GB", f"{free / 1e9:.1f} GB free on {device}"
            return f"copies of the adapted weights would take {size_of} of {free_on}"
    return None


def _free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on a device."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available
