"""LoRA on the decoder's projections (peft), put on a model and taken off it without a trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from acckv.adapters.base import ModelAdapter
from acckv.errors import InputError


@dataclass
class LoraWeights:
    """A LoRA adapter that is on no model: its configuration and tensors (none: freshly initialised when attached)."""

    config: LoraConfig
    tensors: dict[str, Tensor]

    @classmethod
    def load(cls, folder: Path) -> LoraWeights:
        """Read a peft folder.

        Raises:
            InputError: a file is missing or cut off.
        """
        file = folder / "adapter_model.safetensors"
        if not (folder / "adapter_config.json").is_file():
            raise InputError("is missing; the export is incomplete", source=folder / "adapter_config.json")
        if not file.is_file():
            raise InputError("is missing; the export is incomplete", source=file)
        try:
            return cls(LoraConfig.from_pretrained(str(folder)), load_file(file))
        except (SafetensorError, ValueError, TypeError) as error:
            raise InputError(f"cannot be read: {error}", source=folder) from error


def lora_config(adapter: ModelAdapter, rank: int, alpha: float, targets: tuple[str, ...], base: str) -> LoraConfig:
    """A LoRA of the decoder's projections, by full module names: leaf names would hit the audio tower too."""
    names = adapter.projection_names(targets)
    return LoraConfig(
        r=rank, lora_alpha=int(alpha), target_modules=names, lora_dropout=0.0, base_model_name_or_path=base
    )


class AttachedLora:
    """LoRA layers on a model, in place, until :meth:`remove`.

    Args:
        adapter: of the model; config: from :func:`lora_config`; tensors: as peft saves them, None for fresh ones.
        tight: tensors of the tightest ratios, or None.

    Attributes:
        tight: whether those act now, and not the others.

    Raises:
        InputError: the model carries an adapter already, or the tensors belong to another model.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        config: LoraConfig,
        tensors: dict[str, Tensor] | None = None,
        tight: dict[str, Tensor] | None = None,
    ) -> None:
        model = adapter.model
        if hasattr(model, "peft_config"):
            raise InputError("already carries a peft adapter; merge or unload it first", field="model")
        self._required_grad = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self.adapter = adapter
        # peft edits the configuration it is given.
        self.wrapped = PeftModel(model, LoraConfig(**config.to_dict()))
        layers = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
        if layers.keys() != set(config.target_modules or ()):
            self.remove()
            raise InputError(f"LoRA reached {len(layers)} modules that are not the decoder's", field="adapter")
        self._layers = list(layers.values())
        self.tight = False
        self._aside: list[Tensor] | None = None  # values of the parameters that do not act now
        if tight is not None:
            self._load(tight)
            self.settle()
        if tensors is not None:
            self._load(tensors)

    def _load(self, tensors: dict[str, Tensor]) -> None:
        expected = {name: tensor.shape for name, tensor in self.tensors().items()}
        if expected != {name: tensor.shape for name, tensor in tensors.items()}:
            self.remove()
            raise InputError("the LoRA tensors belong to another model", field="adapter")
        set_peft_model_state_dict(self.wrapped, tensors)

    def tensors(self, tight: bool = False) -> dict[str, Tensor]:
        """The adapter's tensors as peft saves them, on the CPU.

        Args:
            tight: those of the tightest ratios.
        """
        with self.selected(tight):
            state = get_peft_model_state_dict(self.wrapped, save_embedding_layers=False)
            return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in state.items()}

    def parameters(self) -> list[Parameter]:
        return [value for name, value in self.adapter.model.named_parameters() if ".lora_" in name]

    def settle(self, tensors: dict[str, Tensor] | None = None) -> None:
        """Keep the values as they are now, or these, for the tightest ratios."""
        live = self._values()
        if tensors is not None:
            self._load(tensors)
        self._aside = self._values()
        self._put(live)

    def select(self, tight: bool) -> None:
        """Let the values of the tightest ratios act, or those of all others; they are the same where none are kept."""
        if tight != self.tight and self._aside is not None:
            live = self._values()
            self._put(self._aside)
            self._aside, self.tight = live, tight

    @contextmanager
    def selected(self, tight: bool) -> Iterator[None]:
        """The same while the context is open."""
        before = self.tight
        self.select(tight)
        try:
            yield
        finally:
            self.select(before)

    def _values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters()]

    def _put(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters(), values, strict=True):
            parameter.data.copy_(value)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The base model's own projections while the context is open; then as before, so that it can be nested."""
        enabled = [layer for layer in self._layers if not layer.disable_adapters]
        for layer in enabled:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in enabled:
                layer.enable_adapters(True)

    def remove(self) -> None:
        """Take every LoRA layer off again; the model is as it was before."""
        tuner: Any = self.wrapped.base_model
        model = tuner.unload()
        for name in ("peft_config", "_hf_peft_config_loaded"):
            if name in vars(model):
                delattr(model, name)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._required_grad[name])
