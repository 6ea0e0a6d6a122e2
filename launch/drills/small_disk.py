"""A disk of a few megabytes in memory, to be full or read-only where a real one must not be.

Knows `mount`; needs root. The mount is private to this machine's drill and goes when the drill ends.
"""

import os
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self


def small_disk_problem() -> str | None:
    """Why no such disk can be had here; None where it can."""
    if os.geteuid() != 0:
        return "needs root to mount a small disk"
    return None if shutil.which("mount") else "there is no mount command"


class SmallDisk:
    """A tmpfs of `size` bytes at `path`, while the context lasts."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.filler = path / "filler"
        self._size = size

    def __enter__(self) -> Self:
        self.path.mkdir()
        _run("mount", "-t", "tmpfs", "-o", f"size={self._size},mode=0755", "tmpfs", str(self.path))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _run("umount", "--lazy", str(self.path))

    def leave_free(self, bytes_left: int) -> None:
        """Fill the disk but for so much."""
        size = shutil.disk_usage(self.path).free - bytes_left
        with self.filler.open("wb") as file:
            file.write(b"\0" * max(0, size))

    def empty_again(self) -> None:
        """Take the filler away."""
        self.filler.unlink(missing_ok=True)

    def make_read_only(self) -> None:
        """As a disk does that has found an error on itself."""
        _run("mount", "-o", "remount,ro", str(self.path))

    def make_writable(self) -> None:
        """Mended."""
        _run("mount", "-o", "remount,rw", str(self.path))


def fill(path: Path) -> None:
    """Take all that is left of a small disk with this file."""
    with path.open("wb", buffering=0) as file:
        for block in (1 << 20, 1 << 12):
            with suppress(OSError):
                while file.write(b"\0" * block) == block:
                    pass


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)
