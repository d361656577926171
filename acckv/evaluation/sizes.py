"""The sizes of compressed caches, summed over prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from acckv.cache.cache import CompressedCache


@dataclass(frozen=True)
class Sizes:
    """Sums over the prompts (clips, or with `when: prompt` questions) of some caches.

    Attributes:
        prompts: how many there are.
        kept: video and audio entries that each layer holds, merged ones included, [layers][2].
        full: video and audio entries before compression, [2].
        kv_bytes: bytes of all keys and values held.
    """

    prompts: int = 0
    kept: list[list[float]] = field(default_factory=list)
    full: list[float] = field(default_factory=lambda: [0.0, 0.0])
    kv_bytes: int = 0

    @classmethod
    def of(cls, cache: CompressedCache) -> Sizes:
        """The sizes of one cache."""
        prompts = cache.labels.labels.shape[0]
        kept, full = (prompts * mean.cpu().double() for mean in (cache.kept_entries(), cache.full_entries()))
        return cls(prompts, kept.tolist(), full.tolist(), cache.kv_bytes())

    def __add__(self, other: Sizes) -> Sizes:
        if not self.prompts:
            return other
        kept = torch.tensor(self.kept, dtype=torch.float64) + torch.tensor(other.kept, dtype=torch.float64)
        full = [own + others for own, others in zip(self.full, other.full, strict=True)]
        return Sizes(self.prompts + other.prompts, kept.tolist(), full, self.kv_bytes + other.kv_bytes)

    @property
    def kept_entries(self) -> Tensor:
        """float64 ``[layers, 2]``: video and audio entries that each layer keeps, mean over prompts."""
        return torch.tensor(self.kept, dtype=torch.float64) / self.prompts

    @property
    def full_entries(self) -> Tensor:
        """float64 ``[2]``: video and audio entries before compression, mean over prompts."""
        return torch.tensor(self.full, dtype=torch.float64) / max(1, self.prompts)

    @property
    def entries(self) -> float:
        """Audio and video entries held, mean over layers and prompts."""
        return float(self.kept_entries.sum(-1).mean())

    @property
    def ratio(self) -> float:
        """Kept share of the audio and video entries, 0..1; 1 where there are none."""
        full = float(self.full_entries.sum())
        return self.entries / full if full else 1.0
