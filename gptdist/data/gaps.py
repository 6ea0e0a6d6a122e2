"""Sample numbers that a run passes over: from how many samples were trained on to which one is next, and back.

Pure integers. The order of samples (`order.py`, `blend.py`) knows nothing of it: its numbers keep their meaning, and a
run takes them one after the other but for these ranges.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Gaps:
    """Ranges [first, stop) of sample numbers, in order, none touching the next. Make them with `Gaps.of`."""

    ranges: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ranges: Iterable[tuple[int, int]]) -> "Gaps":
        """From any ranges: those that overlap or touch are one."""
        merged: list[tuple[int, int]] = []
        for first, stop in sorted(ranges):
            if not 0 <= first < stop:
                raise ValueError(f"a gap from sample {first} to {stop} is none")
            if merged and first <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            else:
                merged.append((first, stop))
        return cls(tuple(merged))

    def numbers(self, counts: np.ndarray) -> np.ndarray:
        """The sample number that is trained on after `counts` others: int64, of the same shape."""
        if not self.ranges:
            return counts
        firsts, _, before = self._arrays
        # In counts, a gap is where its first number would have been: behind the samples before it.
        return counts + before[np.searchsorted(firsts - before[:-1], counts, side="right")]

    def number(self, count: int) -> int:
        """The sample number that is trained on after `count` others."""
        return int(self.numbers(np.asarray([count], dtype=np.int64))[0])

    def stop(self, count: int) -> int:
        """The sample number behind the last of the first `count` trained on; 0 before the first."""
        return self.number(count - 1) + 1 if count else 0

    def count(self, number: int) -> int | None:
        """How many samples are trained on before sample `number`; None where it is passed over."""
        if not self.ranges:
            return number
        firsts, stops, before = self._arrays
        behind = int(np.searchsorted(firsts, number, side="right"))
        if behind and number < stops[behind - 1]:
            return None
        return number - int(before[behind])

    def settled(self, count: int) -> int:
        """The first sample number that is neither trained on, `count` others being, nor known to be passed over."""
        return max(self.number(count), self.ranges[-1][1] if self.ranges else 0)

    @property
    def total(self) -> int:
        """How many samples are passed over."""
        return sum(stop - first for first, stop in self.ranges)

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First and stop of each gap, and how many samples all gaps before it have (of one more: all of them)."""
        firsts, stops = (np.asarray(side, dtype=np.int64) for side in zip(*self.ranges, strict=True))
        return firsts, stops, np.concatenate([[0], np.cumsum(stops - firsts)])
