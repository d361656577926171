"""Loads the batches of a calibration: worker processes read and encode clips, this one adds what was kept of them."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any, Protocol

from torch.utils.data import DataLoader, Dataset, Sampler

from acckv.errors import InputError
from lightning_modules.calibration.dataset import CalibrationBatch, ClipDataset

Key = tuple[int, int]
"""A clip, and the number of the step that visits it."""


class Order(Protocol):
    """Batches of keys, such as a :class:`lightning_modules.calibration.sampler.StepSampler`."""

    def __iter__(self) -> Iterator[list[Key]]: ...
    def __len__(self) -> int: ...


class ClipLoader(DataLoader[Any]):
    """Batches of a dataset in a given order, the same ones with any number of workers.

    Clips of which enough is kept are not read. Workers run ahead, so that one that was kept meanwhile may be read all
    the same; what was kept is what counts. The place of the order is the trainer's global step: nothing else is saved.

    Args:
        clips: the dataset; order: its batches.
        num_workers: processes that read ahead; 0 reads each batch when it is due.
    """

    def __init__(self, clips: ClipDataset, order: Order, num_workers: int = 0) -> None:
        self.clips = clips
        super().__init__(
            _Inputs(clips), batch_sampler=_Unread(clips, order), collate_fn=_as_it_is, num_workers=num_workers
        )

    def __iter__(self) -> Iterator[CalibrationBatch]:  # type: ignore[override]
        for keys, inputs in super().__iter__():
            if isinstance(inputs, InputError):
                raise inputs
            yield self.clips.collate([self.clips[key] for key in keys], inputs)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class _Unread(Sampler[list[tuple[Key, bool]]]):
    """Batches of keys, each with whether the clips of its batch have to be read."""

    def __init__(self, clips: ClipDataset, order: Order) -> None:
        self.clips, self.order = clips, order

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[list[tuple[Key, bool]]]:
        for keys in self.order:
            unread = not self.clips.has_kept([index for index, _ in keys])
            yield [(key, unread) for key in keys]


class _Inputs(Dataset[Any], Sized):
    """Model inputs of a batch, or why it cannot be read: an error that crosses a process as it is."""

    def __init__(self, clips: ClipDataset) -> None:
        self.clips = clips

    def __len__(self) -> int:
        return len(self.clips)

    def __getitems__(self, batch: list[tuple[Key, bool]]) -> tuple[list[Key], dict[str, Any] | InputError | None]:
        keys = [key for key, _ in batch]
        if not batch[0][1]:
            return keys, None
        try:
            return keys, self.clips.inputs([self.clips[key] for key in keys])
        except InputError as error:
            return keys, error


def _as_it_is(made: Any) -> Any:
    return made
