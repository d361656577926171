"""Cutting a left-padded batch at a different place in every row.

A window is an int64 tensor ``[batch, width]`` of column indices, -1 where a row is shorter than the longest. It stays
on the CPU, so that nothing waits for an accelerator to learn its shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from acckv.method.modality import Modality, ModalityMap
from acckv.policies.base import Rows


@dataclass(frozen=True)
class DecoderInputs:
    """A batch as it enters the decoder: media encoded, positions computed, padded on the left.

    Attributes:
        embeds: ``[batch, tokens, hidden]``; position_ids: ``[..., batch, tokens]``.
        labels: of the tokens.
        others: what else the family's decoder gets, each ``[batch, tokens, ...]``.
    """

    embeds: Tensor
    position_ids: Tensor
    labels: ModalityMap
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def next_position(self) -> Tensor:
        """``[batch, 1]``: where text after these tokens goes on."""
        return next_position(self.position_ids)

    def to(self, device: torch.device) -> DecoderInputs:
        """The same on a device."""
        others = {name: tensor.to(device) for name, tensor in self.others.items()}
        return DecoderInputs(self.embeds.to(device), self.position_ids.to(device), self.labels.to(device), others)

    def rows(self) -> list[DecoderInputs]:
        """Each row by itself, without its padding, in memory of its own."""
        parts = []
        for row, real in enumerate(self.labels.host.real):
            start = int(real.long().argmax())
            labels = ModalityMap(self.labels.labels[row : row + 1, start:].clone())
            position_ids = self.position_ids[..., row : row + 1, start:].clone()
            others = {name: tensor[row : row + 1, start:].clone() for name, tensor in self.others.items()}
            parts.append(DecoderInputs(self.embeds[row : row + 1, start:].clone(), position_ids, labels, others))
        return parts

    @classmethod
    def stack(cls, rows: list[DecoderInputs]) -> DecoderInputs:
        """One left-padded batch of rows."""
        length = max(row.embeds.shape[1] for row in rows)
        missing = [length - row.embeds.shape[1] for row in rows]

        def padded(tensors: list[Tensor], value: int = 0) -> Tensor:
            """Rows ``[1, tokens, ...]``."""
            tail = (0, 0) * (tensors[0].ndim - 2)
            return torch.cat([F.pad(t, (*tail, pad, 0), value=value) for t, pad in zip(tensors, missing, strict=True)])

        positions = [F.pad(row.position_ids, (pad, 0)) for row, pad in zip(rows, missing, strict=True)]
        return cls(
            padded([row.embeds for row in rows]),
            torch.cat(positions, dim=-2),
            ModalityMap(padded([row.labels.labels for row in rows], int(Modality.PADDING))),
            {name: padded([row.others[name] for row in rows]) for name in rows[0].others},
        )

    def window(self, columns: Tensor, position_ids: Tensor) -> DecoderInputs:
        """A window of the tokens, at other positions."""
        labels = window_labels(self.labels, columns)
        others = {name: take(tensor, columns, 1) for name, tensor in self.others.items()}
        return DecoderInputs(take(self.embeds, columns, 1), position_ids, labels, others)


def next_position(position_ids: Tensor) -> Tensor:
    """Where text goes on after tokens at `position_ids` ``[..., batch, tokens]``: ``[batch, 1]``, whole or not as they
    are."""
    last = rope_positions(position_ids[..., -1:])
    return (last.amax(dim=0) if last.ndim == 3 else last) + 1


def rope_positions(position_ids: Tensor) -> Tensor:
    """Position ids without the plain text positions that generate puts before (time, height, width)."""
    return position_ids[-3:] if position_ids.ndim == 3 else position_ids


def window(starts: Tensor, stops: Tensor, align: Literal["left", "right"] = "right") -> Tensor:
    """The window of columns ``starts .. stops - 1`` of each row (both int64 ``[batch]``, on the CPU)."""
    lengths = (stops - starts).clamp_min(0)
    width = int(lengths.max())
    steps = torch.arange(width)
    if align == "left":
        return (starts[:, None] + steps).masked_fill(steps >= lengths[:, None], -1)
    columns = stops[:, None] - width + steps
    return columns.masked_fill(columns < (stops - lengths)[:, None], -1)


def packed(real: Tensor) -> Tensor:
    """A mask bool ``[batch, tokens]`` with each row's gaps moved to its left."""
    return real.to(torch.uint8).sort(dim=1).values.bool()


