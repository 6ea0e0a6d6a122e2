"""Whether the checkpoints to come have room on the disk: a warning well before, an error when one does not fit.

Knows sizes and how many checkpoints retention lets be there at once. Must not know ranks or what is written.
"""

from dataclasses import dataclass
from pathlib import Path

from gptdist.checkpoint.folder import free_bytes, step_folders
from gptdist.checkpoint.retention import Retention
from gptdist.errors import StorageError

AHEAD = 3
"""Room for fewer than this many more checkpoints is worth a warning."""


@dataclass(frozen=True)
class Room:
    """What one checkpoint needs, what is free, and how many more have to fit before old ones make room (at most
    AHEAD)."""

    folder: Path
    needed: int
    free: int
    more: int

    @property
    def warning(self) -> str | None:
        """What to tell before it is too late; None where there is no need."""
        if self.free >= self.more * self.needed:
            return None
        fitting = self.free // max(self.needed, 1)
        return (
            f"{self.folder} has room for {fitting} more checkpoint{'' if fitting == 1 else 's'} ({self.free:,} bytes "
            f"are free, one needs {self.needed:,}), and {self.more} more will be there at once. Free some space, lower "
            "checkpoint.keep, or set checkpoint.dir to a larger disk."
        )

    def check(self, what: str) -> None:
        """Raises StorageError where `what` ("step 12") does not fit."""
        if self.free < self.needed:
            raise StorageError(
                f"cannot write {what} to {self.folder}: the disk is full, it has room for {self.free:,} bytes. "
                f"One checkpoint needs {self.needed:,} bytes, {self.free:,} are free. Free some space, lower "
                "checkpoint.keep, or set checkpoint.dir to a larger disk."
            )


def look_for_room(folder: Path, needed: int, retention: Retention) -> Room:
    """What there is for checkpoints of `needed` bytes in `folder`, which need not exist yet. Raises OSError."""
    existing = len(step_folders(folder)) if folder.is_dir() else 0
    return Room(folder, needed, free_bytes(folder), _to_come(existing, retention))


def _to_come(existing: int, retention: Retention) -> int:
    """How many more there will be at once: a new one is there before an old one goes."""
    if retention.keep is None or retention.every:
        return AHEAD
    return min(AHEAD, max(0, retention.keep + retention.best + 2 * bool(retention.behind) - existing) + 1)
