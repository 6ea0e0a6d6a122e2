"""The hidden folder in which a corpus grows: what is finished lies there, whole, and a later build takes it up.

Knows files and locks, not what is in them. Several processes, also of several nodes, may share one folder: every file
appears by a rename.
"""

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gptdist.errors import CorpusError, StorageError, WorkerFailed

CORPUS = "corpus"
_PLAN_FILE = "plan.json"
_FAILED_FILE = "failed.json"
_LOCK_FILE = "building.lock"
_LONGEST_POLL_SECONDS = 2.0


class WorkFolder:
    """`.NAME.building` beside the corpus NAME."""

    def __init__(self, out_dir: Path) -> None:
        self.out_dir = out_dir
        self._target = out_dir.absolute()
        self.path = self._target.parent / f".{self._target.name}.building"
        self.corpus = self.path / CORPUS
        self._made: list[Path] = []

    @contextmanager
    def locked(self, part: int, parts: int) -> Iterator[None]:
        """Make the folder and hold it: alone where there is one part, else together with the other parts."""
        self._made = [parent for parent in self.path.parents if not parent.exists()]
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / _LOCK_FILE).open("ab") as whole:
            self._lock(whole, fcntl.LOCK_EX if parts == 1 else fcntl.LOCK_SH)
            if parts == 1:
                yield
                return
            with (self.path / f"part-{part}.lock").open("ab") as mine:
                self._lock(mine, fcntl.LOCK_EX)
                yield

    def _lock(self, file: Any, kind: int) -> None:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(
                f"Another build of {self.out_dir} is running. Wait for it, or name another --out."
            ) from None

    def take_up(self, plan: dict[str, Any], parts: int) -> bool:
        """Make this the folder of `plan`; True where an earlier build of the same plan had begun.

        What another plan left is cleared away, unless several parts are at work.
        """
        found = self.load(_PLAN_FILE)
        if found is not None and found["fingerprint"] == plan["fingerprint"]:
            (self.path / _FAILED_FILE).unlink(missing_ok=True)
            if parts == 1:
                self._drop_temporaries()
            return True
        if found is not None and parts > 1:
            raise CorpusError(
                f"{self.path} belongs to a build with other sources or options. Remove it, or name another --out."
            )
        if parts == 1:
            self.clear()
        self.corpus.mkdir(exist_ok=True)
        self.save(_PLAN_FILE, plan)
        return False

    def plan(self) -> dict[str, Any]:
        """What `take_up` was given."""
        found = self.load(_PLAN_FILE)
        if found is None:
            raise CorpusError(f"{self.path} has no plan: no build is going on there.")
        return found

    def clear(self) -> None:
        """Remove everything but the lock."""
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            elif entry.suffix != ".lock":
                entry.unlink()

    def discard(self) -> None:
        """Remove the folder, and those above it that were made for it."""
        shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):
            for parent in self._made:
                parent.rmdir()

    def _drop_temporaries(self) -> None:
        """What killed workers left half-written."""
        for folder in (self.path, self.corpus):
            for entry in folder.glob(".tmp-*"):
                entry.unlink(missing_ok=True)

    def save(self, name: str, value: Any) -> None:
        """A JSON file, whole or not at all; for its owner's eyes only, since URLs of sources can hold credentials."""
        write_durably(self.path / name, json.dumps(value).encode(), mode=0o600)

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.path / name).exists()

    def has_plan(self, fingerprint: str) -> bool:
        """Whether the folder is that of the plan with this fingerprint."""
        found = self.load(_PLAN_FILE)
        return found is not None and found["fingerprint"] == fingerprint

    def any_file(self, pattern: str) -> bool:
        """Whether there is a file of such a name."""
        return next(self.path.glob(pattern), None) is not None

    def load(self, name: str) -> Any | None:
        """The value of a JSON file; None where it is not there (yet)."""
        try:
            return json.loads((self.path / name).read_bytes())
        except FileNotFoundError:
            return None

    def wait_for(self, missing: Callable[[], list[str]], what: str, limit_seconds: float) -> None:
        """Wait until other parts have made what is `missing()`; gives up when nothing has come for so long."""
        left, pause, since = missing(), 0.05, time.monotonic()
        while left:
            failed = self.load(_FAILED_FILE)
            if failed is not None:
                raise WorkerFailed(f"Another part of this build failed: {failed['error']}")
            if time.monotonic() - since > limit_seconds:
                raise WorkerFailed(
                    f"Other parts of this build have not finished {what} ({len(left):,} left, such as {left[0]}) and "
                    f"nothing has come for {limit_seconds:.0f} s. See whether they run; start them again with the same "
                    "command: finished work is kept."
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL_SECONDS)
            before, left = len(left), missing()
            if len(left) < before:
                since = time.monotonic()

    def tell_failed(self, error: BaseException) -> None:
        """Let the other parts know that waiting is in vain."""
        self.save(_FAILED_FILE, {"error": str(error)})

    def finish(self) -> None:
        """Give the corpus its name, and let go of everything else."""
        _sync_folder(self.corpus)
        try:
            os.rename(self.corpus, self._target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise CorpusError(f"{self.out_dir} has appeared meanwhile. Remove it and run the same command.") from None
        _sync_folder(self._target.parent)
        shutil.rmtree(self.path, ignore_errors=True)

    def storage_error(self, error: OSError) -> StorageError:
        """`error`, said so that a user knows what to do."""
        try:
            free = f" ({shutil.disk_usage(self._target.parent).free:,} bytes are free)"
        except OSError:
            free = ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "Free some space" if full else "Check the path"
        kept = (
            f" Finished work is kept in {self.path}: the same command goes on from there."
            if (self.path / _PLAN_FILE).exists()
            else ""
        )
        return StorageError(
            f"The corpus could not be written to {self.out_dir}: {error.strerror or error}{free}. {remedy}, or name "
            f"another --out.{kept}"
        )


def temporary_path(path: Path) -> Path:
    """A name beside `path` for what is not finished: this process's own, among all nodes that share the folder."""
    return path.with_name(f".tmp-{socket.gethostname()}-{os.getpid()}-{path.name}")


def write_durably(path: Path, content: bytes, mode: int = 0o666) -> None:
    """A file, whole or not at all, on the disk when this returns."""
    temporary = temporary_path(path)
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
