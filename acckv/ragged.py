"""Cutting a left-padded batch at a different place in every row.

A window is an int64 tensor ``[batch, width]`` of column indices, aligned to the right, -1 where a row is shorter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from acckv.modality import ModalityMap
from acckv.policies.base import Rows


def window(starts: Tensor, stops: Tensor) -> Tensor:
    """The window of columns ``starts .. stops - 1`` of each row (both int64 ``[batch]``)."""
    lengths = (stops - starts).clamp_min(0)
    width = int(lengths.max())
    columns = stops[:, None] - width + torch.arange(width, device=starts.device)
    return columns.masked_fill(columns < (stops - lengths)[:, None], -1)


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


def decoder_inputs(kwargs: dict[str, Any], columns: Tensor, mask: Tensor) -> dict[str, Any]:
    """A decoder's keyword arguments cut to a window of its tokens.

    Args:
        kwargs: with inputs_embeds ``[batch, tokens, hidden]`` and position_ids ``[..., batch, tokens]`` or None.
        mask: bool ``[batch, seen + width]`` of all tokens up to the window's end.
    """
    embeds, positions = kwargs["inputs_embeds"], kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(embeds.shape[1], device=embeds.device).expand(embeds.shape[:2])
    return {
        **kwargs,
        "inputs_embeds": take(embeds, columns, 1),
        "position_ids": take(positions, columns, -1),
        "attention_mask": mask.long(),
    }


def scatter_back(parts: list[tuple[Tensor, Tensor]], length: int) -> Tensor:
    """Put hidden states ``[batch, width, hidden]`` of several windows back in their columns.

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
