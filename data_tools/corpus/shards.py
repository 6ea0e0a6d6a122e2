"""Writes one shard: documents in, a WebDataset tar of chunks out, byte for byte the same every time.

Knows how a chunk lies in a tar; does not know where documents come from or in which order. The tar is the standard
library's: webdataset's writer is a thin layer over that, and importing it loads torch, a second and 220 MB in each
worker.
"""

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.building.work import temporary_path
from gptdist.data.digest import short_digest
from gptdist.data.manifest import ShardInfo

_NPY_HEADER_BYTES = 128
# Written in parts so large, at multiples of them, a file lies in the system's cache in large pages: gathering windows
# from its mapping takes a fifth less time, as long as it stays there.
_WRITE_BYTES = 8 << 20

# The columns of `WrittenShard.chunks`.
CHUNK_COLUMNS = ("tokens", "documents", "sample_offset", "tokens_offset", "digest")


@dataclass(frozen=True)
class WrittenShard:
    """A shard on disk. `chunks`: uint64 [chunks, 5], a row of `CHUNK_COLUMNS` each."""

    info: ShardInfo
    chunks: np.ndarray


def write_shard(
    path: Path, key_prefix: str, documents: Iterable[tuple[str, np.ndarray]], chunk_tokens: int, dtype: np.dtype
) -> WrittenShard:
    """Put `documents` (key, tokens with the end-of-text id) into the tar `path`, whole or not at all.

    Documents are collected into chunks of at most `chunk_tokens`; none is cut, so one that is larger is a chunk of its
    own. There must be at least one.
    """
    temporary = temporary_path(path)
    shard = _OpenShard(temporary, key_prefix, dtype)
    try:
        keys: list[str] = []
        pending: list[np.ndarray] = []
        pending_tokens = 0
        for key, tokens in documents:
            if pending and pending_tokens + len(tokens) > chunk_tokens:
                shard.write_chunk(keys, pending)
                keys, pending, pending_tokens = [], [], 0
            keys.append(key)
            pending.append(tokens)
            pending_tokens += len(tokens)
        shard.write_chunk(keys, pending)
        written = shard.close(path.name)
        os.rename(temporary, path)
        return written
    except BaseException:
        shard.drop()
        temporary.unlink(missing_ok=True)
        raise


class _OpenShard:
    """A tar that is being written."""

    def __init__(self, path: Path, key_prefix: str, dtype: np.dtype) -> None:
        self._key_prefix = key_prefix
        self._dtype = dtype
        self._rows: list[tuple[int, int, int, int]] = []
        self._file = _HashedFile(path)

    def write_chunk(self, keys: list[str], documents: list[np.ndarray]) -> None:
        ends = np.cumsum([len(tokens) for tokens in documents], dtype="<i8")
        tokens = np.concatenate(documents).astype(self._dtype, copy=False)
        key = chunk_key(self._key_prefix, len(self._rows))
        sample_offset = self._file.size
        self._file.begin_chunk()
        self._write_member(f"{key}.docs.npy", npy_header(ends), ends.tobytes())
        self._write_member(f"{key}.json", json.dumps({"documents": keys}).encode())
        tokens_offset = self._file.size + tarfile.BLOCKSIZE
        self._write_member(f"{key}.tokens.npy", npy_header(tokens), tokens.data.cast("B"))
        self._rows.append((int(ends[-1]), len(keys), sample_offset, tokens_offset))

    def _write_member(self, name: str, *parts: bytes | memoryview) -> None:
        member = tarfile.TarInfo(name)
        member.size = sum(len(part) for part in parts)
        member.mode, member.uname, member.gname = 0o444, "gptdist", "gptdist"
        self._file.write(member.tobuf(tarfile.USTAR_FORMAT))
        for part in parts:
            self._file.write(part)
        self._file.write(bytes(-member.size % tarfile.BLOCKSIZE))

    def drop(self) -> None:
        """Close the file as it is, after an error."""
        self._file.drop()

    def close(self, name: str) -> WrittenShard:
        end = self._file.size + 2 * tarfile.BLOCKSIZE  # two empty blocks, and the record that they lie in
        self._file.write(bytes(end - self._file.size + -end % tarfile.RECORDSIZE))
        size, sha256, digests = self._file.close_durably()
        chunks = np.empty((len(self._rows), len(CHUNK_COLUMNS)), dtype=np.uint64)
        chunks[:, :4] = self._rows
        chunks[:, 4] = digests
        tokens, documents = (int(chunks[:, column].sum()) for column in (0, 1))
        return WrittenShard(ShardInfo(name, size, sha256, tokens, documents, len(self._rows)), chunks)


class _HashedFile:
    """The file under a tar: hashes what is written, as a whole and chunk by chunk; the last chunk has the tar's end."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._sent = 0
        self._file = path.open("wb", _WRITE_BYTES)
        self._sha256 = hashlib.sha256()
        self._chunks: list[Any] = []

    def begin_chunk(self) -> None:
        self._chunks.append(hashlib.sha256())

    def write(self, data: bytes | memoryview) -> None:
        self._sha256.update(data)
        self._chunks[-1].update(data)
        self._file.write(data)
        self.size += len(data)
        self._start_writeback()

    def _start_writeback(self) -> None:
        """Let the disk begin with what is complete, while more is hashed: there is little left to wait for at the end.

        The advice that it is not needed does that; pages which are not on the disk yet stay in memory.
        """
        written = os.lseek(self._file.fileno(), 0, os.SEEK_CUR)  # the rest waits in our own buffer
        if written - self._sent >= _WRITE_BYTES and hasattr(os, "posix_fadvise"):  # not on macOS
            os.posix_fadvise(self._file.fileno(), self._sent, written - self._sent, os.POSIX_FADV_DONTNEED)
            self._sent = written

    def drop(self) -> None:
        with suppress(OSError):  # what is not yet written may have no room either
            self._file.close()

    def close_durably(self) -> tuple[int, str, list[int]]:
        """Wait until all is on the disk; returns size, sha256 and the chunks' digests (`chunk_digest` of each)."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        digests = [short_digest(chunk.digest()) for chunk in self._chunks]
        return self.size, self._sha256.hexdigest(), digests


def chunk_key(prefix: str, number: int) -> str:
    """The WebDataset key of chunk `number` of the shard `prefix`.tar."""
    return f"{prefix}-{number:05d}"


def npy_header(array: np.ndarray) -> bytes:
    """What goes before a one-dimensional array's data in an npy file of version 1.0.

    numpy's own writer pads its header differently from version to version; shards must not change with numpy.
    """
    header = repr({"descr": array.dtype.str, "fortran_order": False, "shape": array.shape})
    prefix = b"\x93NUMPY\x01\x00" + (_NPY_HEADER_BYTES - 10).to_bytes(2, "little")
    return prefix + header.ljust(_NPY_HEADER_BYTES - 11).encode() + b"\n"
