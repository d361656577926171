"""The order of clips by the number of the step alone, so that a resumed run goes on as if never interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from torch.utils.data import Sampler


class StepSampler(Sampler[list[tuple[int, int]]]):
    """Batches as a pure function of their number, so that a resumed run sees what an uninterrupted one would have.

    Args:
        clips: how many there are; every pass over them is shuffled anew by (seed, pass).
        batches: of an epoch; start: gives the number of the first one still to come, counted from the first epoch. It
            is asked when iteration begins: a trainer may build the loader before it restores a checkpoint.
        rank, world: this process takes every `world`-th clip of a batch of ``batch_size * world``.
        accumulate: batches of an optimiser step. They take the clips that one batch of their joint size would.

    Yields:
        (clip, number of the optimiser step) for each clip of a batch.
    """

    def __init__(
        self,
        clips: int,
        batch_size: int,
        batches: int,
        start: Callable[[], int],
        seed: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        self.clips, self.batch_size, self.batches, self.start = clips, batch_size, batches, start
        self.seed, self.rank, self.world, self.accumulate = seed, rank, world, accumulate

    def __len__(self) -> int:
        return self.batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        whole, start = self.batch_size * self.world, self.start()
        for number in range(start, (start // self.batches + 1) * self.batches):
            places = range(number * whole + self.rank, (number + 1) * whole, self.world)
            yield [(self._clip(place), number // self.accumulate) for place in places]

    def _clip(self, place: int) -> int:
        passed, index = divmod(place, self.clips)
        return int(np.random.default_rng((self.seed, passed)).permutation(self.clips)[index])
