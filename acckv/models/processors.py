"""The processor of a plain decoder that is fed with embeddings: its tokenizer and their width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextProcessor:
    """The tokenizer of a plain decoder, and what its embeddings are like.

    Attributes:
        tokenizer: of the decoder.
        width: numbers of an embedding.
        dtype: that the decoder runs in.
        embed: int64 ``[tokens]`` to ``[tokens, width]``; None where the decoder itself was not loaded.
    """

    tokenizer: Any
    width: int
    dtype: torch.dtype = torch.float32
    embed: Callable[[Tensor], Tensor] | None = None

    def batch_decode(self, tokens: Any, **options: Any) -> list[str]:
        """As of every processor of transformers."""
        return self.tokenizer.batch_decode(tokens, **options)
