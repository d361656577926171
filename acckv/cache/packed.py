"""Keys and values of a layer whose KV heads keep unequal numbers of entries, one head's behind the other's."""

from __future__ import annotations

import torch
from torch import Tensor


class PackedEntries:
    """One flat buffer of keys and one of values; each batch row and KV head has a contiguous segment with room to grow.

    A segment holds the head's compressed entries, then every later token, of which all heads have equally many. A
    buffer that several caches share (branches) is copied by the first of them that appends.

    Attributes:
        keys, values: ``[S, D]``, segments in order of row and head.
        lengths: int64 ``[B, K]``, on the CPU: compressed entries of each segment; width: at least the most of them.
        tail: later tokens of each segment; room: places free at its end.
        shared: whether another cache may read the buffers.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        lengths: Tensor,
        width: int,
        tail: int = 0,
        room: int = 0,
        shared: bool = False,
    ) -> None:
        self.keys, self.values, self.lengths, self.width = keys, values, lengths, width
        self.tail, self.room, self.shared = tail, room, shared
        sizes = lengths.flatten() + (tail + room)
        starts = sizes.cumsum(0) - sizes
        self._starts = starts.view_as(lengths)
        #: first free place of each segment; moves on with the tail
        self._ends = (starts + lengths.flatten() + tail).to(keys.device)
        self._regions = lengths.flatten().tolist()

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, counts: Tensor) -> PackedEntries:
        """The last ``counts[row, head]`` entries of keys and values ``[B, K, W, D]``; counts are on the CPU."""
        width = keys.shape[2]
        real = torch.arange(width) >= width - counts[..., None]
        index = real.flatten().nonzero()[:, 0].to(keys.device)
        return cls(
            keys.flatten(0, 2).index_select(0, index), values.flatten(0, 2).index_select(0, index), counts, width
        )

    @property
    def widest(self) -> int:
        """Entries of the rectangle that holds every segment, later tokens included."""
        return self.width + self.tail

    def segments(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Views of the keys and of the values, ``[1, 1, n, D]`` by row and head."""
        sizes = [size for region in self._regions for size in (region + self.tail, self.room)]
        keys, values = (part[None, None].split(sizes, dim=2)[::2] for part in (self.keys, self.values))
        return keys, values

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Later tokens ``[B, K, T, D]``, in place where there is room."""
        new = keys.shape[2]
        frozen = self.keys.is_inference() and not torch.is_inference_mode_enabled()
        if self.shared or frozen or new > self.room:
            # Room for one in fifty, so that what is free stays below the share of memory that it saves copies for.
            self._replace(self._copied(None, new + max(8, int(self.lengths.float().mean()) // 50)))
        places = self._ends
        if new > 1:
            places = (places[:, None] + torch.arange(new, device=places.device)).flatten()
        self.keys.index_copy_(0, places, keys.reshape(-1, keys.shape[-1]).to(self.keys.dtype))
        self.values.index_copy_(0, places, values.reshape(-1, values.shape[-1]).to(self.values.dtype))
        self._ends = self._ends + new
        self.tail, self.room = self.tail + new, self.room - new

    def crop(self, tokens: int) -> None:
        """Take the last tokens back."""
        self._ends = self._ends - tokens
        self.tail, self.room = self.tail - tokens, self.room + tokens

    def select(self, rows: Tensor) -> PackedEntries:
        """A copy of rows ``[R]``, any of them several times."""
        return self._copied(rows.cpu(), self.room)

    def share(self) -> PackedEntries:
        """The same entries for another cache."""
        self.shared = True
        return PackedEntries(self.keys, self.values, self.lengths, self.width, self.tail, self.room, shared=True)

    def to(self, device: torch.device) -> PackedEntries:
        """The same on a device."""
        keys, values = self.keys.to(device), self.values.to(device)
        return PackedEntries(keys, values, self.lengths, self.width, self.tail, self.room)

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Rectangular copies, every head's entries at the right end.

        Returns:
            keys and values ``[B, K, width + tail, D]``, and bool ``[B, K, width]``: the empty places before them.
        """
        width, device = self.widest, self.keys.device
        empty = torch.arange(self.width) < self.width - self.lengths[..., None]
        ends = self._starts + self.lengths + self.tail
        index = (ends[..., None] - width + torch.arange(width)).clamp_min(0).to(device)
        # Where no head holds anything, every place is empty.
        keys, values = (part if len(part) else part.new_zeros(1, part.shape[-1]) for part in (self.keys, self.values))
        return keys[index], values[index], empty.to(device)

    def _copied(self, rows: Tensor | None, room: int) -> PackedEntries:
        lengths = self.lengths if rows is None else self.lengths[rows]
        starts = self._starts if rows is None else self._starts[rows]
        held = lengths.flatten() + self.tail
        source = _ranges(starts.flatten(), held).to(self.keys.device)
        sizes = held + room
        target = _ranges(sizes.cumsum(0) - sizes, held).to(self.keys.device)
        keys, values = (
            torch.zeros(int(sizes.sum()), part.shape[-1], dtype=part.dtype, device=part.device).index_copy_(
                0, target, part.index_select(0, source)
            )
            for part in (self.keys, self.values)
        )
        return PackedEntries(keys, values, lengths, self.width, self.tail, room)

    def _replace(self, other: PackedEntries) -> None:
        vars(self).update(vars(other))


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """``starts[i], ..., starts[i] + lengths[i] - 1`` for each i, one after the other."""
    before = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + (starts - before).repeat_interleave(lengths)
