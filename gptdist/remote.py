"""A folder behind an fsspec URL: files read, downloaded, uploaded and listed, with retries and checks on the way.

The only importer of fsspec in `gptdist`. Knows which failures may pass and how long to wait; does not know what the
files are, where a download lands, nor who else wants the file. A URL is shown without the secrets that it may carry.
"""

import hashlib
import os
import random
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from gptdist.errors import ConfigError, GptdistError, RemoteFailed, StorageError

# A range that is asked for at once: large against the latency of an object store, small against memory.
BLOCK_BYTES = 16 << 20
# What a store denies or does not have seldom comes by waiting; one more try serves credentials that are renewed.
PERMANENT_ATTEMPTS = 2
LONGEST_WAIT_SECONDS = 30.0

_PERMANENT_STATUS = frozenset({400, 401, 403, 404, 405, 410})
_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PERMANENT_NAMES = frozenset({"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"})
_Result = TypeVar("_Result")


class StoredFile(Protocol):
    """What identifies a file: an entry of a manifest."""

    @property
    def file(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


class _BadContent(Exception):
    """What came is not what the manifest describes. It may come right the next time."""


class RemoteFolder:
    """The folder behind the fsspec URL `url`. Safe for several threads.

    Each file is tried `attempts` times, with waits that double from `first_wait_seconds`; a set `stopping` ends them.
    """

    failed: ClassVar[type[GptdistError]] = RemoteFailed
    unusable: ClassVar[type[GptdistError]] = ConfigError
    what: ClassVar[str] = "a folder"

    def __init__(
        self, url: str, attempts: int = 6, first_wait_seconds: float = 1.0, stopping: threading.Event | None = None
    ) -> None:
        self._url = url
        self._attempts = attempts
        self._first_wait_seconds = first_wait_seconds
        self._stopping = stopping or threading.Event()
        self._opened: Any = None
        self._opening = threading.Lock()

    def shown(self, file: str = "") -> str:
        """The URL of the folder, or of a file in it, as it may stand in a message."""
        return without_secrets(file_url(self._url, file) if file else self._url)

    def read(self, file: str) -> bytes:
        """A small file, whole. Raises `failed`; its cause is the library's own error."""
        return self._retrying(file, "fetched", lambda: bytes(self._filesystem().cat_file(self._path(file))))

    def download(self, entry: StoredFile, descriptor: int) -> None:
        """The file into `descriptor`, from offset 0. Raises `failed`, and StorageError where the disk takes no more.

        After an interruption it goes on where it was; after a wrong sha256 it begins again.
        """
        progress = _Progress()

        def go_on() -> None:
            while progress.done < entry.bytes:
                self._fetch_block(entry, descriptor, progress)
            found = progress.digest.hexdigest()
            if found != entry.sha256:
                progress.__init__()  # type: ignore[misc]
                raise _BadContent(f"its sha256 is {found[:12]}..., the manifest says {entry.sha256[:12]}...")

        self._retrying(entry.file, "fetched", go_on)

    def names(self) -> list[str]:
        """What is in the folder, files and folders, by their names; empty where there is none. Raises `failed`."""

        def list_it() -> list[str]:
            try:
                found = self._filesystem().ls(self._folder(), detail=False, refresh=True)
            except TypeError:  # not every file system knows `refresh`
                found = self._filesystem().ls(self._folder(), detail=False)
            except FileNotFoundError:
                return []
            return sorted({str(path).rstrip("/").rpartition("/")[2] for path in found} - {""})

        return self._retrying("", "listed", list_it)

    def upload(self, source: Path, file: str) -> None:
        """A local file, as `file`; it is complete there when this returns. Raises `failed`."""
        size = source.stat().st_size

        def put() -> None:
            self._make_parent(file)
            self._filesystem().put_file(str(source), self._path(file))
            self._check_arrived(file, size)

        self._retrying(file, "written", put)

    def write(self, file: str, content: bytes) -> None:
        """A small file, whole. Raises `failed`."""

        def pipe() -> None:
            self._make_parent(file)
            self._filesystem().pipe_file(self._path(file), content)
            self._check_arrived(file, len(content))

        self._retrying(file, "written", pipe)

    def remove(self, file: str) -> None:
        """A file that may be there is gone. Raises `failed`."""

        def rm() -> None:
            try:
                self._filesystem().rm_file(self._path(file))
            except FileNotFoundError:
                return

        self._retrying(file, "removed", rm)

    def below(self, name: str) -> "RemoteFolder":
        """A folder in this one."""
        return type(self)(file_url(self._url, name), self._attempts, self._first_wait_seconds, self._stopping)

    def _make_parent(self, file: str) -> None:
        """Object stores have no folders; others want them made."""
        self._filesystem().makedirs(self._path(file).rpartition("/")[0], exist_ok=True)

    def _check_arrived(self, file: str, size: int) -> None:
        filesystem = self._filesystem()
        filesystem.invalidate_cache()
        found = filesystem.info(self._path(file))["size"]
        if found != size:
            raise _BadContent(f"{found:,} bytes arrived where {size:,} were sent")

    def _fetch_block(self, entry: StoredFile, descriptor: int, progress: "_Progress") -> None:
        if self._stopping.is_set():
            raise self.failed(f"{self.shown(entry.file)}: fetching was stopped.")
        end = min(progress.done + BLOCK_BYTES, entry.bytes)
        block = self._filesystem().cat_file(self._path(entry.file), start=progress.done, end=end)
        if len(block) == entry.bytes:  # some web servers know no ranges and send all of it
            block = block[progress.done :]
            end = entry.bytes
        if len(block) != end - progress.done:
            found = progress.done + len(block)
            what = "is truncated" if found < end else "is not the file that was built"
            raise _BadContent(f"it {what}: {found:,} bytes came where {end:,} should")
        self._write_block(descriptor, block, progress.done)
        progress.digest.update(block)
        progress.done = end

    def _write_block(self, descriptor: int, block: bytes, offset: int) -> None:
        try:
            write_at(descriptor, block, offset)
        except OSError as error:
            raise self._disk_error(error) from None

    def _disk_error(self, error: OSError) -> StorageError:
        return StorageError(f"What is fetched from {self.shown()} cannot be written: {error.strerror}. Make room.")

    def _retrying(self, file: str, done: str, action: Callable[[], _Result]) -> _Result:
        attempt = 0
        while True:
            attempt += 1
            try:
                return action()
            except GptdistError:
                raise
            except Exception as error:  # every library behind fsspec has errors of its own
                permanent = is_permanent(error)
                if attempt >= (min(self._attempts, PERMANENT_ATTEMPTS) if permanent else self._attempts):
                    tries = f"{attempt} attempt{'s' if attempt > 1 else ''}"
                    raise self.failed(
                        f"{self.shown(file)} cannot be {done}: {tries}, the last one: {reason_of(error)}."
                    ) from error
            wait = min(LONGEST_WAIT_SECONDS, self._first_wait_seconds * 2 ** (attempt - 1))
            # Jitter: the ranks of a large run must not all come back at the same moment.
            if self._stopping.wait(wait * random.uniform(0.5, 1.5)):
                raise self.failed(f"{self.shown(file)}: {_STOPPED.get(done, done)} was stopped.")

    def _path(self, file: str) -> str:
        return str(self._filesystem()._strip_protocol(file_url(self._url, file)))

    def _folder(self) -> str:
        return str(self._filesystem()._strip_protocol(self._url))

    def _filesystem(self) -> Any:
        with self._opening:
            if self._opened is None:
                self._opened = self._open()
            return self._opened

    def _open(self) -> Any:
        shown, protocol = self.shown(), self._url.split("://")[0]
        install = "`pip install 'gptdist[data]'`"
        try:
            import fsspec
        except ImportError:
            raise self.unusable(
                f"{shown} needs the package fsspec, which is not installed. Install it with {install}."
            ) from None
        try:
            # Nothing is listed or kept: each file is asked for once, by name.
            return fsspec.core.url_to_fs(self._url, use_listings_cache=False)[0]
        except ImportError as error:
            raise self.unusable(
                f"{shown} needs a package that is not installed ({error}). Install it, or all that gptdist uses with "
                f"{install}."
            ) from None
        except ValueError as error:
            raise self.unusable(
                f"{shown} is not {self.what}: {protocol}:// cannot be opened ({without_secrets(str(error))}). "
                "Use s3://, gs://, https://, file:// or a folder."
            ) from None


_STOPPED = {"fetched": "fetching", "written": "writing", "listed": "listing", "removed": "removing"}


class _Progress:
    """How much of a download has come."""

    def __init__(self) -> None:
        self.done = 0
        self.digest = hashlib.sha256()


def is_url(name: object) -> bool:
    """Whether something is named by a URL and not by a folder."""
    return isinstance(name, str) and "://" in name


def file_url(url: str, file: str) -> str:
    """URL of a file in the folder `url`; a web address keeps its query, where access tokens stand."""
    if not url.startswith(("http://", "https://")):
        return f"{url.rstrip('/')}/{file}"
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{file}"))


def without_secrets(text: str) -> str:
    """`text` with user names, passwords and queries taken out of the URLs in it."""
    text = re.sub(r"(\w://)[^/\s'\"]*@", r"\1***@", text)
    return re.sub(r"(\w://[^\s?'\"<>]*)\?[^\s'\"<>)]*", r"\1?***", text)


def is_permanent(error: BaseException) -> bool:
    """Whether trying again is of little use: denied, not there, no credentials."""
    if isinstance(error, _PERMANENT_ERRORS) or type(error).__name__ in _PERMANENT_NAMES:
        return True
    return _status(error) in _PERMANENT_STATUS


def reason_of(error: BaseException) -> str:
    """One line that says what happened, without secrets."""
    text = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, _BadContent):
        return text
    status = _status(error)
    name = type(error).__name__ if status is None else f"{type(error).__name__} {status}"
    return without_secrets(f"{name}: {text}" if text else name)[:500]


def write_at(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of `data` at `offset`. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of aiohttp, requests, botocore or gcsfs carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status", None) or getattr(error, "code", None) or getattr(response, "status_code", 0)
    return status if isinstance(status, int) and 400 <= status < 600 else None