def take(tensor: Tensor, columns: Tensor, dim: int, fill: int | float = 0) -> Tensor:
    """Gather a window out of dimension `dim`; the batch is the dimension before it.

    Args:
        tensor: ``[..., batch, tokens, ...]``.
        fill: value where a row is shorter.
    """
    dim = dim % tensor.ndim
    if covers(columns, tensor.shape[dim]):
        return tensor
    if is_slice(columns):
        return tensor.narrow(dim, int(columns[0, 0]), columns.shape[1])
    columns = columns.to(tensor.device)
    trailing = tensor.ndim - dim - 1
    index = columns.clamp_min(0).view(*[1] * (dim - 1), *columns.shape, *[1] * trailing)
    shape = (*tensor.shape[:dim], columns.shape[1], *tensor.shape[dim + 1 :])
    missing = (columns < 0).view(*[1] * (dim - 1), *columns.shape, *[1] * trailing)
    return tensor.gather(dim, index.expand(shape)).masked_fill(missing, fill)


def left_padded(rows: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 ``[rows, longest]`` each, of rows of ids that end together."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, longest - len(row) :] = row
        mask[place, longest - len(row) :] = 1
    return ids, mask


def window_labels(labels: ModalityMap, columns: Tensor) -> ModalityMap:
    """A window of a modality map, cut on the CPU."""
    if covers(columns, labels.labels.shape[1]):
        return labels
    return ModalityMap(take(labels.host.labels, columns, 1, fill=Modality.PADDING)).to(labels.labels.device)


def covers(columns: Tensor, length: int) -> bool:
    """Whether a window is all of `length` columns in every row, so that nothing needs to be copied."""
    return columns.shape[1] == length and bool((columns >= 0).all())


def is_slice(columns: Tensor) -> bool:
    """Whether a window is the same run of columns in every row, so that a view is enough."""
    rows, width = columns.shape
    return rows > 0 and width > 0 and bool((columns == columns[0, 0].clamp_min(0) + torch.arange(width)).all())


def scatter_back(parts: list[tuple[Tensor, Tensor]], length: int) -> Tensor:
    """Put hidden states ``[..., batch, width, hidden]`` of several windows back in their columns.

    Args:
        parts: at least one (window, states).

    Returns:
        ``[..., batch, length, hidden]``, zero where no window reaches.
    """
    first = parts[0][1]
    if len(parts) == 1 and covers(parts[0][0], length):
        return first
    hidden = first.new_zeros(*first.shape[:-2], length, first.shape[-1])
    for columns, states in parts:
        rows, places = (columns >= 0).nonzero(as_tuple=True)
        to, come, row = (part.to(first.device) for part in (columns[rows, places], places, rows))
        hidden[..., row, to, :] = states[..., row, come, :]
    return hidden


def watched_rows(labels: ModalityMap, rows: Rows, width: int) -> Tensor:
    """bool ``[batch, tokens]``, on the CPU: the rows of a prompt that a policy reads (see
    :class:`acckv.policies.base.Policy`).

    Args:
        width: of the observation window, in rows.
    """
    labels = labels.host
    index = torch.arange(labels.labels.shape[1])
    if rows in ("none", "repetition"):
        return torch.zeros_like(labels.text)
    if rows == "window":
        return labels.real & (index >= index.shape[0] - width)
    if rows == "text":
        return labels.text & (index >= labels.media_end()[:, None])
    return labels.real
