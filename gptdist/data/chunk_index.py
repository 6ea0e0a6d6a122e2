"""The binary index of a split: where each chunk lies in the shards, and which tokens of the split it holds.

A 64-byte header, then columns in the order of `_COLUMNS`, little-endian, without padding. Columns and not records,
because a binary search must run on the mapped file itself: numpy would copy a strided field, all 14 million of it.
Opening checks header and size only, so it takes the same time for any number of chunks; the reader checks each chunk
as it comes.
"""

import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gptdist.errors import CorpusError

MAGIC = b"GPTDINDX"
VERSION = 2

# magic, version, header bytes, chunks, tokens, documents
_HEADER = struct.Struct("<8sIIQQQ24x")
# name, dtype, entries beyond one per chunk: the starts end with the total, so chunk i is [start[i], start[i + 1])
_COLUMNS = (
    ("token_start", "<i8", 1),
    ("document_start", "<i8", 1),
    ("sample_offset", "<i8", 0),
    ("tokens_offset", "<i8", 0),
    ("digest", "<u8", 0),
    ("shard", "<u4", 0),
)


@dataclass(frozen=True)
class ChunkRecord:
    """One chunk. Offsets are bytes from the start of its shard.

    `sample_offset` is where its first tar header begins, `tokens_offset` where `KEY.tokens.npy` does (its npy header,
    not its tar header). `digest` covers the tar's bytes from `sample_offset` to the next chunk's, or to the end of the
    shard.
    """

    tokens: int
    documents: int
    shard: int
    sample_offset: int
    tokens_offset: int
    digest: int


@dataclass(frozen=True)
class ChunkIndex:
    """The columns, mapped. `token_start` and `document_start` have one entry more than there are chunks."""

    token_start: np.ndarray
    document_start: np.ndarray
    sample_offset: np.ndarray
    tokens_offset: np.ndarray
    digest: np.ndarray
    shard: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)

    def chunk_of(self, token: int) -> int:
        """The chunk that holds `token` (counted over the split)."""
        # An int64 key: any other type makes numpy copy the column.
        return int(self.token_start.searchsorted(np.int64(token), side="right")) - 1

    def sample_end(self, chunk: int, shard_bytes: int) -> int:
        """Where the bytes of `chunk` in its shard end: at the next chunk, or with the shard."""
        if chunk + 1 < len(self) and self.shard[chunk + 1] == self.shard[chunk]:
            return int(self.sample_offset[chunk + 1])
        return shard_bytes

    @staticmethod
    def open(path: Path, num_chunks: int, num_tokens: int, num_documents: int) -> "ChunkIndex":
        """Map the file at `path`. Raises CorpusError where its header or size differ from what the manifest says."""
        remedy = "Copy the corpus again from where it came, or build it again."
        try:
            with path.open("rb") as file:
                header = file.read(_HEADER.size)
                size = os.fstat(file.fileno()).st_size
                expected = (MAGIC, VERSION, _HEADER.size, num_chunks, num_tokens, num_documents)
                if len(header) < _HEADER.size or _HEADER.unpack(header) != expected:
                    raise CorpusError(f"{path} is not the index that the corpus's manifest describes. {remedy}")
                if size != index_bytes(num_chunks):
                    raise CorpusError(
                        f"{path} is {size:,} bytes; with {num_chunks:,} chunks it must be "
                        f"{index_bytes(num_chunks):,}. {remedy}"
                    )
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror}. {remedy}") from None
        return ChunkIndex(**_columns(mapped, num_chunks))


def index_bytes(num_chunks: int) -> int:
    """Size of the index of `num_chunks` chunks."""
    return _HEADER.size + sum(np.dtype(dtype).itemsize * (num_chunks + more) for _, dtype, more in _COLUMNS)


def render_index(records: Sequence[ChunkRecord]) -> bytes:
    """The file's bytes for chunks in the order of the split."""
    starts = {
        "token_start": np.cumsum([0, *(record.tokens for record in records)]),
        "document_start": np.cumsum([0, *(record.documents for record in records)]),
    }
    parts = [
        _HEADER.pack(
            MAGIC, VERSION, _HEADER.size, len(records), starts["token_start"][-1], starts["document_start"][-1]
        )
    ]
    for name, dtype, more in _COLUMNS:
        values: Any = starts[name] if more else [getattr(record, name) for record in records]
        parts.append(np.asarray(values, dtype=dtype).tobytes())
    return b"".join(parts)


def _columns(mapped: mmap.mmap, num_chunks: int) -> dict[str, np.ndarray]:
    columns = {}
    offset = _HEADER.size
    for name, dtype, more in _COLUMNS:
        columns[name] = np.frombuffer(mapped, dtype=dtype, count=num_chunks + more, offset=offset)
        offset += columns[name].nbytes
    return columns
