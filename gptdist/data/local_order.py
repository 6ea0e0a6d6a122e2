"""The order for corpora whose shards are far away: shuffled in blocks of neighbours, read from few shards at once.

Knows integers only. An epoch puts the blocks of a corpus into the order of a keyed permutation; `blocks_per_buffer` of
them in a row are a buffer, within which every window may follow any other, by a keyed permutation of its own. Each
window comes once in an epoch, in O(1) time and memory, and the same for any number of ranks, as in `order.py`.

What is kept of a uniform shuffle: where a block comes in the epoch is uniform, and so is the order within a buffer.
What is not: two windows of a block are never further apart than a buffer is long. A corpus of no more blocks than a
buffer takes is one buffer, and so is shuffled uniformly.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gptdist.data.order import EpochOrder
from gptdist.data.permutation import KeyedPermutation


@dataclass(frozen=True)
class Buffer:
    """Samples `first_sample` to `stop_sample` - 1 draw from these windows, [start, stop) each, and from no others."""

    first_sample: int
    stop_sample: int
    window_ranges: tuple[tuple[int, int], ...]


class LocalOrder(EpochOrder):
    """The local shuffle, in blocks of `block_windows` neighbours, of which the last may be short."""

    def __init__(self, seed: int, num_windows: int, block_windows: int, blocks_per_buffer: int) -> None:
        super().__init__(seed, num_windows)
        if block_windows < 1 or blocks_per_buffer < 1:
            raise ValueError(f"{blocks_per_buffer} blocks of {block_windows} windows; both must be at least 1")
        self.block_windows = min(block_windows, num_windows)
        self.num_blocks = -(-num_windows // self.block_windows)
        self.blocks_per_buffer = min(blocks_per_buffer, self.num_blocks)

    def buffer_of(self, sample: int) -> Buffer:
        """The buffer that sample number `sample` is drawn from; the next one begins at its `stop_sample`."""
        epoch, position = divmod(sample, self.num_windows)
        first, stop, ranges = self._epoch(epoch).buffer_at(position)
        begin = epoch * self.num_windows
        return Buffer(begin + first, begin + stop, ranges)

    def _epoch(self, epoch: int) -> "_Epoch":
        return _epoch_of(self.seed, epoch, self.num_windows, self.block_windows, self.blocks_per_buffer)


class _Epoch:
    """One epoch of the order, closed form.

    Blocks stand in slots; a padded place is slot x block_windows + offset, as if the last block were not short. The
    `missing` windows of that block are the only thing that keeps padded places and positions apart.
    """

    def __init__(self, name: str, num_windows: int, block_windows: int, blocks_per_buffer: int) -> None:
        self._name = name
        self._num_windows = num_windows
        self._block = block_windows
        self._num_blocks = -(-num_windows // block_windows)
        self._blocks_per_buffer = blocks_per_buffer
        self._buffer = block_windows * blocks_per_buffer
        self._missing = self._num_blocks * block_windows - num_windows
        self._blocks = KeyedPermutation(f"{name}, blocks", self._num_blocks)
        self._short_slot = self._blocks.position_of(self._num_blocks - 1)
        self._short_buffer = self._short_slot // blocks_per_buffer
        # The first position after the buffer with the short block, and the first padded place after that block.
        self._after_short_buffer = self._start(self._short_buffer + 1)
        self._after_short = (self._short_slot + 1) * block_windows - self._missing

    def at(self, position: int) -> int:
        padded_position = position if position < self._after_short_buffer else position + self._missing
        buffer = padded_position // self._buffer
        start = self._start(buffer)
        place = buffer * self._buffer + self._shuffle(buffer).at(position - start)
        if buffer == self._short_buffer and place >= self._after_short:
            place += self._missing
        slot, offset = divmod(place, self._block)
        return self._blocks.at(slot) * self._block + offset

    def position_of(self, point: int) -> int:
        block, offset = divmod(point, self._block)
        place = self._blocks.position_of(block) * self._block + offset
        buffer = place // self._buffer
        if buffer == self._short_buffer and place >= self._after_short:
            place -= self._missing
        return self._start(buffer) + self._shuffle(buffer).position_of(place - buffer * self._buffer)

    def of(self, positions: np.ndarray) -> np.ndarray:
        padded_positions = np.where(positions < self._after_short_buffer, positions, positions + self._missing)
        buffers = padded_positions // self._buffer
        by_buffer = np.argsort(buffers, kind="stable")
        bounds = np.flatnonzero(np.diff(buffers[by_buffer], prepend=-1, append=-1))
        places = np.empty_like(positions)
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            chosen = by_buffer[begin:end]
            buffer = int(buffers[chosen[0]])
            inner = self._shuffle(buffer).of(positions[chosen] - self._start(buffer)) + buffer * self._buffer
            if buffer == self._short_buffer:
                inner[inner >= self._after_short] += self._missing
            places[chosen] = inner
        slots, offsets = np.divmod(places, self._block)
        return self._blocks.of(slots) * self._block + offsets

    def buffer_at(self, position: int) -> tuple[int, int, tuple[tuple[int, int], ...]]:
        """First and stop position of the buffer of `position`, and the windows of its blocks."""
        padded_position = position if position < self._after_short_buffer else position + self._missing
        buffer = padded_position // self._buffer
        first_slot = buffer * self._blocks_per_buffer
        slots = range(first_slot, min(first_slot + self._blocks_per_buffer, self._num_blocks))
        starts = [self._blocks.at(slot) * self._block for slot in slots]
        ranges = tuple((start, min(start + self._block, self._num_windows)) for start in starts)
        return self._start(buffer), self._start(buffer + 1), ranges

    def _start(self, buffer: int) -> int:
        """First position of a buffer; of the one after the last, the number of windows."""
        slots = min(buffer * self._blocks_per_buffer, self._num_blocks)
        return slots * self._block - (self._missing if buffer > self._short_buffer else 0)

    def _shuffle(self, buffer: int) -> KeyedPermutation:
        return KeyedPermutation(f"{self._name}, buffer {buffer}", self._start(buffer + 1) - self._start(buffer))


@lru_cache(maxsize=256)
def _epoch_of(seed: int, epoch: int, num_windows: int, block_windows: int, blocks_per_buffer: int) -> _Epoch:
    name = f"gptdist local order: seed {seed}, epoch {epoch}"
    return _Epoch(name, num_windows, block_windows, blocks_per_buffer)
