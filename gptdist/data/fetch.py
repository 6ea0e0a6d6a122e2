"""Files of a corpus behind a URL: read and downloaded with retries, their size and sha256 checked on the way.

The only importer of fsspec in `gptdist`. Knows which failures may pass and how long to wait; does not know where a
download lands, nor who else wants the file. A URL is shown without the secrets that it may carry.
"""

import hashlib
import os
import random
import re
import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from gptdist.errors import CorpusError, GptdistError, StorageError

# A range that is asked for at once: large against the latency of an object store, small against memory.
BLOCK_BYTES = 16 << 20
# What a store denies or does not have seldom comes by waiting; one more try serves credentials that are renewed.
PERMANENT_ATTEMPTS = 2
LONGEST_WAIT_SECONDS = 30.0

_PERMANENT_STATUS = frozenset({400, 401, 403, 404, 405, 410})
_PERMANENT_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_PERMANENT_NAMES = frozenset({"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"})
_Result = TypeVar("_Result")


class FetchFailed(CorpusError):
    """A file of the corpus could not be had, however often it was tried."""


class StoredFile(Protocol):
    """What identifies a file of a corpus: its manifest entry."""

    @property
    def file(self) -> str: ...
    @property
    def bytes(self) -> int: ...
    @property
    def sha256(self) -> str: ...


class _BadContent(Exception):
    """What came is not what the manifest describes. It may come right the next time."""


class Remote:
    """A corpus folder behind the fsspec URL `url`.

    Each file is tried `attempts` times, with waits that double from `first_wait_seconds`; a set `stopping` ends them.
    """

    def __init__(
        self, url: str, attempts: int, first_wait_seconds: float = 1.0, stopping: threading.Event | None = None
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
        """A small file, whole. Raises FetchFailed; its cause is the library's own error."""
        return self._retrying(file, lambda: bytes(self._filesystem().cat_file(self._path(file))))

    def download(self, entry: StoredFile, descriptor: int) -> None:
        """The file into `descriptor`, from offset 0. Raises FetchFailed, and StorageError where the disk takes no more.

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

        self._retrying(entry.file, go_on)

    def _fetch_block(self, entry: StoredFile, descriptor: int, progress: "_Progress") -> None:
        if self._stopping.is_set():
            raise FetchFailed(f"{self.shown(entry.file)}: fetching was stopped.")
        end = min(progress.done + BLOCK_BYTES, entry.bytes)
        block = self._filesystem().cat_file(self._path(entry.file), start=progress.done, end=end)
        if len(block) == entry.bytes:  # some web servers know no ranges and send all of it
            block = block[progress.done :]
            end = entry.bytes
        if len(block) != end - progress.done:
            found = progress.done + len(block)
            what = "is truncated" if found < end else "is not the file that was built"
            raise _BadContent(f"it {what}: {found:,} bytes came where {end:,} should")
        write_all(descriptor, block, progress.done)
        progress.digest.update(block)
        progress.done = end

    def _retrying(self, file: str, action: Callable[[], _Result]) -> _Result:
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
                    raise FetchFailed(
                        f"{self.shown(file)} cannot be fetched: {tries}, the last one: {reason_of(error)}."
                    ) from error
            wait = min(LONGEST_WAIT_SECONDS, self._first_wait_seconds * 2 ** (attempt - 1))
            # Jitter: the ranks of a large run must not all come back at the same moment.
            if self._stopping.wait(wait * random.uniform(0.5, 1.5)):
                raise FetchFailed(f"{self.shown(file)}: fetching was stopped.")

    def _path(self, file: str) -> str:
        return str(self._filesystem()._strip_protocol(file_url(self._url, file)))

    def _filesystem(self) -> Any:
        with self._opening:
            if self._opened is None:
                self._opened = _open_filesystem(self._url)
            return self._opened


class _Progress:
    """How much of a download has come."""

    def __init__(self) -> None:
        self.done = 0
        self.digest = hashlib.sha256()


def is_url(corpus: object) -> bool:
    """Whether a corpus is named by a URL and not by a folder."""
    return isinstance(corpus, str) and "://" in corpus


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


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """Write `data` at `offset`. Raises StorageError."""
    view = memoryview(data)
    try:
        while view:
            written = os.pwrite(descriptor, view, offset)
            view, offset = view[written:], offset + written
    except OSError as error:
        raise StorageError(
            f"The cache of the corpus cannot be written: {error.strerror}. Make room on its disk, or set "
            "data.cache_dir to a folder on another one."
        ) from None


def _status(error: BaseException) -> int | None:
    """The HTTP status that an error of aiohttp, requests, botocore or gcsfs carries."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status", None) or getattr(error, "code", None) or getattr(response, "status_code", 0)
    return status if isinstance(status, int) and 400 <= status < 600 else None


def _open_filesystem(url: str) -> Any:
    protocol = url.split("://")[0]
    try:
        import fsspec
    except ImportError:
        raise CorpusError(
            f"{without_secrets(url)} needs the package fsspec, which is not installed. "
            "Install it with `pip install 'gptdist[data]'`."
        ) from None
    try:
        # Nothing is listed or kept: each file is asked for once, by name.
        return fsspec.core.url_to_fs(url, use_listings_cache=False)[0]
    except ImportError as error:
        raise CorpusError(
            f"{without_secrets(url)} needs a package that is not installed ({error}). Install it, or all that "
            "gptdist uses with `pip install 'gptdist[data]'`."
        ) from None
    except ValueError as error:
        raise CorpusError(
            f"{without_secrets(url)} is not a corpus: {protocol}:// cannot be opened ({without_secrets(str(error))}). "
            "Use s3://, gs://, https://, file:// or a folder."
        ) from None
