"""Cutting a left-padded batch at a different place in every row.

A window is an int64 tensor ``[batch, width]`` of column indices, -1 where a row is shorter than the longest.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from acckv.modality import ModalityMap
from acckv.policies.base import Rows


def window(starts: Tensor, stops: Tensor, align: Literal["left", "right"] = "right") -> Tensor:
    """The window of columns ``starts .. stops - 1`` of each row (both int64 ``[batch]``)."""
    lengths = (stops - starts).clamp_min(0)
    width = int(lengths.max())
    steps = torch.arange(width, device=starts.device)
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
    trailing = tensor.ndim - dim - 1
    index = columns.clamp_min(0).view(*[1] * (dim - 1), *columns.shape, *[1] * trailing)
    shape = (*tensor.shape[:dim], columns.shape[1], *tensor.shape[dim + 1 :])
    missing = (columns < 0).view(*[1] * (dim - 1), *columns.shape, *[1] * trailing)
    return tensor.gather(dim, index.expand(shape)).masked_fill(missing, fill)


def scatter_back(parts: list[tuple[Tensor, Tensor]], length: int) -> Tensor:
    """Put hidden states ``[batch, width, hidden]`` of several windows back in their columns.

    Args:
        parts: at least one (window, states).

    Returns:
        ``[batch, length, hidden]``, zero where no window reaches.
    """
    first = parts[0][1]
    hidden = first.new_zeros(first.shape[0], length, first.shape[-1])
    for columns, states in parts:
        rows, places = (columns >= 0).nonzero(as_tuple=True)
        hidden[rows, columns[rows, places]] = states[rows, places]
    return hidden


def watched_rows(labels: ModalityMap, rows: Rows, width: int) -> Tensor:
    """bool ``[batch, tokens]``: the rows of a prompt that a policy reads (see :class:`acckv.policies.base.Policy`).

    Args:
        width: of the observation window, in rows.
    """
    index = torch.arange(labels.labels.shape[1], device=labels.labels.device)
    if rows == "none":
        return torch.zeros_like(labels.text)
    if rows == "window":
        return labels.real & (index >= index.shape[0] - width)
    if rows == "text":
        return labels.text & (index >= labels.media_end()[:, None])
    return labels.real
