"""What the teacher says about a clip's questions, kept so that it is asked once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acckv.data.batching import PackedTurns
from lightning_modules.calibration.losses import Divergence, divergence
from lightning_modules.calibration.top_tokens import TopTokens

#: Vocabularies up to this size are kept whole: the ids of the likeliest tokens would take as much.
WHOLE = 1024


@dataclass(frozen=True)
class TeacherTargets:
    """What the base model computes from its full cache at the tokens that count, in the order of rows and tokens.

    Attributes:
        words: the distributions over the next token, as logits ``[tokens, vocabulary]`` or by their likeliest tokens.
        outputs: ``[layers, tokens, size]`` of the modules whose outputs are matched; ``[0, tokens, 0]`` without any.
    """

    words: Tensor | TopTokens
    outputs: Tensor

    @classmethod
    def at(cls, counted: Tensor, logits: Tensor, outputs: Sequence[Tensor]) -> TeacherTargets:
        """What counts of a forward.

        Args:
            counted: int64 ``[tokens]`` places in B x T; logits: ``[tokens, vocabulary]`` of these alone; outputs: by
                layer ``[B, T, size]``.
        """
        return cls(logits, outputs_at(counted, outputs, logits))

    @classmethod
    def join(cls, parts: Sequence[TeacherTargets]) -> TeacherTargets:
        """One after the other."""
        words = [part.words for part in parts]
        outputs = torch.cat([part.outputs for part in parts], dim=1)
        if any(isinstance(part, TopTokens) for part in words):
            return cls(TopTokens.join([part for part in words if isinstance(part, TopTokens)]), outputs)
        return cls(torch.cat([part for part in words if isinstance(part, Tensor)]), outputs)

    def divergence(self, logits: Tensor, weight: Tensor, kind: Divergence) -> Tensor:
        """Weighted mean KL between these distributions and a student's, as
        :func:`lightning_modules.calibration.losses.divergence`.

        Of likeliest tokens it is a lower bound; see :meth:`TopTokens.divergence`.
        """
        if isinstance(self.words, Tensor):
            return divergence(self.words, logits, weight, kind)
        kl = self.words.divergence(logits, reverse=kind == "reverse")
        return (kl * weight).sum() / weight.sum()

    def likeliest(self, top_p: float) -> TeacherTargets:
        """The same by the likeliest tokens that cover `top_p` of each distribution, where that is less to hold."""
        if not isinstance(self.words, Tensor) or top_p >= 1 or self.words.shape[1] <= WHOLE:
            return self
        return TeacherTargets(TopTokens.of(self.words, top_p), self.outputs)

    def by_turn(self, turns: PackedTurns) -> list[list[TeacherTargets]]:
        """The part of each turn of each row, in memory of its own."""
        counted, start = turns.weight > 0, 0
        parts: list[list[TeacherTargets]] = []
        for row in range(len(turns.turn)):
            parts.append([])
            for count in turns.turn[row, counted[row]].unique_consecutive(return_counts=True)[1].tolist():
                stop, words = start + count, self.words
                cut = words[start:stop].clone() if isinstance(words, Tensor) else words.cut(start, stop)
                parts[row].append(TeacherTargets(cut, self.outputs[:, start:stop].clone()))
                start = stop
        return parts

    def to(self, device: torch.device) -> TeacherTargets:
        return TeacherTargets(self.words.to(device), self.outputs.to(device))


def outputs_at(counted: Tensor, outputs: Sequence[Tensor], logits: Tensor) -> Tensor:
    """Outputs of modules at the tokens that count, ``[layers, tokens, size]``; as :meth:`TeacherTargets.at`."""
    chosen = [layer.flatten(0, 1).index_select(0, counted) for layer in outputs]
    return torch.stack(chosen) if chosen else logits.new_zeros(0, len(logits), 0)


@dataclass(frozen=True)
class PendingTargets:
    """Every question about the clips of a batch, of which the base model is to be asked.

    Attributes:
        turns: all of them; drawn: which of a row's are among the turns of this step, in their order.
        top_p: share of each distribution whose likeliest tokens are kept.
        keep: takes what the base model says at each, by row.
    """

    turns: PackedTurns
    drawn: list[list[int]]
    top_p: float
    keep: Callable[[list[list[TeacherTargets]]], None]

    def take(self, targets: TeacherTargets) -> TeacherTargets:
        """Keep what the base model says about all; gives what it says about those that were drawn."""
        parts = targets.likeliest(self.top_p).by_turn(self.turns)
        self.keep(parts)
        return TeacherTargets.join([parts[row][place] for row, places in enumerate(self.drawn) for place in places])
