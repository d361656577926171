"""A shared prefill: run once with the full cache, compressed as often as one likes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.cache_utils import Cache

from acckv.config import CompressionConfig
from acckv.errors import InputError
from acckv.modality import ModalityMap
from acckv.policies.base import Rows
from acckv.prompt import PROBE_REMEDY
from acckv.ragged import watched_rows
from acckv.scoring import Observation


@dataclass(frozen=True)
class Prefill:
    """A full-cache prefill and what was observed in it: compressed as often and as strongly as one likes.

    Attributes:
        cache: the full cache, not compressed yet.
        labels: modality of every entry.
        observations: by compressed layer, rows of the prompt.
        probes: by compressed layer, rows of the probe prompt, or None where none was run.
        next_position: ``[B, 1]``, where text after the prompt goes on.
        logits: of the last token, ``[B, vocabulary]``, before compression.
    """

    cache: Cache
    labels: ModalityMap
    observations: list[Observation]
    probes: list[Observation] | None
    next_position: Tensor
    logits: Tensor

    def watched(self, rows: Rows, config: CompressionConfig) -> list[Observation]:
        """The rows that a policy reads, out of all that were recorded."""
        if rows == "text" and config.when == "context":
            if self.probes is None:
                raise InputError(PROBE_REMEDY, field="processor")
            return self.probes
        mask = watched_rows(self.labels, rows, config.window)
        # Recorded rows end where the prompt ends.
        return [seen.rows(mask[:, mask.shape[1] - seen.row_valid.shape[1] :]) for seen in self.observations]
