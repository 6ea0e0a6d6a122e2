"""Lists and opens what a URL names: objects in S3 and Google Cloud Storage, files of web servers.

The only place in the build that knows fsspec. Whatever its libraries raise becomes an OSError here; neither keys nor
messages carry the credentials that a URL may hold (user and password, or the query of a signed URL).
"""

import errno
import io
import re
from typing import Any
from urllib.parse import unquote

from gptdist.errors import CorpusError

# What each scheme needs beside fsspec. `memory` is of this process alone: for tests.
SCHEMES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp", "memory": "fsspec"}

# Fetched ahead of what is read. Stores' own sizes are up to 50 MiB, more than some pieces.
_BLOCK_BYTES = 8 << 20

_MAGIC = re.compile(r"[*?\[]")
_WEB_MAGIC = re.compile(r"[*\[]")  # ? begins the query
_USER = re.compile(r"(?<=://)[^/\s]*@")
_QUERY = re.compile(r"(?<=\w)[?#][^\s'\"]*")

Listing = dict[str, tuple[str, int | None]]  # path below the root -> URL, bytes if the listing says


def shown_url(url: str) -> str:
    """A path or URL for keys and messages: without credentials, and printable whatever bytes its name has."""
    if url.startswith(("http://", "https://")):
        url = re.split("[?#]", url, maxsplit=1)[0]
    return printable(_USER.sub("", url) if "://" in url else url)


def printable(name: str) -> str:
    """A file name as text that can be encoded: bytes that are not UTF-8 are spelled with backslashes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def list_url(url: str) -> tuple[str, Listing, bool]:
    """What a URL names: (name of the root, what lies below it, whether it is one file and no folder or glob).

    Raises CorpusError where there is nothing or no access.
    """
    shown = shown_url(url)
    scheme = _checked_scheme(url)
    try:
        filesystem, path = _filesystem(url)
        filesystem.invalidate_cache()  # what it knows may be old
        web = scheme in ("http", "https")
        if not (web and path.endswith("/")):
            info = _info(filesystem, path)
            if info and info["type"] == "file":
                return _root_name(shown), {_root_name(shown): (url, info.get("size"))}, True
            if info is None and not (_WEB_MAGIC if web else _MAGIC).search(path):
                what = "does not exist or cannot be reached" if web else "does not exist"
                raise CorpusError(f"Source {shown} {what}. Name a file, a folder, or a glob such as *.jsonl.")
        root, found = _below(filesystem, path)
        listing: Listing = {}
        for name, info in found.items():
            below = name[len(root) :].lstrip("/") if name.startswith(root) else ""
            if below and info["type"] == "file":
                listing[unquote(below) if web else below] = (filesystem.unstrip_protocol(name), info.get("size"))
        return _root_name(shown_url(filesystem.unstrip_protocol(root))), listing, False
    except CorpusError:
        raise
    except Exception as error:  # every store has its own errors
        raise CorpusError(f"Source {shown} cannot be listed: {_reason(error)}.") from None


def url_bytes(url: str) -> int:
    """The size of what a URL names. Raises CorpusError."""
    try:
        filesystem, path = _filesystem(url)
        size = filesystem.size(path)
    except Exception as error:
        raise CorpusError(f"Source {shown_url(url)} cannot be read: {_reason(error)}.") from None
    if size is None:
        raise CorpusError(
            f"The server does not say how large {shown_url(url)} is, so that a broken transfer would not be noticed. "
            "Download it first."
        )
    return int(size)


def open_url(url: str) -> "RemoteFile":
    """Open for reading, anywhere in it. Raises OSError."""
    try:
        filesystem, path = _filesystem(url)
        return RemoteFile(filesystem.open(path, "rb", block_size=_BLOCK_BYTES))
    except CorpusError:
        raise
    except Exception as error:
        raise _os_error(error) from None


class RemoteFile(io.RawIOBase):
    """A remote file whose errors are OSErrors without credentials."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.bytes: int | None = getattr(file, "size", None)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def read(self, size: int = -1) -> bytes:
        try:
            return bytes(self._file.read(size))
        except Exception as error:
            raise _os_error(error) from None

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return int(self._file.seek(offset, whence))
        except Exception as error:
            raise _os_error(error) from None

    def tell(self) -> int:
        return int(self._file.tell())

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


def _checked_scheme(url: str) -> str:
    """The scheme of a URL that may be read. Raises CorpusError, which shows no more than that."""
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in ("file", *SCHEMES))
        raise CorpusError(f"A source's scheme is {shown_url(scheme)!r}, which is not read. Known are {known}.")
    netloc = rest.split("/", 1)[0]
    stored = scheme not in ("http", "https")
    if stored and ("@" in netloc or (":" in netloc and not netloc.startswith("arn:"))):
        raise CorpusError(
            f"A source of scheme {scheme}:// holds credentials. Give them by the store's own environment variables or "
            "files instead, and name the bucket alone."
        )
    if not stored and not re.fullmatch(r"(.*@)?([^:@]+|\[[^\]]*\])(:\d*)?", netloc):
        raise CorpusError(f"A source of scheme {scheme}:// has no valid host and port. Quote / and @ in passwords.")
    return scheme


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it. Made anew in each process: fsspec keeps them."""
    scheme = url.partition("://")[0]
    try:
        import fsspec

        kind: Any = fsspec.get_filesystem_class(scheme)
    except ImportError:
        raise CorpusError(
            f"Reading {scheme}:// needs {SCHEMES[scheme]}, which is not installed: pip install 'gptdist[data]'."
        ) from None
    return kind(), str(kind._strip_protocol(url))


def _info(filesystem: Any, path: str) -> dict[str, Any] | None:
    try:
        return dict(filesystem.info(path))
    except FileNotFoundError:
        return None


def _below(filesystem: Any, path: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """(root, name -> info) of the files in a folder or of those that a glob matches, folders in a match included."""
    web = path.startswith(("http://", "https://"))
    magic = (_WEB_MAGIC if web else _MAGIC).search(path)
    if not magic or (web and path.endswith("/")):
        return path, filesystem.find(path, detail=True)
    found: dict[str, dict[str, Any]] = {}
    for name, info in filesystem.glob(path, detail=True).items():
        found.update(filesystem.find(name, detail=True) if info["type"] == "directory" else {name: info})
    return path[: path.rfind("/", 0, magic.start()) + 1], found


def _root_name(shown: str) -> str:
    return unquote(shown.rstrip("/").rsplit("/", 1)[-1])


def _os_error(error: Exception) -> OSError:
    kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
    return kind(errno.ENOENT if kind is FileNotFoundError else 0, _reason(error))


def _reason(error: Exception) -> str:
    text = _QUERY.sub("", _USER.sub("", str(error))) or type(error).__name__
    return text.splitlines()[0].rstrip(". ")
