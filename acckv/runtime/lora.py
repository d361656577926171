"""LoRA on the decoder's projections (peft), put on a model and taken off it without a trace."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from acckv.config import LoraScope
from acckv.errors import InputError
from acckv.models.base import ModelAdapter
from acckv.models.lora_targets import check_adaptable

#: Names of the two sets of a session as peft's adapters: of all ratios, and of the lowest ones with a set of their own.
DEFAULT, LOW_RATIO = "default", "low_ratio"


@dataclass
class LoraWeights:
    """A LoRA adapter that is on no model: its configuration and tensors (none: freshly initialised when attached)."""

    config: LoraConfig
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> LoraWeights:
        """Read a peft folder.

        Raises:
            InputError: a file is missing or cut off, or holds values that are not finite.
        """
        file = folder / "adapter_model.safetensors"
        if not (folder / "adapter_config.json").is_file():
            raise InputError("is missing; the export is incomplete", source=folder / "adapter_config.json")
        if not file.is_file():
            raise InputError("is missing; the export is incomplete", source=file)
        try:
            weights = cls(LoraConfig.from_pretrained(str(folder)), load_file(file))
        except (SafetensorError, ValueError, TypeError) as error:
            raise InputError(f"cannot be read: {error}", source=folder) from error
        for name, tensor in weights.tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise InputError("holds values that are not finite", source=file, field=name)
        return weights


@dataclass(frozen=True)
class LoraSets:
    """The LoRA of a compressor.

    Args:
        default: of all ratios; low_ratio: of the lowest ones, where those have their own, or None.
        scope: 'after' adapts only tokens after compression, 'all' the prompt too.
    """

    default: LoraWeights
    low_ratio: LoraWeights | None
    scope: LoraScope


def lora_config(adapter: ModelAdapter, rank: int, alpha: float, targets: tuple[str, ...], base: str) -> LoraConfig:
    """A LoRA of the decoder's projections, by full module names: leaf names would hit the audio tower too."""
    layers = adapter.projections(targets)
    check_adaptable(layers)
    return LoraConfig(
        r=rank, lora_alpha=int(alpha), target_modules=list(layers), lora_dropout=0.0, base_model_name_or_path=base
    )


class SessionLora(ABC):
    """The LoRA of a session: which set acts now, or none.

    Attributes:
        is_low: whether the set of the lowest ratios acts, and not the one of all others.
    """

    is_low: bool = False

    @abstractmethod
    def select(self, is_low: bool) -> None:
        """Let the set of the lowest ratios act, or that of all others; they are the same where there is one."""

    @contextmanager
    def selected(self, is_low: bool) -> Iterator[None]:
        """The same while the context is open."""
        before = self.is_low
        self.select(is_low)
        try:
            yield
        finally:
            self.select(before)

    @abstractmethod
    def disabled(self) -> Any:
        """The base model's own projections while the context is open; then as before, so that it can be nested."""

    @abstractmethod
    def remove(self) -> None:
        """The model is as it was before."""


class AttachedLora(SessionLora):
    """LoRA layers on a model, in place, until :meth:`remove`: what is trained, and what quantised weights need.

    The two sets are two adapters of peft.

    Args:
        adapter: of the model; config: from :func:`lora_config`; tensors: as peft saves them, None for fresh ones.
        low_ratio: tensors of the lowest ratios, or None.

    Raises:
        InputError: the model carries an adapter already, or the tensors belong to another model.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        config: LoraConfig,
        tensors: dict[str, Tensor] | None = None,
        low_ratio: dict[str, Tensor] | None = None,
    ) -> None:
        model = adapter.model
        if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            raise InputError("already carries a peft adapter; merge or unload it first", field="model")
        self._required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.adapter = adapter
        wanted = set(config.target_modules or ())
        check_adaptable({name: module for name, module in model.named_modules() if name in wanted})
        # peft edits the configuration it is given.
        self.wrapped = PeftModel(model, LoraConfig(**config.to_dict()), adapter_name=DEFAULT)
        layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        if layers.keys() != wanted:
            self.remove()
            raise InputError(f"LoRA reached {len(layers)} modules that are not the decoder's", field="adapter")
        self.layers: list[Any] = list(layers.values())
        if tensors is not None:
            self._load(tensors, DEFAULT)
        if low_ratio is not None:
            self.keep_low_ratio(low_ratio)

    def _load(self, tensors: dict[str, Tensor], name: str) -> None:
        expected = {key: tensor.shape for key, tensor in self.tensors().items()}
        if expected != {key: tensor.shape for key, tensor in tensors.items()}:
            self.remove()
            raise InputError("the LoRA tensors belong to another model", field="adapter")
        set_peft_model_state_dict(self.wrapped, tensors, adapter_name=name)

    @property
    def sets(self) -> list[str]:
        """Names of the adapters that there are."""
        return [name for name in (DEFAULT, LOW_RATIO) if name in self.wrapped.peft_config]

    def tensors(self, low_ratio: bool = False) -> dict[str, Tensor]:
        """The adapter's tensors as peft saves them, on the CPU.

        Args:
            low_ratio: those of the lowest ratios, where they have their own.
        """
        name = LOW_RATIO if low_ratio and LOW_RATIO in self.sets else DEFAULT
        state = get_peft_model_state_dict(self.wrapped, adapter_name=name, save_embedding_layers=False)
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}

    def parameters(self) -> list[Parameter]:
        """Those that act at all ratios but the lowest: what is trained."""
        return [p for name, p in self.adapter.model.named_parameters() if ".lora_" in name and f".{DEFAULT}." in name]

    def keep_low_ratio(self, tensors: dict[str, Tensor] | None = None) -> None:
        """Keep the values as they are now, or these, for the lowest ratios."""
        values = self.tensors() if tensors is None else tensors
        if LOW_RATIO not in self.sets:
            self.wrapped.add_adapter(LOW_RATIO, LoraConfig(**self.wrapped.peft_config[DEFAULT].to_dict()))
        self._load(values, LOW_RATIO)
        self._activate()

    def select(self, is_low: bool) -> None:
        if is_low != self.is_low:
            self.is_low = is_low
            self._activate()

    def _activate(self) -> None:
        name = LOW_RATIO if self.is_low and LOW_RATIO in self.sets else DEFAULT
        for layer in self.layers:
            layer.set_adapter(name)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        enabled = [layer for layer in self.layers if not layer.disable_adapters]
        for layer in enabled:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in enabled:
                layer.enable_adapters(True)

    def remove(self) -> None:
        tuner: Any = self.wrapped.base_model
        model = tuner.unload()
        for name in ("peft_config", "_hf_peft_config_loaded"):
            if name in vars(model):
                delattr(model, name)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
