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
from typing import IO, Any

from gptdist.durable import sync_folder, write_durably
from gptdist.errors import CorpusError, StorageError, WorkerFailed

CORPUS = "corpus"
_PLAN_FILE = "plan.json"
_LOCK_FILE = "building.lock"
_LONGEST_POLL_SECONDS = 2.0
# Of file systems that have no locks, such as some mounts of Lustre.
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


class WorkFolder:
    """`.NAME.building` beside the corpus NAME."""

    def __init__(self, out_dir: Path) -> None:
        self.out_dir = out_dir
        self.target = Path(os.path.realpath(out_dir))  # a rename would replace a link, not go through it
        self.path = self.target.parent / f".{self.target.name}.building"
        self.corpus = self.path / CORPUS
        self._made: list[Path] = []
        self._old_failures: dict[str, int] = {}

    @contextmanager
    def locked(self, part: int, parts: int) -> Iterator[None]:
        """Make the folder and hold it: alone where there is one part, else together with the other parts."""
        self._made = [parent for parent in self.path.parents if not parent.exists()]
        try:
            with self._locked_file(_LOCK_FILE, fcntl.LOCK_EX if parts == 1 else fcntl.LOCK_SH):
                if parts == 1:
                    yield
                    return
                with self._locked_file(f"part-{part}.lock", fcntl.LOCK_EX):
                    (self.path / _failed_file(part)).unlink(missing_ok=True)
                    self._old_failures = self._failures()
                    yield
        finally:
            with suppress(OSError):  # NFS keeps the folder of a removed file until the file is closed
                self.path.rmdir()

    def _locked_file(self, name: str, kind: int) -> IO[bytes]:
        """A file of the folder, locked until it is closed."""
        path = self.path / name
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # a build that ends takes folder and locks with it
                # Readable too: NFS makes a lock one of bytes, and a shared one of these is for readers.
                file = path.open("a+b")
                try:
                    self._lock(file, kind)
                    if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                        return file
                except BaseException:
                    file.close()
                    raise
                file.close()

    def _lock(self, file: IO[bytes], kind: int) -> None:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CorpusError(
                f"Another build of {self.out_dir} is running. Wait for it, or name another --out."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise

    def take_up(self, plan: dict[str, Any], parts: int) -> bool:
        """Make this the folder of `plan`; True where an earlier build of the same plan had begun.

        What another plan left is cleared away, unless several parts are at work.
        """
        found = self.load(_PLAN_FILE)
        if found is not None and found["fingerprint"] == plan["fingerprint"]:
            if parts == 1:
                _drop_temporaries(self.path)
                _drop_temporaries(self.corpus)
            return True
        if found is not None and parts > 1:
            raise self._other_plan()
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
        """Remove the folder, and those above it that were made for it. The lock goes last: until then nobody enters."""
        with suppress(OSError):
            self.clear()
            for lock in sorted(self.path.glob("*.lock"), key=lambda path: path.name == _LOCK_FILE):
                lock.unlink()
            self.path.rmdir()
            for parent in self._made:
                parent.rmdir()

    def discard_leftovers(self) -> None:
        """Remove what a build left that was killed when its corpus had its name already; unless somebody is at it."""
        if self.path.exists():
            with suppress(OSError, CorpusError), self.locked(0, 1):
                self.discard()

    def save(self, name: str, value: Any) -> None:
        """A JSON file, whole or not at all; for its owner's eyes only, since URLs of sources can hold credentials."""
        path = self.path / name
        write_durably(path, json.dumps(value).encode(), 0o600, temporary_path(path))

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.path / name).exists()

    def has_plan(self, fingerprint: str) -> bool:
        """Whether the plan is there. Raises CorpusError where that has another fingerprint."""
        found = self.load(_PLAN_FILE)
        if found is not None and found["fingerprint"] != fingerprint:
            raise self._other_plan()
        return found is not None

    def _other_plan(self) -> CorpusError:
        return CorpusError(
            f"{self.path} belongs to a build with other sources or options, or of sources that have changed since. "
            "Start all parts with the same command; or remove it, or name another --out."
        )

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
            for name, when in self._failures().items():
                failed = self.load(name) if self._old_failures.get(name) != when else None
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

    def tell_failed(self, part: int, error: BaseException) -> None:
        """Let the other parts know that waiting is in vain, until this one is started again."""
        with suppress(OSError):  # such as the very error, of a full disk
            self.save(_failed_file(part), {"error": str(error) or type(error).__name__})

    def _failures(self) -> dict[str, int]:
        """What parts said that failed, and when. What was there before this one began is of an earlier attempt."""
        found = {}
        for path in self.path.glob(_failed_file("*")):
            with suppress(FileNotFoundError):  # started again just now
                found[path.name] = path.stat().st_mtime_ns
        return found

    def finish(self) -> None:
        """Give the corpus its name, and let go of everything else."""
        _drop_temporaries(self.corpus)
        sync_folder(self.corpus)
        try:
            os.rename(self.corpus, self.target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            raise CorpusError(f"{self.out_dir} has appeared meanwhile. Remove it and run the same command.") from None
        sync_folder(self.target.parent)
        self.discard()

    def storage_error(self, error: OSError) -> StorageError:
        """`error`, said so that a user knows what to do."""
        try:
            free = f" ({shutil.disk_usage(self.target.parent).free:,} bytes are free)"
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


def _failed_file(part: int | str) -> str:
    return f"failed-{part}.json"


def _drop_temporaries(folder: Path) -> None:
    """What killed workers left half-written."""
    for entry in folder.glob(".tmp-*"):
        entry.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """A name beside `path` for what is not finished: this process's own, among all nodes that share the folder."""
    return path.with_name(f".tmp-{socket.gethostname()}-{os.getpid()}-{path.name}")
