"""What is different between two checkpoints: which logical tensors, by how much, and what of the run's state.

Equal digests say equal without reading; only tensors that differ are read, a few megabytes of each at a time. Layouts
need not be the same. Must not know torch.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptdist.checkpoint.fragment import as_float64, numpy_dtype
from gptdist.checkpoint.logical import Box, cut_in_order
from gptdist.checkpoint.manifest import TensorEntry
from gptdist.checkpoint.read import Checkpoint

_PART_BYTES = 4 << 20
_ABSENT = "absent"
# Run state that says how and with what a run was made, not where it is.
DESCRIPTIONS = ("config", "layout", "versions")


@dataclass(frozen=True)
class TensorDifference:
    """`problem`: why there is no number (absent in one, another shape), else None. Differences are of one - other:
    the largest of an element, and the Euclidean norm relative to that of `one`. `elements` differ in their bits."""

    name: str
    problem: str | None
    elements: int = 0
    size: int = 0
    largest: float = 0.0
    relative: float = 0.0


@dataclass(frozen=True)
class StateDifference:
    """A value of the run's state that is not the same, by its path, such as `data.seed`."""

    path: str
    one: str
    other: str

    @property
    def is_description(self) -> bool:
        return self.path.partition(".")[0] in DESCRIPTIONS


@dataclass(frozen=True)
class Comparison:
    """`equal` tensors are the same to the bit."""

    equal: int
    tensors: list[TensorDifference]
    state: list[StateDifference]

    @property
    def same(self) -> bool:
        """All tensors to the bit, and all state but what only describes how the run was made."""
        return not self.tensors and all(difference.is_description for difference in self.state)


def compare(one: Checkpoint, other: Checkpoint) -> Comparison:
    """All differences, by name. Raises CheckpointError where a file contradicts its manifest."""
    left, right = one.manifest.tensors, other.manifest.tensors
    names = sorted(left.keys() | right.keys())
    different = [name for name in names if not _same(left.get(name), right.get(name))]
    state = _state_differences("", {"step": one.step, **one.state}, {"step": other.step, **other.state})
    return Comparison(len(names) - len(different), [_tensor_difference(one, other, name) for name in different], state)


def _same(left: TensorEntry | None, right: TensorEntry | None) -> bool:
    return left is not None and right is not None and _identity(left) == _identity(right)


def _identity(entry: TensorEntry) -> tuple[object, ...]:
    return entry.dtype, entry.shape, entry.digest


def _tensor_difference(one: Checkpoint, other: Checkpoint, name: str) -> TensorDifference:
    left, right = one.manifest.tensors.get(name), other.manifest.tensors.get(name)
    if left is None or right is None:
        return TensorDifference(name, "only in the first" if right is None else "only in the second")
    if left.shape != right.shape:
        return TensorDifference(name, f"shape {list(left.shape)}, not {list(right.shape)}")
    differing, largest, squares, reference = 0, 0.0, 0.0, 0.0
    whole = Box.whole(left.shape)
    for box in cut_in_order(whole, _PART_BYTES // numpy_dtype(left.dtype).itemsize):
        a, b = one.read(name, box), other.read(name, box)
        x, y = as_float64(a, left.dtype), as_float64(b, right.dtype)
        if left.dtype == right.dtype:
            unsigned = f"u{a.dtype.itemsize}"
            differs = a.view(unsigned) != b.view(unsigned)
        else:
            differs = x != y
        with np.errstate(invalid="ignore", over="ignore"):
            apart = np.abs(x - y)[differs]
            differing += apart.size
            # Where an infinity or no number is on one side only, the difference is as large as can be.
            apart = np.where(np.isnan(apart), np.inf, apart)
            largest = max(largest, float(apart.max(initial=0.0)))
            squares += float(np.square(apart).sum())
            reference += float(np.square(x[np.isfinite(x)]).sum())
    if not differing and left.dtype != right.dtype:
        return TensorDifference(name, f"the same numbers, but {left.dtype}, not {right.dtype}")
    relative = math.sqrt(squares / reference) if reference else (math.inf if squares else 0.0)
    return TensorDifference(name, None, differing, whole.size, largest, relative)


def _state_differences(path: str, one: Any, other: Any) -> list[StateDifference]:
    if _render(one) == _render(other):
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            difference
            for key in sorted(one.keys() | other.keys())
            for difference in _state_differences(
                f"{path}.{key}" if path else key, one.get(key, _Absent), other.get(key, _Absent)
            )
        ]
    return [StateDifference(path, _render(one), _render(other))]


class _Absent:
    """Stands for a key that is not there; None is a value."""


def _render(value: Any) -> str:
    return _ABSENT if value is _Absent else json.dumps(value, sort_keys=True)
