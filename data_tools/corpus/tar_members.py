"""What lies in a shard, read strictly and without extracting: members, chunks, and the arrays of a chunk.

Takes only what `shards.py` writes, so that a tar from elsewhere can neither hide a file, nor name one outside, nor
bring a pickle. Headers are parsed by the standard library's `tarfile`, one block at a time: no header can change the
meaning of another. Knows no index and no manifest.
"""

import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, NoReturn

import numpy as np

from gptdist.errors import CorpusError

KINDS = ("docs.npy", "json", "tokens.npy")

_BLOCK = tarfile.BLOCKSIZE
_NAME = re.compile(r"([A-Za-z0-9_-]+)\.(docs\.npy|json|tokens\.npy)")
# More than any chunk's list of names comes to; a parser takes several times the memory of what it reads.
_MOST_JSON_BYTES = 1 << 28
_READ_BYTES = 1 << 20
_TYPES = {
    tarfile.LNKTYPE: "a hard link",
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.DIRTYPE: "a folder",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
    tarfile.GNUTYPE_LONGNAME: "a GNU header for a long name",
    tarfile.GNUTYPE_LONGLINK: "a GNU header for a long link",
    tarfile.XHDTYPE: "a pax header, which may change names and sizes",
    tarfile.XGLTYPE: "a pax header, which may change names and sizes",
    tarfile.SOLARIS_XHDTYPE: "a pax header, which may change names and sizes",
}


class TarMember(NamedTuple):
    """`KEY.KIND`. Bytes from the start of the shard: of its header, and of its content."""

    key: str
    kind: str
    offset: int
    data_offset: int
    size: int


class TarChunk(NamedTuple):
    """The three members of a chunk, and where its bytes end: at the next chunk, or with the shard."""

    docs: TarMember
    keys: TarMember
    tokens: TarMember
    end: int


@dataclass(frozen=True)
class ChunkContent:
    """The document ends (int64) and keys of a chunk, and its tokens (little-endian, unsigned)."""

    ends: np.ndarray
    keys: list[str]
    tokens: np.ndarray


class ShardFile:
    """An open shard. Read and not mapped: where a disk fails, that is an error and not the end of the process.

    Everything raises CorpusError with the shard's name and the place in it; memory holds one chunk at a time.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb")
            self.bytes = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise CorpusError(f"Shard {path} cannot be read: {error.strerror}.") from None

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, fewer where the shard ends before."""
        try:
            self._file.seek(start)
            return self._file.read(max(0, end - start))
        except OSError as error:
            raise CorpusError(f"Shard {self.path} cannot be read at byte {start:,}: {error.strerror}.") from None

    def members(self, offset: int = 0) -> Iterator[TarMember]:
        """Every member from byte `offset` on, in the order of the tar; what is not one of ours is refused."""
        names: set[str] = set()
        while any(block := self.read(offset, offset + _BLOCK)):
            member = self._member(block, offset)
            name = f"{member.key}.{member.kind}"
            if name in names:
                self._refuse(offset, f"member {name} is there twice")
            names.add(name)
            yield member
            offset = member.data_offset + _padded(member.size)
        self._check_end(offset)

    def chunks(self, offset: int = 0) -> Iterator[TarChunk]:
        """Every chunk from byte `offset` on, in the order of the tar."""
        waiting: list[TarMember] = []
        for member in self.members(offset):
            if len(waiting) == len(KINDS):
                yield TarChunk(waiting[0], waiting[1], waiting[2], member.offset)
                waiting = []
            kind = KINDS[len(waiting)]
            if member.kind != kind or (waiting and member.key != waiting[0].key):
                expected = f"{waiting[0].key if waiting else 'KEY'}.{kind}"
                self._refuse(member.offset, f"{member.key}.{member.kind} stands where {expected} should")
            waiting.append(member)
        if waiting and len(waiting) < len(KINDS):
            self._refuse(waiting[-1].offset, f"chunk {waiting[0].key} has no {KINDS[len(waiting)]}")
        if waiting:
            yield TarChunk(waiting[0], waiting[1], waiting[2], self.bytes)

    def content(self, chunk: TarChunk) -> ChunkContent:
        """The arrays of a chunk. A pickled array is refused by its header, and nothing is unpickled."""
        ends = self._array(chunk.docs, (np.dtype("<i8"),))
        tokens = self._array(chunk.tokens, (np.dtype("<u2"), np.dtype("<u4")))
        return ChunkContent(ends, self._keys(chunk.keys), tokens)

    def _member(self, block: bytes, offset: int) -> TarMember:
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            self._refuse(offset, f"there is no tar header ({error})")
        if header.type != tarfile.REGTYPE or header.linkname:
            self._refuse(offset, f"member {header.name!r} is {_TYPES.get(header.type, 'not a plain file')}")
        named = _NAME.fullmatch(header.name)
        if not named:
            rule = ", ".join(f"KEY.{kind}" for kind in KINDS)
            self._refuse(offset, f"member {header.name!r} is none of {rule}")
        data = offset + _BLOCK
        if header.size < 0 or data + _padded(header.size) > self.bytes:
            self._refuse(offset, f"member {header.name} of {header.size:,} bytes ends beyond the shard")
        if any(self.read(data + header.size, data + _padded(header.size))):
            self._refuse(data + header.size, f"there are bytes between {header.name} and the next member")
        return TarMember(named[1], named[2], offset, data, header.size)

    def _check_end(self, offset: int) -> None:
        if offset + 2 * _BLOCK > self.bytes:
            self._refuse(min(offset, self.bytes), "the tar has no end; it was cut off")
        while block := self.read(offset, offset + _READ_BYTES):
            if any(block):
                self._refuse(offset, "there are bytes after the end of the tar")
            offset += len(block)

    def _array(self, member: TarMember, dtypes: tuple[np.dtype, ...]) -> np.ndarray:
        content = self.read(member.data_offset, member.data_offset + member.size)
        place, name = member.data_offset, f"{member.key}.{member.kind}"
        try:
            stream = io.BytesIO(content[:_READ_BYTES])
            if np.lib.format.read_magic(stream) != (1, 0):
                raise ValueError("the npy format is not version 1.0")
            shape, by_column, dtype = np.lib.format.read_array_header_1_0(stream)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            self._refuse(place, f"{name} is not an array: {str(error).splitlines()[0]}")
        if dtype.hasobject:
            self._refuse(place, f"{name} is a pickled array, which is never read")
        if dtype not in dtypes or len(shape) != 1 or by_column:
            self._refuse(place, f"{name} holds {dtype.str} {shape}, not a row of {' or '.join(d.str for d in dtypes)}")
        if stream.tell() + shape[0] * dtype.itemsize != len(content):
            self._refuse(place, f"{name} has {len(content):,} bytes; {shape[0]:,} of {dtype.str} need another number")
        return np.frombuffer(content, dtype=dtype, offset=stream.tell())

    def _keys(self, member: TarMember) -> list[str]:
        name = f"{member.key}.{member.kind}"
        if member.size > _MOST_JSON_BYTES:
            self._refuse(member.offset, f"{name} has {member.size:,} bytes; at most {_MOST_JSON_BYTES:,} are read")
        try:
            keys = json.loads(self.read(member.data_offset, member.data_offset + member.size))["documents"]
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                raise ValueError("`documents` is not a list of names")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._refuse(member.data_offset, f"{name} does not list the chunk's documents: {error}")
        return keys

    def _refuse(self, offset: int, what: str) -> NoReturn:
        raise CorpusError(f"Shard {self.path}, byte {offset:,}: {what}.")


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK
