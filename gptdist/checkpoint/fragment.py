"""A part of a logical tensor, as it lies in memory on its way to or from a file, and the element types there are.

Knows numpy and boxes; no torch, no files. numpy has no bfloat16: its elements are uint16 arrays, said to be bfloat16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gptdist.checkpoint.logical import Box, Shape, render_box

# torch's name -> safetensors' name (its README, "Format").
DTYPES = {
    "float64": "F64",
    "int64": "I64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_STORED_AS = {"bfloat16": "uint16"}


def numpy_dtype(dtype: str) -> np.dtype:
    """What an array of these elements is in numpy: of the same bits. Raises ValueError for a name not in DTYPES."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    return np.dtype(_STORED_AS.get(dtype, dtype))


@dataclass(frozen=True)
class FragmentPlace:
    """`box` of the logical tensor `name`, whose whole shape is `shape`."""

    name: str
    shape: Shape
    box: Box
    dtype: str

    @cached_property
    def key(self) -> str:
        """Its name inside a file: the logical name, with the box where that is not the whole."""
        return self.name if self.box == Box.whole(self.shape) else self.name + render_box(self.box)

    @property
    def bytes(self) -> int:
        return self.box.size * numpy_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class HostFragment(FragmentPlace):
    """A fragment with its elements; any strides will do."""

    data: np.ndarray


def check_fragments(fragments: Sequence[HostFragment]) -> None:
    """Raises ValueError for fragments that contradict themselves: a mistake in the calling code, not the user's."""
    keys = set()
    for fragment in fragments:
        if fragment.data.shape != fragment.box.shape or not Box.whole(fragment.shape).contains(fragment.box):
            raise ValueError(
                f"fragment {fragment.key} of a tensor of shape {fragment.shape} has data of shape {fragment.data.shape}"
            )
        if fragment.dtype not in DTYPES:
            raise ValueError(f"fragment {fragment.key} has dtype {fragment.dtype}; can store {', '.join(DTYPES)}")
        if fragment.data.dtype != numpy_dtype(fragment.dtype):
            raise ValueError(f"fragment {fragment.key} is said to be {fragment.dtype}, but is {fragment.data.dtype}")
        if fragment.name == "__metadata__":
            raise ValueError("a tensor cannot be named __metadata__: safetensors keeps that name for itself")
        if fragment.key in keys:
            raise ValueError(f"fragment {fragment.key} is given twice")
        keys.add(fragment.key)


def as_float64(data: np.ndarray, dtype: str) -> np.ndarray:
    """The numbers, in double precision; exact but for integers beyond 2^53."""
    if dtype == "bfloat16":
        data = (data.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return data.astype(np.float64)


def from_float64(values: np.ndarray, dtype: str) -> np.ndarray:
    """The nearest elements of a floating-point dtype (ties to even; bfloat16 by way of float32)."""
    if dtype != "bfloat16":
        return values.astype(numpy_dtype(dtype))
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(single), np.uint32(0x7FC0), rounded).astype(np.uint16)
