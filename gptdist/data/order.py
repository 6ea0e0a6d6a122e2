"""Which window of the corpus sample number i trains on: a pure function of (seed, i), in O(1) time and memory.

Knows integers only: no files, no torch. An epoch is a keyed permutation of the windows (`permutation.py`), with keys of
its own. How samples are dealt to data ranks is here too, and never changes which sample is which. The other order, for
corpora far away, is in `local_order.py`.
"""

from abc import ABC, abstractmethod
from typing import Protocol

import numpy as np

from gptdist.data.permutation import MAX_SIZE, KeyedPermutation
from gptdist.errors import ConfigError

MAX_WINDOWS = MAX_SIZE


class Arrangement(Protocol):
    """The order of one epoch: a permutation of the windows."""

    def at(self, position: int) -> int:
        """The window at `position`."""
        ...

    def of(self, positions: np.ndarray) -> np.ndarray:
        """The windows at many positions: int64."""
        ...

    def position_of(self, point: int) -> int:
        """The position of a window: the inverse of `at`."""
        ...


class EpochOrder(ABC):
    """Sample number -> (epoch, window) for a corpus of `num_windows` windows, each once in an epoch."""

    def __init__(self, seed: int, num_windows: int) -> None:
        if not 1 <= num_windows <= MAX_WINDOWS:
            raise ValueError(f"num_windows is {num_windows}; an order needs 1 to {MAX_WINDOWS} windows")
        self.seed = seed
        self.num_windows = num_windows

    def window(self, sample: int) -> tuple[int, int]:
        """The epoch and the window of sample number `sample`, counted from 0."""
        if sample < 0:
            raise ValueError(f"sample is {sample}; samples count from 0")
        epoch, position = divmod(sample, self.num_windows)
        return epoch, self._epoch(epoch).at(position)

    def sample(self, epoch: int, window: int) -> int:
        """The sample number that trains on `window` in `epoch`: the inverse of `window`."""
        if not 0 <= window < self.num_windows:
            raise ValueError(f"window is {window}; there are {self.num_windows}")
        return epoch * self.num_windows + self._epoch(epoch).position_of(window)

    def windows(self, first_sample: int, count: int) -> np.ndarray:
        """Windows of samples `first_sample` to `first_sample + count - 1`: int64 [count]."""
        return self.windows_of(np.arange(first_sample, first_sample + count, dtype=np.int64))

    def windows_of(self, samples: np.ndarray) -> np.ndarray:
        """Windows of any sample numbers: int64, the shape of `samples`."""
        if samples.size and int(samples.min()) < 0:
            raise ValueError(f"samples count from 0, not {int(samples.min())}")
        epochs, positions = np.divmod(np.asarray(samples, dtype=np.int64), self.num_windows)
        windows = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            windows[chosen] = self._epoch(int(epoch)).of(positions[chosen])
        return windows

    @abstractmethod
    def _epoch(self, epoch: int) -> Arrangement:
        """The order of an epoch."""


class WindowOrder(EpochOrder):
    """The global shuffle: any window may follow any."""

    def _epoch(self, epoch: int) -> KeyedPermutation:
        return KeyedPermutation(f"gptdist window order: seed {self.seed}, epoch {epoch}", self.num_windows)


def micro_batches(
    first_sample: int, global_batch_size: int, micro_batch_size: int, data_rank: int, data_size: int
) -> np.ndarray:
    """Sample numbers that one data rank takes of a global batch: int64 [num_micro_batches, micro_batch_size].

    Micro-batch m of data rank r holds samples first + (m x data_size + r) x micro + [0, micro): the union over data
    ranks is the global batch, and sample numbers mean the same for every data_size. Raises ConfigError where the sizes
    do not divide.
    """
    samples_at_once = micro_batch_size * data_size
    if global_batch_size <= 0 or global_batch_size % samples_at_once:
        lower = global_batch_size // samples_at_once * samples_at_once
        choices = f"{lower} or {lower + samples_at_once}" if lower > 0 else str(samples_at_once)
        raise ConfigError(
            f"The global batch size ({global_batch_size}) is not a multiple of train.micro_batch_size "
            f"({micro_batch_size}) x data-parallel size ({data_size}) = {samples_at_once}. Use {choices}."
        )
    turns = np.arange(global_batch_size // samples_at_once, dtype=np.int64)[:, None] * data_size + data_rank
    return first_sample + turns * micro_batch_size + np.arange(micro_batch_size, dtype=np.int64)
