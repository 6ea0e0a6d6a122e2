"""Which window of the corpus sample number i trains on: a pure function of (seed, i), in O(1) time and memory.

Knows integers only: no files, no torch. An epoch is a keyed permutation of the windows, made by a Feistel network on
Z_a x Z_b with a x b just above the number of windows, walking the few surplus points back in (Black & Rogaway 2002,
"Ciphers with arbitrary finite domains"). Each epoch has its own keys. How samples are dealt to data ranks is here too,
and never changes which sample is which.
"""

import hashlib
import math
from functools import lru_cache

import numpy as np

from gptdist.errors import ConfigError

MAX_WINDOWS = 1 << 60

# 8 pass every test on corpora of 1,000 windows and more; very small ones need some more to reach all orders evenly.
_ROUNDS = 12
_MASK = (1 << 64) - 1
# Multipliers and shifts of the splitmix64 finaliser (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
# generators").
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB


class WindowOrder:
    """Sample number -> (epoch, window) for a corpus of `num_windows` windows."""

    def __init__(self, seed: int, num_windows: int) -> None:
        if not 1 <= num_windows <= MAX_WINDOWS:
            raise ValueError(f"num_windows is {num_windows}; an order needs 1 to {MAX_WINDOWS} windows")
        self.seed = seed
        self.num_windows = num_windows
        self._left_size = math.isqrt(num_windows - 1) + 1
        self._right_size = -(-num_windows // self._left_size)

    def window(self, sample: int) -> tuple[int, int]:
        """The epoch and the window of sample number `sample`, counted from 0."""
        if sample < 0:
            raise ValueError(f"sample is {sample}; samples count from 0")
        epoch, position = divmod(sample, self.num_windows)
        keys = _round_keys(self.seed, epoch)
        while True:
            left, right = position % self._left_size, position // self._left_size
            for index, key in enumerate(keys):
                if index % 2:
                    right = (right + _mix(left, key)) % self._right_size
                else:
                    left = (left + _mix(right, key)) % self._left_size
            position = right * self._left_size + left
            if position < self.num_windows:
                return epoch, position

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
            windows[chosen] = self._permute(positions[chosen], _round_keys(self.seed, int(epoch)))
        return windows

    def _permute(self, positions: np.ndarray, keys: tuple[int, ...]) -> np.ndarray:
        result = self._network(positions, keys)
        outside = np.flatnonzero(result >= self.num_windows)
        while outside.size:
            result[outside] = self._network(result[outside], keys)
            outside = outside[result[outside] >= self.num_windows]
        return result

    def _network(self, positions: np.ndarray, keys: tuple[int, ...]) -> np.ndarray:
        left_size, right_size = np.uint64(self._left_size), np.uint64(self._right_size)
        right, left = np.divmod(positions.astype(np.uint64), left_size)
        for index, key in enumerate(keys):
            # Reduced before the sum, which then stays far from 2^64; the scalar path gives the same by wider integers.
            if index % 2:
                right = (right + _mix_array(left, key) % right_size) % right_size
            else:
                left = (left + _mix_array(right, key) % left_size) % left_size
        return (right * left_size + left).astype(np.int64)


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


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    names = (f"gptdist window order: seed {seed}, epoch {epoch}, round {index}" for index in range(_ROUNDS))
    return tuple(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") for name in names)


def _mix(value: int, key: int) -> int:
    value = (value + key) & _MASK
    value = ((value ^ (value >> 30)) * _MULTIPLY_1) & _MASK
    value = ((value ^ (value >> 27)) * _MULTIPLY_2) & _MASK
    return value ^ (value >> 31)


def _mix_array(values: np.ndarray, key: int) -> np.ndarray:
    values = values + np.uint64(key)  # unsigned arrays wrap modulo 2^64, as meant
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_MULTIPLY_1)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_MULTIPLY_2)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
