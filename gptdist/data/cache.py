"""A bounded folder on a node's own disk that the node's processes share: files named by the sha256 of their content.

Knows names, sizes and locks; does not know where content comes from. All locks are `flock`s, so that a killed process
leaves none behind:
  SHA256        a complete file; whoever needs it holds a shared lock on it, and only an unlocked one is evicted
  SHA256.part   a file that is being filled, under an exclusive lock; unlocked it is the remains of a killed process
  cache.lock    held while room is made
  waiting.lock  held by whoever finds no room: the others let go of what they only fetched ahead
"""

import errno
import fcntl
import os
import re
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gptdist.errors import StorageError

_NAME = re.compile(r"[0-9a-f]{64}(\.part)?")


@dataclass(frozen=True)
class _Entry:
    path: Path
    bytes: int
    last_used: int
    partial: bool


class Lease:
    """A complete file that cannot be evicted until `release`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    def release(self) -> None:
        """Let go; the file counts as used now."""
        now = time.time_ns()  # the system's own stamps are too coarse to keep the order of a moment's releases
        with suppress(OSError):
            os.utime(self._descriptor, ns=(now, now))
        os.close(self._descriptor)


class Filling:
    """A `.part` file under this process's exclusive lock. `commit` gives it its name; `drop` removes it."""

    def __init__(self, path: Path, final: Path, descriptor: int) -> None:
        self.descriptor = descriptor
        self._path = path
        self._final = final

    def commit(self) -> Lease:
        """The file is complete: name it, and keep it leased."""
        # A file with its name and without its content must not survive a power cut.
        try:
            os.fdatasync(self.descriptor)
            os.rename(self._path, self._final)
            fcntl.flock(self.descriptor, fcntl.LOCK_SH)
        except OSError as error:
            raise _unusable(self._path.parent, error) from None
        return Lease(self._final, self.descriptor)

    def drop(self) -> None:
        with suppress(OSError):
            self._path.unlink()
        os.close(self.descriptor)


