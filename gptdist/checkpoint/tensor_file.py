"""One safetensors file of fragments: written in a stream that is hashed on the way; read by memory map.

Knows the safetensors format. Must not know torch, manifests, ranks or what the tensors mean. A file says by itself
which box of which logical tensor each of its tensors is (in its metadata); any safetensors reader opens it.
"""

import hashlib
import json
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gptdist.checkpoint.digest import add_digests, partial_digest
from gptdist.checkpoint.folder import FILE_MODE
from gptdist.checkpoint.fragment import DTYPES, FragmentPlace, HostFragment, numpy_dtype
from gptdist.checkpoint.logical import Box, cut_in_order, flat_start

_CHUNK_BYTES = 4 << 20
_CHUNKS_AHEAD = 4  # written, but not yet hashed
_MAPPED_BYTES = 8 << 20  # about how much of a mapped file counts as memory of this process
_LONGEST_HEADER = 100_000_000  # safetensors' own limit
_NAMES = {stored: name for name, stored in DTYPES.items()}
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Written:
    """What came of writing a file. `digests`: what its fragments add to the digest of each logical tensor."""

    bytes: int
    sha256: str
    digests: dict[str, int]


ReadPart = Callable[[FragmentPlace, Box], np.ndarray]
OnPhase = Callable[[str], None]


def no_phase(phase: str) -> None:
    """For whoever need not know how far writing is."""


def write_tensor_file(path: Path, fragments: Sequence[HostFragment], on_phase: OnPhase = no_phase) -> Written:
    """Write and fsync a new file. Raises OSError. `on_phase` hears `file` and `sync` before each begins."""
    by_key = {fragment.key: fragment.data for fragment in fragments}

    def read(place: FragmentPlace, part: Box) -> np.ndarray:
        return by_key[place.key][part.slices(place.box.start)]

    return write_tensor_stream(path, fragments, read, on_phase)


def write_tensor_stream(
    path: Path, places: Sequence[FragmentPlace], read: ReadPart, on_phase: OnPhase = no_phase, *, plain: bool = False
) -> Written:
    """As `write_tensor_file`, of elements that `read` brings a few megabytes at a time and must not change after.

    `plain`: a file for others, which says nothing of fragments.
    """
    header, ordered = file_header(places, plain=plain)
    content = _Digester()
    size = 0
    on_phase("file")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        with content:
            for chunk, parts in _chunks(header, ordered, read):
                content.add(chunk, parts)
                write_all(descriptor, chunk)
                size += len(chunk)
        on_phase("sync")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(size, content.sha256, content.digests)


def write_all(descriptor: int, content: memoryview) -> None:
    """os.write until all is written: one call may write less."""
    while content:
        content = content[os.write(descriptor, content) :]


def file_header(places: Iterable[FragmentPlace], *, plain: bool = False) -> tuple[bytes, list[FragmentPlace]]:
    """The header of the file of these fragments, and the order their bytes follow it in.

    Wide elements go first, so that every tensor is aligned to its element size in the memory map.
    """
    ordered = sorted(places, key=lambda place: -numpy_dtype(place.dtype).itemsize)
    table: dict[str, Any] = {}
    origins = {}
    offset = 0
    for place in ordered:
        after = offset + place.bytes
        table[place.key] = {
            "dtype": DTYPES[place.dtype],
            "shape": place.box.shape,
            "data_offsets": [offset, after],
        }
        origins[place.key] = [place.name, place.shape, place.box.start]
        offset = after
    table[_METADATA] = {"format": "pt"} | ({} if plain else {"fragments": json.dumps(origins)})
    text = json.dumps(table).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text, ordered


def file_size(places: Sequence[FragmentPlace]) -> int:
    """Bytes that the file of these fragments will have."""
    return len(file_header(places)[0]) + sum(place.bytes for place in places)


def read_fragment_places(path: Path) -> list[FragmentPlace]:
    """What the file says it holds, from its header alone. Raises ValueError for a file of another writer."""
    with TensorFile(path) as file:
        return file.fragment_places()


@dataclass(frozen=True)
class _Entry:
    dtype: str
    shape: tuple[int, ...]
    start: int  # in the file
    stop: int


