"""A folder that a command makes: whole under its name, or not there at all.

Knows the file system alone.
"""

import secrets
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from gptdist.checkpoint.folder import commit, free_bytes
from gptdist.errors import ExchangeError, StorageError


def check_free(out: Path) -> None:
    """Raises ExchangeError unless `out` can become a new folder."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise ExchangeError(f"{out} exists and is not an empty folder; nothing is ever replaced. Name another --out.")


def check_room(out: Path, needed: int) -> None:
    """Raises StorageError where `needed` bytes do not fit."""
    free = free_bytes(out.absolute().parent)
    if free < needed:
        raise StorageError(
            f"{out} needs {needed:,} bytes, and {free:,} are free on its disk. Free some space, or name another --out."
        )


@contextmanager
def term_cleans_up() -> Iterator[None]:
    """TERM, which by itself ends a process where it stands, leaves through `finally` within the block: exit 143."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A neighbour of `out` that gets its name when all has gone well, and is removed otherwise.

    Raises StorageError for what the disk refuses.
    """
    out = out.absolute()
    temporary = out.with_name(f".tmp-{out.name}-{secrets.token_hex(4)}")
    with term_cleans_up():
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            yield temporary
            if out.is_dir():
                out.rmdir()  # fails unless it is empty, as it was
            commit(temporary, out)
        except OSError as error:
            raise StorageError(
                f"cannot write {out}: {error.strerror or error}. Name another --out, on a disk with room."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
