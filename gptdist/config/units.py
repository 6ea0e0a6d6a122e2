"""Times, sizes and intervals as people write them in a config: "10m", "500ms", "5GB", 500 or "auto".

Pure text to number; knows nothing of sections or files.
"""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

SECONDS_PER_UNIT = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
BYTES_PER_UNIT = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}

_QUANTITY = re.compile(r"\s*(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>[A-Za-z]*)\s*")


def parse_duration(value: Any) -> float:
    """Seconds in "10m", "90s", "2h", "500ms" or a number of seconds. Raises ValueError with the rule."""
    rule = 'must be a time such as 90, "90s", "10m", "2h" or "500ms" (units: ms, s, m, h, d)'
    if isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        seconds = _scaled(value, SECONDS_PER_UNIT, rule)
    if not math.isfinite(seconds) or seconds <= 0:
        raise ValueError(f"{rule}, more than 0")
    return seconds


def parse_bytes(value: Any) -> int:
    """Bytes in "5GB" (10**9), "5GiB" (2**30) or a whole number of bytes. Raises ValueError with the rule."""
    rule = f'must be a size such as 4096, "5GB" or "512MiB" (units: {", ".join(BYTES_PER_UNIT)})'
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"{rule}, at least 0")
        return value
    return round(_scaled(value, BYTES_PER_UNIT, rule))


def parse_save_interval(value: Any) -> Any:
    """A whole number of steps, or "auto". Raises ValueError with the rule."""
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError('must be a whole number of steps, at least 0, or "auto"')


def _scaled(value: Any, units: Mapping[str, float], rule: str) -> float:
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None or match["unit"] not in units:
        raise ValueError(rule)
    return float(match["number"]) * units[match["unit"]]


Duration = Annotated[float, BeforeValidator(parse_duration), Field(gt=0)]
"""Seconds; a config may say "10m"."""

ByteSize = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
"""Bytes; a config may say "5GB"."""

SaveInterval = Annotated[int | Literal["auto"], BeforeValidator(parse_save_interval)]
"""Steps, or "auto"."""
