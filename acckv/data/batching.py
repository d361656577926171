"""Batches for calibration: several clips, each with several turns that do not see one another.

A turn is one question with its answer after the same media. All turns of a clip stand in one row behind its context,
so a prefill is paid once; the mask hides them from each other and their positions start anew, which makes every turn
equal to a conversation of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from acckv.method.modality import ModalityMap


@dataclass(frozen=True)
class Turn:
    """Tokens of one turn.

    Args:
        ids: int64 ``[tokens]`` after the prefilled part: question, answer and end token.
        first: index of the first token whose prediction counts: the one before the answer.
    """

    ids: Tensor
    first: int


@dataclass(frozen=True)
class PackedTurns:
    """The turns of a batch, padded on the right.

    Attributes:
        ids: ``[B, T]``.
        turn: ``[B, T]`` which turn of its row a token belongs to, -1 for padding.
        offset: ``[B, T]`` place of a token inside its turn.
        weight: float ``[B, T]`` weight of the prediction made at this token.
        counted: int64 ``[predictions]`` places of the tokens that weigh, rows laid behind one another.
    """

    ids: Tensor
    turn: Tensor
    offset: Tensor
    weight: Tensor
    counted: Tensor

    def to(self, device: torch.device) -> PackedTurns:
        parts = self.ids, self.turn, self.offset, self.weight, self.counted
        return PackedTurns(*(tensor.to(device) for tensor in parts))

    def mask(self, labels: ModalityMap, dtype: torch.dtype) -> Tensor:
        """Additive attention mask ``[B, 1, T, N + T]``: the whole context and the earlier tokens of the same turn."""
        batch, length = self.ids.shape
        same = self.turn[:, :, None] == self.turn[:, None, :]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.ids.device).tril()
        context = labels.real[:, None, :].expand(-1, length, -1)
        visible = torch.cat([context, same & causal], dim=-1)
        mask = torch.zeros(batch, 1, length, visible.shape[-1], dtype=dtype, device=self.ids.device)
        return mask.masked_fill(~visible[:, None], torch.finfo(dtype).min)


def pack_turns(rows: list[list[Turn]]) -> PackedTurns:
    """Lay the turns of each row behind one another.

    An answer of n tokens weighs ``sqrt(n)`` in all: a description counts more than a word, but not n times as much.
    """
    length = max(sum(len(turn.ids) for turn in turns) for turns in rows)
    shape = (len(rows), length)
    ids, turn_of = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    offset, weight = torch.zeros_like(ids), torch.zeros(shape)
    for row, turns in enumerate(rows):
        start = 0
        for number, turn in enumerate(turns):
            stop = start + len(turn.ids)
            ids[row, start:stop] = turn.ids
            turn_of[row, start:stop] = number
            offset[row, start:stop] = torch.arange(len(turn.ids))
            answer = len(turn.ids) - 1 - turn.first
            weight[row, start + turn.first : stop - 1] = max(answer, 1) ** -0.5
            start = stop
    return PackedTurns(ids, turn_of, offset, weight, weight.flatten().nonzero()[:, 0])
