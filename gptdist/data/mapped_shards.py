"""The shards of a split, mapped when first needed: opened, checked chunk by chunk, let go again.

Knows files, their sizes and digests; does not know windows. A chunk is checked before its first use, so that no damaged
token reaches training.
"""

import mmap
import os
from collections import OrderedDict
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from gptdist.data.chunk_index import ChunkIndex
from gptdist.data.digest import chunk_digest
from gptdist.data.fetch import FetchFailed
from gptdist.data.manifest import ShardInfo
from gptdist.data.store import Store
from gptdist.errors import CorpusError

# A mapped shard holds a file descriptor, and a process often has no more than 1,024.
MAX_OPEN_SHARDS = 256

REMEDY = "Copy the corpus again from where it came, or build it again; `gptdist data verify` lists all damage."
_NPY_MAGIC = b"\x93NUMPY\x01\x00"


class UnreadableShard(CorpusError):
    """A shard is missing, damaged, or cannot be fetched."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class MappedShard:
    """A shard as one array of tokens. `number`: counted in its split."""

    def __init__(self, number: int, info: ShardInfo, mapped: mmap.mmap, dtype: np.dtype) -> None:
        self.number = number
        self.info = info
        self.mapped = mapped
        self.flat = np.frombuffer(mapped, dtype=dtype, count=len(mapped) // dtype.itemsize)
        self._runs: tuple[int, np.ndarray] = (0, self.flat)

    def runs(self, length: int) -> np.ndarray:
        """Every run of `length` tokens, as a view: [positions, length]."""
        if self._runs[0] != length:
            self._runs = (length, sliding_window_view(self.flat, length))
        return self._runs[1]


class MappedShards:
    """Those of a split that were used last, at most MAX_OPEN_SHARDS. `lines`: all of them; `dtype`: of their tokens."""

    def __init__(self, store: Store, lines: Sequence[ShardInfo], dtype: np.dtype) -> None:
        self._store = store
        self._lines = lines
        self._dtype = dtype
        self._open: OrderedDict[int, MappedShard] = OrderedDict()

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def get(self, number: int) -> MappedShard:
        """The shard of this number. Raises UnreadableShard; IndexError where there are not so many."""
        shard = self._open.get(number)
        if shard is not None and (not self._store.wants_ahead or self._store.use(shard.info)):
            self._open.move_to_end(number)
            return shard
        if self._store.wants_ahead:  # room in the cache is free only when nobody maps the file any more
            for other in [other for other, mapped in self._open.items() if not self._store.holds(mapped.info)]:
                del self._open[other]
        shard = self._open[number] = self._map(number)
        if len(self._open) > MAX_OPEN_SHARDS:
            self._open.popitem(last=False)  # unmapped when the last array cut from it is gone
        return shard

    def place_of(self, chunk: int, index: ChunkIndex, verify: bool) -> int:
        """What makes a token's place in the split its place in the chunk's shard, counted in tokens.

        With `verify` the chunk is checked. Raises as `get`.
        """
        number = int(index.shard[chunk])
        try:
            return self._check(self.get(number), chunk, index, verify)
        except UnreadableShard:
            if number not in self._open or not self._store.refetch(self._lines[number]):
                raise
            # The copy in the cache went bad on this disk: once more from its source.
            self.drop(number)
            return self._check(self.get(number), chunk, index, verify)

    def drop(self, number: int) -> None:
        """Let go of a shard, if it is open."""
        self._open.pop(number, None)

    def close(self) -> None:
        """Let go of all."""
        self._open.clear()

    def _map(self, number: int) -> MappedShard:
        if number >= len(self._lines):
            raise IndexError(number)
        info = self._lines[number]
        where = self._store.shown(info.file)
        try:
            with self._open_file(info) as file:
                size = os.fstat(file.fileno()).st_size
                if size != info.bytes:
                    what = "truncated" if size < info.bytes else "not the file that was built"
                    raise UnreadableShard(
                        number, f"Shard {where} is {what}: {size:,} bytes, not {info.bytes:,}. {REMEDY}"
                    )
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FetchFailed as error:
            raise UnreadableShard(
                number,
                f"Shard {error} Put it back, or let the run go on without it: data.max_unreadable_shards.",
            ) from error.__cause__
        except OSError as error:
            raise UnreadableShard(number, f"Shard {where} cannot be read: {error.strerror}. {REMEDY}") from None
        return MappedShard(number, info, mapped, self._dtype)

    def _open_file(self, info: ShardInfo) -> BinaryIO:
        while True:
            path = self._store.path(info)
            try:
                return path.open("rb")
            except FileNotFoundError:
                # In a cache: evicted since the line above, for a rank that waited for room, or removed by hand.
                if not self._store.refetch(info):
                    raise

    def _check(self, shard: MappedShard, chunk: int, index: ChunkIndex, verify: bool) -> int:
        mapped, where = shard.mapped, self._store.shown(shard.info.file)
        first = int(index.sample_offset[chunk])
        end = index.sample_end(chunk, len(mapped))
        if verify:
            with memoryview(mapped) as view, view[first:end] as sample:
                digest = chunk_digest(sample)
            if digest != int(index.digest[chunk]):
                raise UnreadableShard(
                    shard.number,
                    f"Shard {where} is damaged: chunk {chunk} (bytes {first:,} to {end:,}) is not what was built. "
                    f"{REMEDY}",
                )
            # Little of a chunk is read soon again: let its pages go from this process's memory, not from the cache.
            page = first - first % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, page, end - page)
        count = int(index.token_start[chunk + 1] - index.token_start[chunk])
        data = npy_data_offset(mapped, int(index.tokens_offset[chunk]), self._dtype, count)
        itemsize = self._dtype.itemsize
        if data is None or data + count * itemsize > end or data % itemsize:
            raise UnreadableShard(
                shard.number,
                f"Shard {where} and the index disagree: chunk {chunk} should hold {count:,} tokens of {self._dtype}. "
                f"{REMEDY}",
            )
        return data // itemsize - int(index.token_start[chunk])


def npy_data_offset(buffer: mmap.mmap, offset: int, dtype: np.dtype, count: int) -> int | None:
    """Where the data of the npy array that begins at `offset` begins; None where it is not `count` items of `dtype`.

    Only the header is read, and compared as text, in our spelling or numpy's: a pickled array has another dtype and is
    refused. Not parsed, because the parser of CPython 3.11 can fail where two threads use it at once.
    """
    prefix = buffer[offset : offset + 10] if offset >= 0 else b""
    if prefix[:8] != _NPY_MAGIC:
        return None
    data = offset + 10 + int.from_bytes(prefix[8:10], "little")
    header = buffer[offset + 10 : data].decode("latin-1").strip().replace(", }", "}")
    return data if header == repr({"descr": dtype.str, "fortran_order": False, "shape": (count,)}) else None
