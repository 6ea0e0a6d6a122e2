"""A permutation of 0 .. size - 1 drawn by a name, and its inverse, each point in O(1) time and memory.

Knows integers and a name only. A Feistel network on Z_a x Z_b with a x b just above the size, walking the few surplus
points back in (Black & Rogaway 2002, "Ciphers with arbitrary finite domains"). Its values are for ever: runs in
progress depend on them.
"""

import hashlib
import math
from functools import lru_cache

import numpy as np

MAX_SIZE = 1 << 60

# 8 pass every test on 1,000 points and more; very small permutations need some more to reach all orders evenly.
_ROUNDS = 12
_MASK = (1 << 64) - 1
# Multipliers and shifts of the splitmix64 finaliser (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
# generators").
_MULTIPLY_1 = 0xBF58476D1CE4E5B9
_MULTIPLY_2 = 0x94D049BB133111EB


class KeyedPermutation:
    """The permutation of `size` points that `name` draws."""

    def __init__(self, name: str, size: int) -> None:
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"a permutation of {size} points; it can have 1 to {MAX_SIZE}")
        self.size = size
        self._keys = _round_keys(name)
        self._left_size = math.isqrt(size - 1) + 1
        self._right_size = -(-size // self._left_size)

    def at(self, position: int) -> int:
        """The point at `position`."""
        while True:
            right, left = divmod(position, self._left_size)
            for index, key in enumerate(self._keys):
                if index % 2:
                    right = (right + _mix(left, key)) % self._right_size
                else:
                    left = (left + _mix(right, key)) % self._left_size
            position = right * self._left_size + left
            if position < self.size:
                return position

    def position_of(self, point: int) -> int:
        """The position at which `point` stands: the inverse of `at`."""
        while True:
            right, left = divmod(point, self._left_size)
            for index in reversed(range(_ROUNDS)):
                if index % 2:
                    right = (right - _mix(left, self._keys[index])) % self._right_size
                else:
                    left = (left - _mix(right, self._keys[index])) % self._left_size
            point = right * self._left_size + left
            if point < self.size:
                return point

    def of(self, positions: np.ndarray) -> np.ndarray:
        """The points at many positions: int64, one-dimensional like `positions`."""
        result = self._network(positions)
        outside = np.flatnonzero(result >= self.size)
        while outside.size:
            result[outside] = self._network(result[outside])
            outside = outside[result[outside] >= self.size]
        return result

    def _network(self, positions: np.ndarray) -> np.ndarray:
        left_size, right_size = np.uint64(self._left_size), np.uint64(self._right_size)
        right, left = np.divmod(positions.astype(np.uint64), left_size)
        for index, key in enumerate(self._keys):
            # Reduced before the sum, which then stays far from 2^64; the scalar path gives the same by wider integers.
            if index % 2:
                right = (right + _mix_array(left, key) % right_size) % right_size
            else:
                left = (left + _mix_array(right, key) % left_size) % left_size
        return (right * left_size + left).astype(np.int64)


@lru_cache(maxsize=1024)
def _round_keys(name: str) -> tuple[int, ...]:
    names = (f"{name}, round {index}" for index in range(_ROUNDS))
    return tuple(int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little") for word in names)


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
