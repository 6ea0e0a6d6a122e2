"""A digest of a logical tensor that is the same however the tensor is cut into boxes, and whoever computes which part.

A sum over elements, so that parts add up in any order; knows arrays and boxes, no files, no torch. The tensor is seen
as rows of its last dimension. The element of row r and column c with bit pattern v (unsigned, as wide as the dtype)
adds v * A[r] * B[c] modulo 2^64; A and B are odd, so one flipped bit always shows. It tells states apart and finds
damage; against somebody who wants to deceive there is the sha256 of every file.
"""

from collections.abc import Iterable
from functools import lru_cache
from math import prod

import numpy as np
from numpy.typing import NDArray

from gptdist.checkpoint.logical import Box, Shape

Words = NDArray[np.uint64]

_MODULUS = 1 << 64
_COLUMNS = 1 << 16  # at a time
_ROW_STREAM = 0
_COLUMN_STREAM = 1 << 63  # so that no row and no column share an index


def partial_digest(array: np.ndarray, box: Box, shape: Shape) -> int:
    """What `array`, the `box` of a tensor of `shape`, adds to its digest. Any strides will do."""
    if array.shape != box.shape:
        raise ValueError(f"array of shape {array.shape} is not the box of shape {box.shape}")
    if not box.size:
        return 0
    width = box.shape[-1] if shape else 1
    first = box.start[-1] if shape else 0
    bits = array.view(f"u{array.dtype.itemsize}").reshape(-1, width)
    sums: Words = np.zeros(len(bits), dtype=np.uint64)
    for low in range(0, width, _COLUMNS):
        high = min(low + _COLUMNS, width)
        weights = _columns(first + low, first + high)
        # einsum widens a few thousand elements at a time, in cache, and lets other threads run meanwhile.
        sums += np.einsum("rc,c->r", bits[:, low:high], weights)
    return int(np.einsum("r,r->", sums, _weights(_row_numbers(box, shape), _ROW_STREAM)))


def add_digests(parts: Iterable[int]) -> int:
    """The digest of parts that were each digested alone."""
    return sum(parts) % _MODULUS


def render_digest(digest: int) -> str:
    """16 hexadecimal digits."""
    return f"{digest:016x}"


def _row_numbers(box: Box, shape: Shape) -> Words:
    """Which rows of the whole tensor those of the box are, in row-major order."""
    numbers: Words = np.zeros(1, dtype=np.uint64)
    for low, high, extent in zip(box.start[:-1], box.stop[:-1], shape[:-1], strict=True):
        inner: Words = np.arange(low, high, dtype=np.uint64)
        numbers = (numbers[:, None] * np.uint64(extent) + inner).reshape(-1)
    assert len(numbers) == prod(box.shape[:-1])
    return numbers


@lru_cache(maxsize=64)  # at most 32 MB
def _columns(first: int, after: int) -> Words:
    return _weights(np.arange(first, after, dtype=np.uint64), _COLUMN_STREAM)


def _weights(numbers: Words, stream: int) -> Words:
    """Odd 64-bit words from numbers: the output function of splitmix64 (Steele, Lea, Flood: "Fast splittable
    pseudorandom number generators", OOPSLA 2014) at the state of its (number + 1)-th step."""
    mixed = (numbers + np.uint64(stream + 1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed ^ (mixed >> np.uint64(31))) | np.uint64(1)
