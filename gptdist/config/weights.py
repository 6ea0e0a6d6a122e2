"""Weights of a blend, as people write them, in whole numbers: 0.7 and 0.3 are 7 and 3.

Pure: exact decimals in, whole numbers out; knows no corpus.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

LARGEST_PERIOD = 65_536
"""The turns of a blend repeat after the sum of its whole weights; they are tabulated, so it is bounded."""

_ROUND_PERIOD = 10_000


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in exactly the proportions of the decimals given."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    divisor = math.gcd(*whole)
    return tuple(weight // divisor for weight in whole)


def rounded_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Whole numbers near the proportions given, each at least 1, for a blend whose period is too long."""
    total = sum(Fraction(str(weight)) for weight in weights)
    rounded = [max(1, round(Fraction(str(weight)) / total * _ROUND_PERIOD)) for weight in weights]
    divisor = math.gcd(*rounded)
    return tuple(weight // divisor for weight in rounded)
