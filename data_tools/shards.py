"""Writes the shards of a split: documents in, WebDataset tars of chunks out, byte for byte the same every time.

The only importer of webdataset. Knows how a chunk lies in a tar; does not know where documents come from or in which
order.
"""

import hashlib
import json
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.writer import TarWriter

from gptdist.data.chunk_index import ChunkRecord, render_index
from gptdist.data.digest import chunk_digest, file_sha256
from gptdist.data.manifest import IndexInfo, ShardInfo, SplitInfo

_TAR_BLOCK = 512
_NPY_HEADER_BYTES = 128


@dataclass(frozen=True)
class _Written:
    """A chunk in the open shard; its digest is taken when the shard is complete."""

    tokens: int
    documents: int
    sample_offset: int
    tokens_offset: int


class SplitWriter:
    """Collects documents into chunks of about `chunk_tokens`, and chunks into shards of at most about `shard_bytes`.

    A document is never cut: one that is larger than a chunk is a chunk of its own. `close` gives the split's manifest
    entry; leaving the `with` block without it drops what is open.
    """

    def __init__(
        self, folder: Path, split: str, dtype: str, end_of_text: int, chunk_tokens: int, shard_bytes: int
    ) -> None:
        self._folder = folder
        self._split = split
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._end_of_text = end_of_text
        self._chunk_tokens = chunk_tokens
        self._shard_bytes = shard_bytes
        self._documents: list[np.ndarray] = []
        self._keys: list[str] = []
        self._pending_tokens = 0
        self._text_bytes = 0
        self._shard: _OpenShard | None = None
        self._shards: list[ShardInfo] = []
        self._records: list[ChunkRecord] = []

    def __enter__(self) -> "SplitWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if self._shard:
            self._shard.drop()

    def add(self, key: str, ids: np.ndarray, text_bytes: int) -> None:
        """Append a document; its end-of-text id is added here."""
        tokens = np.append(ids.astype(self._dtype), self._dtype.type(self._end_of_text))
        if self._documents and self._pending_tokens + len(tokens) > self._chunk_tokens:
            self._write_chunk()
        self._documents.append(tokens)
        self._keys.append(key)
        self._pending_tokens += len(tokens)
        self._text_bytes += text_bytes

    def close(self) -> SplitInfo:
        """Write what is pending and the index."""
        if self._documents:
            self._write_chunk()
        self._close_shard()
        path = self._folder / f"{self._split}.index"
        content = render_index(self._records)
        write_durably(path, content)
        return SplitInfo(
            tokens=sum(record.tokens for record in self._records),
            documents=sum(record.documents for record in self._records),
            text_bytes=self._text_bytes,
            index=IndexInfo(path.name, len(content), hashlib.sha256(content).hexdigest()),
            shards=tuple(self._shards),
        )

    def _write_chunk(self) -> None:
        number = len(self._records) + (len(self._shard.written) if self._shard else 0)
        ends = np.cumsum([len(tokens) for tokens in self._documents], dtype="<i8")
        members = {
            "docs.npy": npy_bytes(ends),
            "json": json.dumps({"documents": self._keys}).encode(),
            "tokens.npy": npy_bytes(np.concatenate(self._documents)),
        }
        size = sum(_member_bytes(content) for content in members.values())
        if self._shard and self._shard.bytes + size > self._shard_bytes:
            self._close_shard()
        if self._shard is None:
            self._shard = _OpenShard(self._folder / f"{self._split}-{len(self._shards):05d}.tar")
        self._shard.write(chunk_key(self._split, number), members, self._pending_tokens, len(self._documents))
        self._documents, self._keys, self._pending_tokens = [], [], 0

    def _close_shard(self) -> None:
        if self._shard:
            info, records = self._shard.close(len(self._shards))
            self._shards.append(info)
            self._records.extend(records)
            self._shard = None


class _OpenShard:
    """A tar that is being written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes = 0
        self.written: list[_Written] = []
        self._file = _TarFile(path)
        self._tar = TarWriter(self._file, encoder=False, mtime=0, user="gptdist", group="gptdist", mode=0o444)

    def write(self, key: str, members: dict[str, bytes], tokens: int, documents: int) -> None:
        sample_offset = tokens_offset = self.bytes
        for name in sorted(members):  # the order in which TarWriter writes them
            if name == "tokens.npy":
                tokens_offset = self.bytes + _TAR_BLOCK
            self.bytes += _member_bytes(members[name])
        self._tar.write({"__key__": key, **members})
        self.written.append(_Written(tokens, documents, sample_offset, tokens_offset))

    def drop(self) -> None:
        """Close the file as it is, after an error."""
        self._file.drop()

    def close(self, shard_number: int) -> tuple[ShardInfo, list[ChunkRecord]]:
        self._tar.close()
        self._file.close_durably()
        size = self.path.stat().st_size
        ends = [*(chunk.sample_offset for chunk in self.written[1:]), size]
        with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            digests = [
                chunk_digest(mapped[chunk.sample_offset : end]) for chunk, end in zip(self.written, ends, strict=True)
            ]
        info = ShardInfo(
            file=self.path.name,
            bytes=size,
            sha256=file_sha256(self.path),
            tokens=sum(chunk.tokens for chunk in self.written),
            documents=sum(chunk.documents for chunk in self.written),
            chunks=len(self.written),
        )
        records = [
            ChunkRecord(chunk.tokens, chunk.documents, shard_number, chunk.sample_offset, chunk.tokens_offset, digest)
            for chunk, digest in zip(self.written, digests, strict=True)
        ]
        return info, records


class _TarFile:
    """The file under a tar. After a failed write it takes no more: a tar that is dropped writes its end, which would
    fail again, aloud, in front of the error that matters.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._failed = False

    def write(self, data: bytes) -> int:
        if self._failed:
            return len(data)
        try:
            return self._file.write(data)
        except OSError:
            self._failed = True
            raise

    def drop(self) -> None:
        self._failed = True
        with suppress(OSError):
            self._file.close()

    def close_durably(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def chunk_key(split: str, number: int) -> str:
    """The WebDataset key of chunk `number` of a split."""
    return f"{split}-{number:010d}"


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