class NodeCache:
    """At most `size` bytes of files in `folder`; None: a folder of this user in the temporary folder.

    Raises StorageError where the folder cannot be used or could be written by others.
    """

    def __init__(self, folder: Path | str | None, size: int) -> None:
        self.folder = Path(folder).expanduser() if folder else default_folder()
        self.size = size
        _check_folder(self.folder)
        with self._room_locked():
            self._make_room(0)  # what a killed process, or a larger cache_size, left behind

    def lease(self, sha256: str, size: int) -> Lease | None:
        """The complete file, if it is here."""
        path = self.folder / sha256
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _unusable(self.folder, error) from None
        self._flock(descriptor, fcntl.LOCK_SH)  # exclusive locks on complete files are held for moments only
        status = os.fstat(descriptor)
        if status.st_nlink and status.st_size == size:
            return Lease(path, descriptor)
        if status.st_nlink:  # changed by someone else
            with suppress(FileNotFoundError):
                path.unlink()
        os.close(descriptor)
        return None

    def start(self, sha256: str) -> Filling | None:
        """Begin to fill a file; None where another is at it, or has just finished."""
        final = self.folder / sha256
        path = self.folder / f"{sha256}.part"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(self.folder, error) from None
        filling = Filling(path, final, descriptor)
        try:
            self._flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if not os.fstat(descriptor).st_nlink or not _same_file(path, descriptor):
            os.close(descriptor)  # it was finished or dropped between the opening and the lock
            return None
        if final.exists():
            filling.drop()
            return None
        os.ftruncate(descriptor, 0)
        return filling

    def reserve(self, filling: Filling, size: int) -> bool:
        """Take `size` bytes for a file, evicting what was used least recently; False where the rest is leased.

        Raises StorageError where the disk itself has no room, whatever is evicted.
        """
        with self._room_locked():
            if not self._make_room(size):
                return False
            while size:
                try:
                    os.posix_fallocate(filling.descriptor, 0, size)
                    break
                except OSError as error:
                    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                    if not full or not any(self._evict(entry) for entry in self._entries()):
                        raise _unusable(self.folder, error, f" ({size:,} bytes were needed)") from None
            return True

    def discard(self, sha256: str) -> None:
        """Remove a file whose content turned out to be damaged; who has it mapped keeps it."""
        with suppress(FileNotFoundError):
            (self.folder / sha256).unlink()

    def used_bytes(self) -> int:
        """Room taken, files that are being filled included."""
        return sum(entry.bytes for entry in self._entries())

    @contextmanager
    def waiting(self) -> Iterator[Callable[[], None]]:
        """Yields `ask`, to be called again and again: from then on `room_is_wanted` is true in every process.

        Who asks holds an exclusive lock, who looks takes a shared one: lookers do not take each other for askers.
        """
        descriptor = self._open_lock("waiting.lock")

        def ask() -> None:
            with suppress(BlockingIOError):  # another asks already
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

        try:
            yield ask
        finally:
            os.close(descriptor)

    def room_is_wanted(self) -> bool:
        descriptor = self._open_lock("waiting.lock")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(descriptor)

    def _make_room(self, wanted: int) -> bool:
        entries = self._entries()
        used = sum(entry.bytes for entry in entries)
        for entry in entries:
            if entry.partial or used + wanted > self.size:
                used -= entry.bytes if self._evict(entry) else 0
        return used + wanted <= self.size

    def _entries(self) -> list[_Entry]:
        """Least recently used first, remains of killed processes before all."""
        entries = []
        with os.scandir(self.folder) as found:
            for item in found:
                if _NAME.fullmatch(item.name):
                    with suppress(FileNotFoundError):
                        status = item.stat(follow_symlinks=False)
                        partial = item.name.endswith(".part")
                        entries.append(_Entry(Path(item.path), status.st_size, status.st_mtime_ns, partial))
        return sorted(entries, key=lambda entry: (not entry.partial, entry.last_used))

    def _evict(self, entry: _Entry) -> bool:
        try:
            descriptor = os.open(entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return False
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _same_file(entry.path, descriptor):
                return False
            entry.path.unlink()
            return True
        except OSError:  # leased, or being filled
            return False
        finally:
            os.close(descriptor)

    @contextmanager
    def _room_locked(self) -> Iterator[None]:
        descriptor = self._open_lock("cache.lock")
        self._flock(descriptor, fcntl.LOCK_EX)
        try:
            yield
        finally:
            os.close(descriptor)

    def _flock(self, descriptor: int, how: int) -> None:
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError:
            raise
        except OSError as error:  # a file system without locks
            os.close(descriptor)
            raise _unusable(self.folder, error) from None

    def _open_lock(self, name: str) -> int:
        try:
            return os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise _unusable(self.folder, error) from None


def default_folder() -> Path:
    """This user's cache in the node's temporary folder."""
    return Path(tempfile.gettempdir()) / f"gptdist-cache-{os.getuid()}"


def _check_folder(folder: Path) -> None:
    """Others must not be able to put files there: the names of complete ones are believed."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat() if folder != default_folder() else folder.lstat()
    except OSError as error:
        raise _unusable(folder, error) from None
    remedy = "Set data.cache_dir to a folder of your own."
    mode = status.st_mode & 0o7777
    if not stat.S_ISDIR(status.st_mode):
        raise StorageError(f"The cache {folder} is not a folder. {remedy}")
    if status.st_uid != os.getuid():
        raise StorageError(f"The cache {folder} belongs to user {status.st_uid}, not to you ({os.getuid()}). {remedy}")
    if status.st_mode & stat.S_IWOTH:
        raise StorageError(f"The cache {folder} can be written by everyone (mode {mode:o}). {remedy}")


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _unusable(folder: Path, error: OSError, more: str = "") -> StorageError:
    return StorageError(
        f"The cache {folder} cannot be used: {error.strerror}{more}. Make room there, or set data.cache_dir to a "
        "folder that can be written, on a disk with room for data.cache_size."
    )
