"""A shared prefill: run once with the full cache, compressed as often as one likes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from acckv.cache.cache import CompressedCache, compressed_layers
from acckv.cache.layer import CompressedLayer
from acckv.config import When
from acckv.errors import InputError
from acckv.method.modality import ModalityMap
from acckv.method.scoring import Observation
from acckv.models.batching import DecoderInputs, observed_queries
from acckv.policies.base import Policy


@dataclass(frozen=True)
class Prefill:
    """A full-cache prefill and what was observed in it: compressed as often and as strongly as one likes.

    Attributes:
        cache: the full cache, not compressed yet.
        labels: modality of every entry.
        observations: by compressed layer, queries of the prompt.
        probes: by compressed layer, queries of the probe prompt, or None where none was run.
        next_position: ``[B, 1]``, where text after the prompt goes on.
        adapted: whether LoRA acted on the prompt (scope 'all').
        embedded: what went into the decoder; another prefill can start from it.
        logits: of the last token, ``[B, vocabulary]``, before compression; None where it started from embeddings.
        reconstruction: by compressed layer, what the context fed in again attends to; empty until a policy first
            asks for it.
    """

    cache: Cache
    labels: ModalityMap
    observations: list[Observation]
    probes: list[Observation] | None
    next_position: Tensor
    adapted: bool
    embedded: DecoderInputs
    logits: Tensor | None
    reconstruction: list[Tensor] = field(default_factory=list)

    def to(self, device: torch.device) -> Prefill:
        """The same on a device (layers that are compressed, as of :meth:`rows`)."""
        if all(place.device == device for place in (self.next_position, *(layer.keys for layer in self._layers))):
            return self

        def moved(observations: list[Observation]) -> list[Observation]:
            return [replace(seen, queries=seen.queries.to(device)) for seen in observations]

        embedded, next_position = self.embedded.to(device), self.next_position.to(device)
        held = [(layer.keys.to(device), layer.values.to(device)) for layer in self._layers]
        return replace(
            self,
            cache=_full_cache(held, embedded.labels, next_position),
            labels=embedded.labels,
            observations=moved(self.observations),
            probes=None if self.probes is None else moved(self.probes),
            next_position=next_position,
            embedded=embedded,
            reconstruction=[peak.to(device) for peak in self.reconstruction],
        )._share_entries()

    def unstack(self) -> list[Prefill]:
        """Batches of one prompt each, without padding, in memory of their own: what a data set keeps of a clip.

        Raises:
            InputError: the decoder has layers that are not compressed (sliding windows).
        """
        if len(self._layers) < len(self.cache.layers):
            raise InputError(
                "has sliding-window layers, so that it cannot be kept by row; keep its embeddings", field="prefill"
            )
        parts = []
        for row, embedded in enumerate(self.embedded.unstack()):
            one, length = slice(row, row + 1), embedded.embeds.shape[1]
            held = [(layer.keys[one, :, -length:], layer.values[one, :, -length:]) for layer in self._layers]
            cut = replace(
                self,
                cache=_full_cache(held, embedded.labels, self.next_position[one]),
                labels=embedded.labels,
                observations=[_row(seen, one, length) for seen in self.observations],
                probes=None if self.probes is None else [_row(seen, one, length) for seen in self.probes],
                next_position=self.next_position[one],
                embedded=embedded,
                logits=None,
                reconstruction=[peak[one, :, -length:].clone() for peak in self.reconstruction],
            )
            parts.append(cut._share_entries())
        return parts

    @classmethod
    def stack(cls, rows: list[Prefill]) -> Prefill:
        """One left-padded batch of rows."""
        embedded = DecoderInputs.stack([row.embedded for row in rows])
        length = embedded.embeds.shape[1]

        def padded(tensors: list[Tensor]) -> Tensor:
            """Rows ``[1, K, tokens, ...]``."""
            return torch.cat([F.pad(t, (0, 0) * (t.ndim - 3) + (length - t.shape[2], 0)) for t in tensors])

        def stacked(layers: tuple[Observation, ...]) -> Observation:
            count = max(seen.query_valid.shape[1] for seen in layers)
            pads = [(count - seen.query_valid.shape[1], 0) for seen in layers]
            positions = [seen.query_positions + length - seen.real.shape[1] for seen in layers]
            return replace(
                layers[0],
                queries=torch.cat([F.pad(s.queries, (0, 0, *pad)) for s, pad in zip(layers, pads, strict=True)]),
                query_positions=torch.cat([F.pad(place, pad) for place, pad in zip(positions, pads, strict=True)]),
                query_valid=torch.cat([F.pad(s.query_valid, pad) for s, pad in zip(layers, pads, strict=True)]),
                real=embedded.labels.host.real,
            )

        held = [
            (padded([layer.keys for layer in slot]), padded([layer.values for layer in slot]))
            for slot in zip(*(row._layers for row in rows), strict=True)
        ]
        next_position = torch.cat([row.next_position for row in rows])
        probes = [row.probes for row in rows if row.probes is not None]
        return replace(
            rows[0],
            cache=_full_cache(held, embedded.labels, next_position),
            labels=embedded.labels,
            observations=[stacked(slot) for slot in zip(*(row.observations for row in rows), strict=True)],
            probes=[stacked(slot) for slot in zip(*probes, strict=True)] if probes else None,
            next_position=next_position,
            embedded=embedded,
            reconstruction=[padded(list(slot)) for slot in zip(*(row.reconstruction for row in rows), strict=True)],
        )._share_entries()

    @property
    def _layers(self) -> list[CompressedLayer]:
        return compressed_layers(self.cache)

    def _share_entries(self) -> Prefill:
        """Observations read the cache's own keys and values."""

        def shared(seen: Observation, layer: CompressedLayer) -> Observation:
            return replace(seen, keys=layer.keys, values=layer.values)

        def all_shared(observations: list[Observation]) -> list[Observation]:
            return [shared(seen, layer) for seen, layer in zip(observations, self._layers, strict=True)]

        probes = None if self.probes is None else all_shared(self.probes)
        return replace(self, observations=all_shared(self.observations), probes=probes)

    def watched(self, policy: Policy, when: When) -> list[Observation]:
        """The queries that a policy reads, out of all that were recorded.

        Raises:
            InputError: some were not.
        """
        if policy.queries == "text" and when == "context":
            if self.probes is None:
                raise InputError(
                    "recorded no probe prompt: open the session with a processor, and run its prefill with "
                    "queries='all' or 'text'",
                    field="prefill",
                )
            return self.probes
        mask = observed_queries(self.labels, policy.queries, policy.window_size)
        # Recorded queries end where the prompt ends.
        recorded = self.observations[0].query_valid
        if bool((mask & ~F.pad(recorded, (mask.shape[1] - recorded.shape[1], 0))).any()):
            raise InputError("lacks queries that this policy reads; run it with queries='all'", field="prefill")
        return [seen.select(mask[:, mask.shape[1] - seen.query_valid.shape[1] :]) for seen in self.observations]


def _full_cache(held: list[tuple[Tensor, Tensor]], labels: ModalityMap, next_position: Tensor) -> CompressedCache:
    """A cache that holds these keys and values of every layer, none compressed yet, in memory of its own."""
    lengths: list[int] = []
    layers = []
    for keys, values in held:
        layers.append(CompressedLayer(lengths))
        layers[-1].update(keys.clone(), values.clone())
    return CompressedCache(layers, labels, next_position)


def _row(seen: Observation, row: slice, length: int) -> Observation:
    """One row of an observation, `length` entries long; positions count from its first real token."""
    shift = seen.real.shape[1] - length
    kept = slice(max(seen.query_valid.shape[1] - length, 0), None)  # none of the padding's
    return replace(
        seen,
        queries=seen.queries[row, :, kept].clone(),
        query_positions=seen.query_positions[row, kept] - shift,
        query_valid=seen.query_valid[row, kept],
        real=seen.real[row, shift:],
    )
