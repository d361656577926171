"""Left-padded batches, cut at different columns in different batch rows.

A column window is an int64 tensor ``[batch, width]`` of column indices, -1 where a batch row has fewer columns than the
longest. It stays on the CPU, so that nothing waits for an accelerator to learn its shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from acckv.method.modality import Modality, ModalityMap
from acckv.policies.base import Queries


@dataclass(frozen=True)
class DecoderInputs:
    """A batch as it enters the decoder: media encoded, positions computed, padded on the left.

    Attributes:
        embeds: ``[batch, tokens, hidden]``; position_ids: ``[..., batch, tokens]``.
        labels: of the tokens.
        others: the other arguments of the family's decoder, each ``[batch, tokens, ...]``.
    """

    embeds: Tensor
    position_ids: Tensor
    labels: ModalityMap
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def next_position(self) -> Tensor:
        """``[batch, 1]``: the position of text that follows these tokens."""
        return next_position(self.position_ids)

    def to(self, device: torch.device) -> DecoderInputs:
        """The same on a device."""
        others = {name: tensor.to(device) for name, tensor in self.others.items()}
        return DecoderInputs(self.embeds.to(device), self.position_ids.to(device), self.labels.to(device), others)

    def unstack(self) -> list[DecoderInputs]:
        """Batches of one prompt each, without padding, in memory of their own."""
        prompts = []
        for index, real in enumerate(self.labels.host.real):
            one, tokens = slice(index, index + 1), slice(int(real.long().argmax()), None)
            prompts.append(
                DecoderInputs(
                    self.embeds[one, tokens].clone(),
                    self.position_ids[..., one, tokens].clone(),
                    ModalityMap(self.labels.labels[one, tokens].clone()),
                    {name: tensor[one, tokens].clone() for name, tensor in self.others.items()},
                )
            )
        return prompts

    @classmethod
    def stack(cls, prompts: list[DecoderInputs]) -> DecoderInputs:
        """One left-padded batch out of batches of one prompt each."""

        def padded(tensors: list[Tensor], value: int = 0) -> Tensor:
            """A batch of tensors ``[1, tokens, ...]``."""
            rows = [tensor[0] for tensor in tensors]
            return pad_sequence(rows, batch_first=True, padding_value=value, padding_side="left")

        labels = ModalityMap(padded([prompt.labels.labels for prompt in prompts], int(Modality.PADDING)))
        length = labels.labels.shape[1]
        positions = [F.pad(p.position_ids, (length - p.position_ids.shape[-1], 0)) for p in prompts]
        return cls(
            padded([prompt.embeds for prompt in prompts]),
            torch.cat(positions, dim=-2),
            labels,
            {name: padded([prompt.others[name] for prompt in prompts]) for name in prompts[0].others},
        )

    def followed_by(self, other: DecoderInputs) -> DecoderInputs:
        """These tokens, then others; an argument that one of both lacks is zero there."""
        joined = {}
        for name in sorted(self.others.keys() | other.others.keys()):
            like = self.others[name] if name in self.others else other.others[name]
            parts = [
                part.others.get(name, like.new_zeros(*part.labels.labels.shape, *like.shape[2:]))
                for part in (self, other)
            ]
            joined[name] = torch.cat(parts, dim=1)
        return DecoderInputs(
            torch.cat([self.embeds, other.embeds], dim=1),
            torch.cat([self.position_ids, other.position_ids], dim=-1),
            ModalityMap(torch.cat([self.labels.labels, other.labels.labels], dim=1)),
            joined,
        )

    def gather(self, columns: Tensor, position_ids: Tensor) -> DecoderInputs:
        """The tokens of a column window, at other positions."""
        labels = gather_labels(self.labels, columns)
        others = {name: gather_columns(tensor, columns, 1) for name, tensor in self.others.items()}
        return DecoderInputs(gather_columns(self.embeds, columns, 1), position_ids, labels, others)


def next_position(position_ids: Tensor) -> Tensor:
    """Position ``[batch, 1]`` of text that follows tokens at `position_ids` ``[..., batch, tokens]``, in their dtype:
    M-RoPE may give positions that are no whole numbers."""
    last = rope_positions(position_ids[..., -1:])
    return (last.amax(dim=0) if last.ndim == 3 else last) + 1


def rope_positions(position_ids: Tensor) -> Tensor:
    """Position ids without the plain text positions that generate puts before (time, height, width)."""
    return position_ids[-3:] if position_ids.ndim == 3 else position_ids


def column_window(starts: Tensor, stops: Tensor, align: Literal["left", "right"] = "right") -> Tensor:
    """The columns ``starts .. stops - 1`` of each batch row (both int64 ``[batch]``, on the CPU)."""
    lengths = (stops - starts).clamp_min(0)
    width = int(lengths.max())
    steps = torch.arange(width)
    if align == "left":
        return (starts[:, None] + steps).masked_fill(steps >= lengths[:, None], -1)
    columns = stops[:, None] - width + steps
    return columns.masked_fill(columns < (stops - lengths)[:, None], -1)


def shift_left_padding(real: Tensor) -> Tensor:
    """A mask bool ``[batch, tokens]`` with the gaps of each batch row moved to its left."""
    return real.to(torch.uint8).sort(dim=1).values.bool()


def pad_left(prompts: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 ``[batch, longest]`` each, of prompts of token ids that end together."""
    ids = pad_sequence(list(prompts), batch_first=True, padding_value=pad_id, padding_side="left")
    masks = [torch.ones_like(prompt) for prompt in prompts]
    return ids, pad_sequence(masks, batch_first=True, padding_side="left")


