"""Layers of a decoder that LoRA can go on: linear ones of any class that peft can adapt, quantised ones included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from acckv.errors import InputError


def is_linear(module: nn.Module) -> bool:
    """Whether a layer maps ``in_features`` to ``out_features``, whatever it keeps its weights in."""
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return isinstance(module, nn.Linear) or all(isinstance(size, int) for size in sizes)


def match_names(names: Sequence[str], linear: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Those of a decoder's linear layers, by full name, whose last name is asked for.

    Raises:
        InputError: a name has no layer; the message lists what was matched and what there is.
    """
    by_leaf: dict[str, list[str]] = {}
    for full in linear:
        by_leaf.setdefault(full.rpartition(".")[-1], []).append(full)
    unknown = [repr(name) for name in names if name not in by_leaf]
    if unknown:
        matched = ", ".join(name for name in names if name in by_leaf)
        there = []
        for leaf, layers in by_leaf.items():
            counts = Counter(type(linear[full]).__name__ for full in layers)
            there.append(f"{leaf} ({', '.join(f'{count} {kind}' for kind, count in counts.items())})")
        raise InputError(
            f"{', '.join(unknown)} names no linear layer of the decoder; "
            f"matched: {matched or 'none'}; there are: {', '.join(there) or 'none'}",
            field="lora_targets",
        )
    return {full: linear[full] for name in names for full in by_leaf[name]}


def check_adaptable(layers: dict[str, nn.Module]) -> None:
    """Try peft on one layer of every class, and leave it as it was.

    Args:
        layers: full name -> module that LoRA is to go on.

    Raises:
        InputError: peft cannot adapt layers of a class.
    """
    by_class = {type(module): (name, module) for name, module in reversed(layers.items())}
    for name, module in by_class.values():
        flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        try:
            inject_adapter_in_model(LoraConfig(r=1, target_modules=["layer"]), nn.ModuleDict({"layer": module}))
        except Exception as error:  # peft has none of its own, and meets attributes of any kind here
            kind = f"{type(module).__module__}.{type(module).__qualname__}"
            why = next((line[:120] for line in str(error).splitlines() if line), "it is of a class unknown to it")
            raise InputError(
                f"peft cannot adapt {name}, a {kind} ({why}); set lora_rank 0, "
                "take an export without LoRA, or quantise the model in a way that peft knows",
                field="lora_targets",
            ) from error
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
