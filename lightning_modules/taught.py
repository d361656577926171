"""What the teacher said about a clip's questions, kept so that it is asked once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acckv.data.batching import PackedTurns


@dataclass(frozen=True)
class Taught:
    """What the base model computes from its full cache at the tokens that count, in the order of rows and tokens.

    Attributes:
        logits: ``[tokens, vocabulary]``.
        outputs: ``[layers, tokens, size]`` of the modules whose outputs are matched; ``[0, tokens, 0]`` without any.
    """

    logits: Tensor
    outputs: Tensor

    @classmethod
    def at(cls, counted: Tensor, logits: Tensor, outputs: Sequence[Tensor]) -> Taught:
        """What counts of a forward.

        Args:
            counted: int64 ``[tokens]`` places in B x T; logits: ``[tokens, vocabulary]`` of these alone; outputs: by
                layer ``[B, T, size]``.
        """
        chosen = [layer.flatten(0, 1).index_select(0, counted) for layer in outputs]
        return cls(logits, torch.stack(chosen) if chosen else logits.new_zeros(0, len(logits), 0))

    @classmethod
    def join(cls, parts: Sequence[Taught]) -> Taught:
        """One after the other."""
        return cls(torch.cat([part.logits for part in parts]), torch.cat([part.outputs for part in parts], dim=1))

    def by_turn(self, turns: PackedTurns) -> list[list[Taught]]:
        """The part of each turn of each row, in memory of its own."""
        counted, start = turns.weight > 0, 0
        parts: list[list[Taught]] = []
        for row in range(len(turns.turn)):
            parts.append([])
            for count in turns.turn[row, counted[row]].unique_consecutive(return_counts=True)[1].tolist():
                stop = start + count
                parts[row].append(Taught(self.logits[start:stop].clone(), self.outputs[:, start:stop].clone()))
                start = stop
        return parts

    def to(self, device: torch.device) -> Taught:
        return Taught(self.logits.to(device), self.outputs.to(device))


@dataclass(frozen=True)
class Lesson:
    """Every question about the clips of a batch.

    Attributes:
        turns: all of them; drawn: which of a row's are among the turns of this step, in their order.
        keep: takes what the base model says at each, by row.
    """

    turns: PackedTurns
    drawn: list[list[int]]
    keep: Callable[[list[list[Taught]]], None]

    def heard(self, taught: Taught) -> Taught:
        """Keep what the base model says about all; gives what it says about those that were drawn."""
        parts = taught.by_turn(self.turns)
        self.keep(parts)
        return Taught.join([parts[row][place] for row, places in enumerate(self.drawn) for place in places])
