"""Cutting a left-padded batch at a different place in every row.

A window is an int64 tensor ``[batch, width]`` of column indices, aligned to the right, -1 where a row is shorter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acckv.errors import InputError
from acckv.modality import Modality, ModalityMap
from acckv.policies.base import Rows


@dataclass(frozen=True)
class DecoderInputs:
    """A batch as it enters the decoder: media encoded, positions computed, padded on the left.

    Attributes:
        embeds: ``[batch, tokens, hidden]``; position_ids: ``[..., batch, tokens]``.
        labels: of the tokens.
    """

    embeds: Tensor
    position_ids: Tensor
    labels: ModalityMap

    @classmethod
    def of(cls, kwargs: dict[str, Any], labels: ModalityMap) -> DecoderInputs:
        """From the keyword arguments of a decoder's forward."""
        positions = kwargs.get("position_ids")
        if positions is None:
            raise InputError("the model gave its decoder no positions; pass an attention_mask", field="attention_mask")
        return cls(kwargs["inputs_embeds"].detach(), positions, labels)

    @property
    def next_position(self) -> Tensor:
        """int64 ``[batch, 1]``: where text after these tokens goes on."""
        return next_position(self.position_ids)

    def arguments(self, cache: Any) -> dict[str, Any]:
        """Keyword arguments of the decoder's forward."""
        return {
            "inputs_embeds": self.embeds,
            "position_ids": self.position_ids,
            "attention_mask": self.labels.real.long(),
            "past_key_values": cache,
            "use_cache": True,
        }

    def rows(self) -> list[DecoderInputs]:
        """Each row by itself, without its padding, in memory of its own."""
        parts = []
        for row, real in enumerate(self.labels.real):
            start = int(real.long().argmax())
            labels = ModalityMap(self.labels.labels[row : row + 1, start:].clone())
            position_ids = self.position_ids[..., row : row + 1, start:].clone()
            parts.append(DecoderInputs(self.embeds[row : row + 1, start:].clone(), position_ids, labels))
        return parts

    @classmethod
    def stack(cls, rows: list[DecoderInputs]) -> DecoderInputs:
        """One left-padded batch of rows."""
        length = max(row.embeds.shape[1] for row in rows)
        missing = [length - row.embeds.shape[1] for row in rows]
        return cls(
            torch.cat([F.pad(row.embeds, (0, 0, pad, 0)) for row, pad in zip(rows, missing, strict=True)]),
            torch.cat([F.pad(row.position_ids, (pad, 0)) for row, pad in zip(rows, missing, strict=True)], dim=-2),
            ModalityMap(
                torch.cat(
                    [
                        F.pad(row.labels.labels, (pad, 0), value=int(Modality.PADDING))
                        for row, pad in zip(rows, missing, strict=True)
                    ]
                )
            ),
        )


def next_position(position_ids: Tensor) -> Tensor:
    """Where text goes on after tokens at `position_ids` ``[..., batch, tokens]``: int64 ``[batch, 1]``."""
    last = rope_positions(position_ids[..., -1:])
    return (last.amax(dim=0) if last.ndim == 3 else last) + 1


def rope_positions(position_ids: Tensor) -> Tensor:
    """Position ids without the plain text positions that generate puts before (time, height, width)."""
    return position_ids[-3:] if position_ids.ndim == 3 else position_ids


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
