"""What a rule is, and words that rules share. Pure: knows values, no file and no process."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from gptdist.config.sections import RunConfig


@dataclass(frozen=True)
class Broken:
    """A broken rule: what to tell, and the settings it is about (for their file and line)."""

    text: str
    keys: tuple[str, ...]


Rule = Callable[[RunConfig, int], Iterator[Broken]]


def nearest(value: int, unit: int) -> str:
    """The multiples of `unit` either side of `value`, for a sentence."""
    lower = value // unit * unit
    return f"{lower} or {lower + unit}" if lower else f"{unit}"


def divisors(value: int) -> str:
    """Those of `value` up to 256, for a sentence."""
    found = [candidate for candidate in range(1, min(value, 256) + 1) if value % candidate == 0]
    return str(found[0]) if len(found) == 1 else f"{', '.join(map(str, found[:-1]))} or {found[-1]}"


def nearest_divisor(value: int, near: int) -> int:
    """The divisor of `value` closest to `near`; the smaller of two."""
    small = [candidate for candidate in range(1, math.isqrt(value) + 1) if value % candidate == 0]
    return min(small + [value // divisor for divisor in small], key=lambda divisor: (abs(divisor - near), divisor))