class TensorFile:
    """An open safetensors file: what lies together is read, strided parts are copied out of a memory map.

    What it says about itself is believed only as far as its size allows. Threads may share it.
    """

    _descriptor = -1

    def __init__(self, path: Path) -> None:
        """Raises ValueError or OSError where it is no safetensors file."""
        self._map: mmap.mmap | None = None
        self._mapped_bytes = 0  # read through the map since it was last let go
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._entries, self._metadata = _read_header(self._descriptor)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"not a safetensors file: {error}") from None

    def fragment_places(self) -> list[FragmentPlace]:
        """Which fragments its tensors are. Raises ValueError for a file of another writer."""
        try:
            origins = json.loads(self._metadata["fragments"])
            places = []
            for key, entry in self._entries.items():
                name, shape, start = origins[key]
                box = Box.whole(entry.shape).shift(start)
                places.append(FragmentPlace(name, tuple(shape), box, entry.dtype))
            return places
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"not a file of fragments: {error}") from None

    def copy_into(self, out: np.ndarray, key: str, fragment: Box, dtype: str, wanted: Box) -> None:
        """Fill `out` with the part `wanted` of tensor `key`, which holds the box `fragment`. Raises ValueError."""
        entry = self._entries.get(key)
        if entry is None:
            raise ValueError(f"it has no tensor {key}, which the manifest says it has")
        if (entry.shape, entry.dtype) != (fragment.shape, dtype):
            raise ValueError(
                f"tensor {key} is {DTYPES[entry.dtype]} {list(entry.shape)}, "
                f"the manifest says {dtype} {list(fragment.shape)}"
            )
        if not out.size:
            return
        start = flat_start(fragment, wanted)
        if start is not None and out.flags.c_contiguous:
            self._read(out.reshape(-1).view(np.uint8).data, entry.start + start * out.itemsize)
        else:
            self._copy_mapped(out, entry, wanted.slices(fragment.start))

    def _read(self, out: memoryview, offset: int) -> None:
        while out:
            count = os.preadv(self._descriptor, [out], offset)
            if not count:
                raise ValueError("the file became shorter while it was read")
            out, offset = out[count:], offset + count

    def _copy_mapped(self, out: np.ndarray, entry: _Entry, place: tuple[slice, ...]) -> None:
        if self._map is None:
            self._map = mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)
        stored = np.frombuffer(self._map, out.dtype, prod(entry.shape), entry.start).reshape(entry.shape)[place]
        for box in cut_in_order(Box.whole(out.shape), max(1, _MAPPED_BYTES // out.itemsize)):
            out[box.slices()] = stored[box.slices()]
            self._mapped_bytes += box.size * out.itemsize
            if self._mapped_bytes >= _MAPPED_BYTES:
                # What was mapped once would else count as this process's memory for good.
                self._map.madvise(mmap.MADV_DONTNEED)
                self._mapped_bytes = 0

    def close(self) -> None:
        """Let go of the file. Also what happens to one that nobody holds any more."""
        if self._descriptor < 0:
            return
        if self._map is not None:
            with suppress(BufferError):  # an error on its way up still holds an array over it
                self._map.close()
        os.close(self._descriptor)
        self._descriptor = -1

    __del__ = close

    def __enter__(self) -> "TensorFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _read_header(descriptor: int) -> tuple[dict[str, _Entry], dict[str, str]]:
    """Raises ValueError and what wrong JSON leads to."""
    size = os.fstat(descriptor).st_size
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise ValueError("its header is longer than the file, or than any header may be")
    table = json.loads(os.pread(descriptor, length, 8))
    metadata = table.pop(_METADATA, {})
    entries = {}
    for key, value in table.items():
        dtype = _NAMES.get(value["dtype"])
        if dtype is None:
            raise ValueError(f"tensor {key} has dtype {value['dtype']!r}; can read {', '.join(_NAMES)}")
        start, stop = (_count(offset) + 8 + length for offset in value["data_offsets"])
        entries[key] = _Entry(dtype, tuple(map(_count, value["shape"])), start, stop)
    after = 8 + length
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        bytes_told = Box.whole(entry.shape).size * numpy_dtype(entry.dtype).itemsize
        if entry.start != after or entry.stop - entry.start != bytes_told:
            raise ValueError(f"the bytes of tensor {key} are not where they must be")
        after = entry.stop
    if after != size:
        raise ValueError(f"its tensors end at byte {after}, the file at {size}")
    return entries, metadata


def _count(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value


_Part = tuple[FragmentPlace, Box, np.ndarray]


def _chunks(header: bytes, places: Sequence[FragmentPlace], read: ReadPart) -> Iterator[tuple[memoryview, list[_Part]]]:
    """The file's bytes in order, some megabytes at a time, and the parts of fragments they are."""
    waiting: list[Any] = [header]
    parts: list[_Part] = []
    size = 0
    for place in places:
        for box in cut_in_order(place.box, max(1, _CHUNK_BYTES // numpy_dtype(place.dtype).itemsize)):
            data = np.ascontiguousarray(read(place, box)).reshape(box.shape)  # the former makes rows of scalars
            content = data.reshape(-1).view(np.uint8).data
            if waiting and size + len(content) > _CHUNK_BYTES:
                yield _joined(waiting), parts
                waiting, parts, size = [], [], 0
            waiting.append(content)
            parts.append((place, box, data))
            size += len(content)
    if waiting:
        yield _joined(waiting), parts


def _joined(pieces: list[Any]) -> memoryview:
    """Small ones are copied together: fewer, larger writes."""
    return memoryview(pieces[0] if len(pieces) == 1 else b"".join(pieces))


class _Digester:
    """Hashes what is written on threads of its own, a few chunks behind: hashing and writing both leave Python alone.

    sha256 goes in order; digests of tensors add up. `sha256` and `digests` are whole once the `with` is over.
    """

    def __init__(self) -> None:
        self.sha256 = ""
        self.digests: dict[str, int] = {}
        self._sha256 = hashlib.sha256()
        self._pending: deque[Future[None]] = deque()
        self._threads = ExitStack()

    def __enter__(self) -> None:
        self._hashing, self._adding = (self._threads.enter_context(ThreadPoolExecutor(1)) for _ in range(2))

    def __exit__(self, *exception: object) -> None:
        self._threads.close()
        if exception[0] is None:
            self._wait(0)
            self.sha256 = self._sha256.hexdigest()

    def add(self, chunk: memoryview, parts: list[_Part]) -> None:
        """Waits where too much is pending, so that memory stays bounded."""
        self._wait(2 * _CHUNKS_AHEAD)
        self._pending += (self._hashing.submit(self._sha256.update, chunk), self._adding.submit(self._digest, parts))

    def _digest(self, parts: list[_Part]) -> None:
        for place, box, data in parts:
            earlier = self.digests.get(place.name, 0)
            self.digests[place.name] = add_digests((earlier, partial_digest(data, box, place.shape)))

    def _wait(self, most: int) -> None:
        while len(self._pending) > most:
            self._pending.popleft().result()