def gather_columns(tensor: Tensor, columns: Tensor, dim: int, fill: int | float = 0) -> Tensor:
    """Gather a column window out of dimension `dim`; the batch is the dimension before it.

    Args:
        tensor: ``[..., batch, tokens, ...]``.
        fill: value where a batch row is shorter.
    """
    dim = dim % tensor.ndim
    if is_full_window(columns, tensor.shape[dim]):
        return tensor
    if _is_slice(columns):
        return tensor.narrow(dim, int(columns[0, 0]), columns.shape[1])
    columns = columns.to(tensor.device)
    trailing = tensor.ndim - dim - 1
    index = columns.clamp_min(0).view(*[1] * (dim - 1), *columns.shape, *[1] * trailing)
    shape = (*tensor.shape[:dim], columns.shape[1], *tensor.shape[dim + 1 :])
    missing = (columns < 0).view(*[1] * (dim - 1), *columns.shape, *[1] * trailing)
    return tensor.gather(dim, index.expand(shape)).masked_fill(missing, fill)


def gather_labels(labels: ModalityMap, columns: Tensor) -> ModalityMap:
    """A column window of a modality map, cut on the CPU."""
    if is_full_window(columns, labels.labels.shape[1]):
        return labels
    cut = gather_columns(labels.host.labels, columns, 1, fill=Modality.PADDING)
    return ModalityMap(cut).to(labels.labels.device)


def is_full_window(columns: Tensor, length: int) -> bool:
    """Whether a window is all of `length` columns in every batch row, so that nothing needs to be copied."""
    return columns.shape[1] == length and bool((columns >= 0).all())


def _is_slice(columns: Tensor) -> bool:
    """Whether a window is the same run of columns in every batch row, so that a view is enough."""
    batch, width = columns.shape
    return batch > 0 and width > 0 and bool((columns == columns[0, 0].clamp_min(0) + torch.arange(width)).all())


def scatter_columns(parts: list[tuple[Tensor, Tensor]], length: int) -> Tensor:
    """Hidden states ``[..., batch, width, hidden]`` of several windows, back in their columns.

    Args:
        parts: at least one (window, states).

    Returns:
        ``[..., batch, length, hidden]``, zero where no window reaches.
    """
    first = parts[0][1]
    if len(parts) == 1 and is_full_window(parts[0][0], length):
        return first
    hidden = first.new_zeros(*first.shape[:-2], length, first.shape[-1])
    for columns, states in parts:
        index, source = (columns >= 0).nonzero(as_tuple=True)
        target = columns[index, source]
        index, source, target = (part.to(first.device) for part in (index, source, target))
        hidden[..., index, target, :] = states[..., index, source, :]
    return hidden


def observed_queries(labels: ModalityMap, queries: Queries, width: int) -> Tensor:
    """bool ``[batch, tokens]``, on the CPU: the queries of a prompt that a policy observes (see
    :class:`acckv.policies.base.Policy`).

    Args:
        width: of the observation window, in queries.
    """
    labels = labels.host
    index = torch.arange(labels.labels.shape[1])
    if queries in ("none", "reconstruction"):
        return torch.zeros_like(labels.text)
    if queries == "window":
        return labels.real & (index >= index.shape[0] - width)
    if queries == "text":
        return labels.text & (index >= labels.media_end()[:, None])
    return labels.real
