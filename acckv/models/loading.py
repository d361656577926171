"""Loading a checkpoint of any family with any option of transformers' ``from_pretrained``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.quantizers.auto import AutoQuantizationConfig

from acckv.errors import InputError
from acckv.models.family import FAMILIES, GENERIC, Family, find_adapter
from acckv.models.plain_decoder import TextProcessor

TINY_MODEL: Path = Path(__file__).resolve().parent.parent / "assets" / "tiny_av_llm"
"""Folder of the packaged AV-LLM, for tests and demonstrations without a download."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: load_options that say where a checkpoint is read from, and so go for its processor and configuration too.
SOURCE_OPTIONS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)

LoadOptions = Mapping[str, Any]


def load_model(
    name: str | Path,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    load_options: LoadOptions | None = None,
    family: Family | None = None,
) -> tuple[PreTrainedModel, Any]:
    """Load an AV-LLM and its processor, or a plain decoder and its tokenizer as a :class:`TextProcessor`.

    Args:
        name: 'tiny' for the packaged AV-LLM, else a folder or a hub id.
        dtype: float32, bfloat16, float16, or auto: what the checkpoint is stored in.
        device: where the model goes; None is the CPU, or where `load_options` puts it.
        attn_implementation: sdpa (the default) or eager.
        load_options: of transformers' ``from_pretrained``, such as ``device_map``, ``quantization_config`` (its object,
            or a mapping of its fields with ``quant_method`` or ``class``), ``revision`` or ``trust_remote_code``.
        family: of the model; None is the one of its model type.

    Raises:
        InputError: unknown dtype or option, options that contradict each other, unreadable checkpoint, or a model of no
            family.
    """
    options = _checked(load_options, dtype)
    if attn_implementation is not None and "attn_implementation" in options:
        raise InputError("is given twice", field="load_options.attn_implementation")
    if device is not None and "device_map" in options:
        raise InputError(
            "says where the model goes, and so does device; leave one out", field="load_options.device_map"
        )
    name = TINY_MODEL if name == "tiny" else name
    with _readable(name):
        config, family = _config(name, options, family)
        attention = options.get("attn_implementation", attn_implementation or "sdpa")
        if family.part_attention and isinstance(attention, str):
            attention = {"": attention, "text_config": attention, **family.part_attention}
        options["attn_implementation"] = attention
        if "quantization_config" in options:
            options["quantization_config"] = _quantization(options["quantization_config"])
        is_quantized = "quantization_config" in options or getattr(config, "quantization_config", None) is not None
        if device is not None and is_quantized:  # packed weights are made where they stay
            options["device_map"], device = {"": str(device)}, None
        loader: Any = family.model_class or AutoModelForCausalLM
        model: Any = loader.from_pretrained(name, dtype=DTYPES.get(dtype, dtype), **options)
    processor = load_processor(name, dtype, load_options, family)
    if isinstance(processor, TextProcessor):
        find_adapter(model, family)
        processor = replace(processor, dtype=model.dtype, embed=model.get_input_embeddings())
    return (model if device is None else model.to(device)).eval(), processor


def load_processor(
    name: str | Path, dtype: str = "float32", load_options: LoadOptions | None = None, family: Family | None = None
) -> Any:
    """The processor of an AV-LLM alone; of a plain decoder a :class:`TextProcessor` that cannot embed.

    Args:
        name, dtype, load_options, family: as for :func:`load_model`; of the options, those that say where to read.

    Raises:
        InputError: unreadable checkpoint, or a model of no family.
    """
    options = _checked(load_options, dtype)
    name = TINY_MODEL if name == "tiny" else name
    source = {option: options[option] for option in SOURCE_OPTIONS if option in options}
    with _readable(name):
        config, family = _config(name, options, family)
        if family.model_class is not None:
            return AutoProcessor.from_pretrained(name, **source)
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
    if tokenizer.pad_token is None:  # what stands where padding is masked does not matter
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError("has neither a padding nor an end token", source=name, field="tokenizer")
    decoder = config.get_text_config()
    stored = decoder.dtype if isinstance(decoder.dtype, torch.dtype) else torch.float32
    return TextProcessor(tokenizer, decoder.hidden_size, DTYPES.get(dtype, stored))


def _checked(options: LoadOptions | None, dtype: str) -> dict[str, Any]:
    """The options as a dictionary of their own.

    Raises:
        InputError: it is no mapping of names, or repeats what has an option beside it; or an unknown dtype.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise InputError(f"{dtype!r} is not one of {', '.join(DTYPES)}, auto", field="dtype")
    if options is None:
        return {}
    if not isinstance(options, Mapping) or not all(isinstance(option, str) for option in options):
        raise InputError("is no mapping of option names to values", field="load_options")
    for option in ("dtype", "torch_dtype"):
        if option in options:
            raise InputError("is an option of its own; set dtype and leave this out", field=f"load_options.{option}")
    if options.get("output_loading_info"):
        raise InputError("is of no use here", field="load_options.output_loading_info")
    return dict(options)


def _config(name: str | Path, options: dict[str, Any], family: Family | None) -> tuple[PreTrainedConfig, Family]:
    """The configuration of a checkpoint that can be served, and its family."""
    source = {option: options[option] for option in SOURCE_OPTIONS if option in options}
    config = AutoConfig.from_pretrained(name, **source)
    own_code = options.get("trust_remote_code") and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    kind = config.model_type
    family = family or FAMILIES.get(kind, GENERIC)
    if family.model_class is None and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not own_code:
        known = ", ".join(name for name, family in FAMILIES.items() if family.model_class is not None)
        raise InputError(f"model_type {kind!r} is not one of {known}, and no causal language model", source=name)
    return config, family


def _quantization(config: Any) -> Any:
    """A quantization config out of a mapping, which is all that YAML can say."""
    if not isinstance(config, Mapping):
        return config
    fields = dict(config)
    kind = fields.pop("class", None)
    if kind is not None and not (str(kind).endswith("Config") and hasattr(transformers, str(kind))):
        message = f"{kind!r} is no class of transformers, such as BitsAndBytesConfig"
        raise InputError(message, field="load_options.quantization_config.class")
    try:
        return AutoQuantizationConfig.from_dict(fields) if kind is None else getattr(transformers, kind)(**fields)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(_first_line(error), field="load_options.quantization_config") from error


@contextmanager
def _readable(name: str | Path) -> Iterator[None]:
    """Errors of transformers about a checkpoint or an option become one line."""
    try:
        yield
    except TypeError as error:
        if "unexpected keyword argument" not in str(error):
            raise
        option = str(error).rpartition("argument")[2].strip()
        raise InputError(f"{option} is no option of from_pretrained", source=name, field="load_options") from error
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot be loaded: {_first_line(error)}", source=name) from error


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
