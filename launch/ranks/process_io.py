"""How much a process has read and written, as Linux counts it."""

from contextlib import suppress
from pathlib import Path

_COUNTED = ("rchar", "wchar", "read_bytes", "write_bytes")
"""By calls, and of storage: what is read through a memory map is only in the latter."""


def bytes_moved(pid: int) -> int | None:
    """Since it began, some of them twice: only to see that it goes on. None where that is not to be had."""
    with suppress(OSError, ValueError):
        pairs = (line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        return sum(int(value) for name, value in pairs if name in _COUNTED)
    return None
