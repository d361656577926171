"""The request that is served: what the forwards that run now are for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from acckv.models.batching import DecoderInputs
from acckv.policies.base import Queries
from acckv.runtime.new_tokens import NewTokens
from acckv.runtime.observation import Recorder
from acckv.runtime.simulation import Simulation

#: Who asked, and for what: a call of the user's own; or the session, which evicts, records, or simulates.
Mode = Literal["user", "evict", "record", "simulate"]


@dataclass
class Request:
    """One call of the user's, or of the session itself, from its start to its end.

    Attributes:
        mode: what it is for. In mode 'user' new tokens are read off the model's arguments.
        new_tokens: what the next forward of the decoder brings; None once it has, and for a generated token.
        modality_ids, prompt_length: as given to generate, until its first forward has taken them.
        ratio: to evict at; None is the config's. queries: to record.
        simulation: what attention goes through.
        reached: whether any forward of the decoder came through the session.
        recorder: what was recorded; embedded: the new tokens as they entered the decoder.
    """

    mode: Mode = "user"
    new_tokens: NewTokens | None = None
    modality_ids: Tensor | None = None
    prompt_length: int | None = None
    ratio: float | None = None
    queries: Queries = "all"
    simulation: Simulation | None = None
    reached: bool = False
    recorder: Recorder | None = None
    embedded: DecoderInputs | None = None
