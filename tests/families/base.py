"""Tiny models of real classes, each with clips as its processor would give them: the base of all families."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

AUDIO, IMAGE, VIDEO = 100, 101, 102
AUDIO_BOS, AUDIO_EOS, VISION_BOS, VISION_EOS = 103, 104, 105, 106
FRAME_TOKENS = 4
QUESTION = (20, 21, 22)

TEXT: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.1,
}
ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4}
MROPE = {**ROPE, "mrope_section": [2, 3, 3]}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "patch_size": 4, "out_hidden_size": 64}


class Tokenizer:
    """Stands for a processor where only a probe prompt must be tokenised."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [30 + len(word) for word in text.split()]}


@dataclass(frozen=True)
class Clip:
    """A prompt: text tokens, so many frames and sound tokens, a question."""

    question: tuple[int, ...] = QUESTION
    seed: int = 0
    frames: int = 2
    sounds: int = 6
    intro: tuple[int, ...] = (2, 10, 11)

    def generator(self) -> torch.Generator:
        """Of the values of its media."""
        return torch.Generator().manual_seed(self.seed + 1)


class Family(ABC):
    """One family: how to build its tiny model, and the inputs of a clip.

    Attributes:
        name: of the family; padding: input name -> value that fills rows on the left.
        plain: input name -> its value where there is text.
        joined: inputs whose rows are joined along their first axis in a batch; others are padded on the right.
        layers: how many the budget counts.
    """

    name: str
    layers = 3
    padding: dict[str, int] = {"input_ids": 0, "attention_mask": 0}  # noqa: RUF012
    plain: dict[str, int] = {"input_ids": 0, "attention_mask": 1}  # noqa: RUF012
    joined: tuple[str, ...] = ("pixel_values_videos", "video_grid_thw", "video_second_per_grid")

    @abstractmethod
    def config(self) -> Any:
        """The tiny configuration."""

    @property
    @abstractmethod
    def model_class(self) -> Any:
        """The class that generates text."""

    def build(self, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
        """The same weights at every call."""
        torch.manual_seed(0)
        model = self.model_class._from_config(self.config(), attn_implementation=self.attention(attention))
        model.generation_config.eos_token_id = None
        return model.to(dtype).eval()

    def attention(self, name: str) -> Any:
        return name

    @abstractmethod
    def inputs(self, model: Any, clip: Clip) -> dict[str, Any]:
        """Model inputs of one row: intro, media, question."""

    def clip(self, model: Any, question: tuple[int, ...] = QUESTION, **options: Any) -> dict[str, Any]:
        """Model inputs of a :class:`Clip`."""
        return self.inputs(model, Clip(question, **options))

    def context(self, model: Any, **options: Any) -> dict[str, Any]:
        """A clip without a question."""
        return self.clip(model, (), **options)

    def text(self, model: Any, tokens: tuple[int, ...]) -> dict[str, Any]:
        """A turn of text."""
        ids = torch.tensor([tokens])
        return {
            name: ids if name == "input_ids" else torch.full_like(ids, int(fill)) for name, fill in self.plain.items()
        }

    def positions(self, model: Any, inputs: dict[str, Any]) -> Tensor | None:
        """Position ids of a whole prompt, by the model's own function; None where they count tokens."""
        return None

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Rows of different length as one left-padded batch."""
        batch: dict[str, Any] = {}
        for name, value in rows[0].items():
            values = [row[name] for row in rows]
            if not isinstance(value, Tensor):
                batch[name] = value
            elif name in self.padding:
                width = max(item.shape[1] for item in values)
                tail = (0, 0) * (value.ndim - 2)
                fill = self.padding[name]
                batch[name] = torch.cat([F.pad(v, (*tail, width - v.shape[1], 0), value=fill) for v in values])
            elif name in self.joined:
                batch[name] = torch.cat(values)
            else:
                batch[name] = self.pad_features(values)
        return batch

    def join(self, turns: list[dict[str, Any]]) -> dict[str, Any]:
        """The turns of one row as the inputs of one prompt."""
        whole: dict[str, Any] = {}
        for name in {name: None for turn in turns for name in turn}:
            values = [turn[name] for turn in turns if name in turn]
            if not isinstance(values[0], Tensor):
                whole[name] = values[0]
            elif name in self.padding or name in self.joined:
                whole[name] = torch.cat(values, dim=int(name in self.padding))
            else:
                whole[name] = self.pad_features(values)
        return whole

    def pad_features(self, values: list[Tensor]) -> Tensor:
        """Stack ``[1, ..., length]`` sound features, padded on the right."""
        width = max(value.shape[-1] for value in values)
        return torch.cat([F.pad(value, (0, width - value.shape[-1])) for value in values])
