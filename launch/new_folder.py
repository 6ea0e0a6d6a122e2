"""A folder that a command makes: whole under its name, or not there at all.

Knows the file system alone.
"""

import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
def new_folder(out: Path) -> Iterator[Path]:
    """A neighbour of `out` that gets its name when all has gone well, and is removed otherwise.

    Raises StorageError for what the disk refuses.
    """
    out = out.absolute()
    temporary = out.with_name(f".tmp-{out.name}-{secrets.token_hex(4)}")
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
