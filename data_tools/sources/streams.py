"""Opens a source file as a stream of bytes, unpacked, and says by name which file is broken.

Knows compressions, and files that vanish, change or break off; does not know what the bytes mean. Memory does not grow
with the file.
"""

import bz2
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from data_tools.sources.files import SourceFile
from data_tools.sources.remote import RemoteFile, open_url
from gptdist.errors import CorpusError

# A document has to be in memory as a whole. A larger one is most likely a file without line ends, or a bomb.
MAX_DOCUMENT_BYTES = 1 << 30

BUFFER_BYTES = 256 * 1024  # stays in the processor's cache

_PACKED_BYTES = 1 << 20
# As little as 4 bytes of a zstd frame can unpack to 128 KiB, if somebody means it.
_ZSTD_INPUT_BYTES = 16 * 1024


@contextmanager
def naming(file: SourceFile) -> Iterator[None]:
    """Turns what goes wrong while reading `file` into a CorpusError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise CorpusError(f"Source {file.where} vanished while the corpus was being built. Build again.") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        what = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise CorpusError(
            f"Source {file.where} cannot be read: {what[0].lower()}{what[1:].rstrip('.')}. If it is truncated or "
            "damaged, copy it again from where it came, or leave it out."
        ) from None


@contextmanager
def open_raw(file: SourceFile) -> Iterator[io.RawIOBase]:
    """The file as it is stored, seekable if the store can. Raises CorpusError where it changed since it was listed."""
    with open_url(file.url) if not file.is_local else io.FileIO(file.url) as raw:
        size = raw.bytes if isinstance(raw, RemoteFile) else os.fstat(raw.fileno()).st_size
        if size is not None and size != file.bytes:
            raise CorpusError(
                f"Source {file.where} changed while the corpus was being built: it has {size:,} bytes, and had "
                f"{file.bytes:,}. Build again when it is at rest."
            )
        yield raw


@contextmanager
def open_unpacked(file: SourceFile) -> Iterator[io.BufferedReader]:
    """The file's content, whatever it is compressed with. Seekable only if it is not."""
    with open_raw(file) as raw:
        if not file.compression:
            yield buffered(raw)
            return
        if not file.bytes:
            raise EOFError(f"it is empty, which no {file.compression} file is")
        yield buffered(_unpacked(io.BufferedReader(raw, _PACKED_BYTES), file.compression))


def buffered(raw: io.RawIOBase, size: int = BUFFER_BYTES) -> io.BufferedReader:
    """`raw` with lines, read in parts of a size that is fast; `size`: its bytes, where they may be few."""
    return io.BufferedReader(raw, min(max(size, 1), BUFFER_BYTES))


def read_whole(stream: io.BufferedReader) -> bytes | None:
    """All that is left, or None where that is more than a document may have."""
    parts = []
    held = 0
    while part := stream.read(BUFFER_BYTES):
        parts.append(part)
        held += len(part)
        if held > MAX_DOCUMENT_BYTES:
            return None
    return b"".join(parts)


def _unpacked(packed: io.BufferedReader, compression: str) -> io.RawIOBase:
    if compression == "gzip":
        stream: Any = gzip.GzipFile(fileobj=packed, mode="rb")
    elif compression == "bz2":
        stream = bz2.BZ2File(packed)
    elif compression == "xz":
        stream = lzma.LZMAFile(packed)  # noqa: SIM115 - closed with the file under it
    else:
        stream = _ZstdStream(packed)
    return cast(io.RawIOBase, stream)


class _ZstdStream(io.RawIOBase):
    """Frames of zstd, one after the other. zstandard's own reader takes a frame that breaks off for a whole one."""

    def __init__(self, packed: io.BufferedReader) -> None:
        try:
            import zstandard
        except ImportError:
            raise CorpusError(
                "Reading .zst files needs zstandard, which is not installed: pip install 'gptdist[data]'."
            ) from None
        self._packed = packed
        self._error = zstandard.ZstdError
        # Some large public corpora were packed with a window of 2 GiB (zstd --long=31).
        self._new_frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._packed.read(_ZSTD_INPUT_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a zstd frame")
                return 0
            self._unpack()
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def _unpack(self) -> None:
        if self._frame is None:
            self._frame = self._new_frame()
        try:
            self._output = memoryview(self._frame.decompress(self._input))
        except self._error as error:
            raise OSError(0, str(error)) from None
        self._input = b""
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = None
