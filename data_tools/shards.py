"""Writes one shard: documents in, a WebDataset tar of chunks out, byte for byte the same every time.

The only importer of webdataset. Knows how a chunk lies in a tar; does not know where documents come from or in which
order.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from data_tools.work import temporary_path
from gptdist.data.manifest import ShardInfo

_TAR_BLOCK = 512
_NPY_HEADER_BYTES = 128
_BUFFER_BYTES = 1 << 20

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
        self._bytes = 0
        self._rows: list[tuple[int, int, int, int]] = []
        self._digests: list[int] = []
        self._file = _HashedFile(path)
        self._tar = TarWriter(self._file, encoder=False, mtime=0, user="gptdist", group="gptdist", mode=0o444)

    def write_chunk(self, keys: list[str], documents: list[np.ndarray]) -> None:
        ends = np.cumsum([len(tokens) for tokens in documents], dtype="<i8")
        members = {
            "docs.npy": npy_bytes(ends),
            "json": json.dumps({"documents": keys}).encode(),
            "tokens.npy": npy_bytes(np.concatenate(documents).astype(self._dtype, copy=False)),
        }
        sample_offset = tokens_offset = self._bytes
        for name in sorted(members):  # the order in which TarWriter writes them
            if name == "tokens.npy":
                tokens_offset = self._bytes + _TAR_BLOCK
            self._bytes += _member_bytes(members[name])
        self._file.mark(sample_offset)
        self._tar.write({"__key__": chunk_key(self._key_prefix, len(self._rows)), **members})
        self._rows.append((int(ends[-1]), len(keys), sample_offset, tokens_offset))

    def drop(self) -> None:
        """Close the file as it is, after an error."""
        self._file.drop()

    def close(self, name: str) -> WrittenShard:
        self._tar.close()
        size, sha256, digests = self._file.close_durably()
        chunks = np.empty((len(self._rows), len(CHUNK_COLUMNS)), dtype=np.uint64)
        chunks[:, :4] = self._rows
        chunks[:, 4] = digests
        tokens, documents = (int(chunks[:, column].sum()) for column in (0, 1))
        return WrittenShard(ShardInfo(name, size, sha256, tokens, documents, len(self._rows)), chunks)


class _HashedFile:
    """The file under a tar: hashes what is written, as a whole and from mark to mark.

    After a failed write it takes no more: a tar that is dropped writes its end, which would fail again, aloud, in front
    of the error that matters.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._failed = False
        self._buffer = bytearray()
        self._size = 0
        self._sha256 = hashlib.sha256()
        self._marks: list[int] = []
        self._chunk = hashlib.blake2b(digest_size=8)
        self._digests: list[int] = []

    def mark(self, offset: int) -> None:
        """A chunk begins at byte `offset`, which may not have been written yet."""
        self._marks.append(offset)

    def write(self, data: bytes) -> int:
        if not self._failed:
            self._buffer += data
            if len(self._buffer) >= _BUFFER_BYTES:
                self._flush()
        return len(data)

    def _flush(self) -> None:
        """Everything in the buffer, cut at the marks within it."""
        data = bytes(self._buffer)
        self._buffer.clear()
        start = 0
        while self._marks and self._marks[0] < self._size + len(data):
            cut = self._marks.pop(0) - self._size
            self._chunk.update(data[start:cut])
            if self._size + cut:
                self._end_chunk()
            start = cut
        self._chunk.update(memoryview(data)[start:])
        self._sha256.update(data)
        self._size += len(data)
        try:
            self._file.write(data)
        except OSError:
            self._failed = True
            raise

    def _end_chunk(self) -> None:
        self._digests.append(int.from_bytes(self._chunk.digest(), "little"))
        self._chunk = hashlib.blake2b(digest_size=8)

    def drop(self) -> None:
        self._failed = True
        with suppress(OSError):
            self._file.close()

    def close_durably(self) -> tuple[int, str, list[int]]:
        """Wait until all is on the disk; returns size, sha256 and the chunks' digests (`chunk_digest` of each)."""
        self._flush()
        self._end_chunk()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._size, self._sha256.hexdigest(), self._digests


def chunk_key(prefix: str, number: int) -> str:
    """The WebDataset key of chunk `number` of the shard `prefix`.tar."""
    return f"{prefix}-{number:05d}"


def npy_bytes(array: np.ndarray) -> bytes:
    """A one-dimensional array as an npy file of version 1.0.

    numpy's own writer pads its header differently from version to version; shards must not change with numpy.
    """
    header = repr({"descr": array.dtype.str, "fortran_order": False, "shape": array.shape})
    prefix = b"\x93NUMPY\x01\x00" + (_NPY_HEADER_BYTES - 10).to_bytes(2, "little")
    return prefix + header.ljust(_NPY_HEADER_BYTES - 11).encode() + b"\n" + array.tobytes()


def write_durably(path: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _member_bytes(content: bytes) -> int:
    """Room of a member in a tar: its header, its content, and the padding."""
    return _TAR_BLOCK + -(-len(content) // _TAR_BLOCK) * _TAR_BLOCK
