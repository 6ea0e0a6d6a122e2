"""One safetensors file of fragments: written in a stream and hashed on the way; read by memory map.

Knows the safetensors format and torch's memory. Must not know manifests, ranks or what the tensors mean. A file says
by itself which box of which logical tensor each of its tensors is (in its metadata); any safetensors reader opens it.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gptdist.checkpoint.logical import Box, Shape, render_box

# torch's name -> safetensors' name (its README, "Format").
DTYPES = {
    "float64": "F64",
    "int64": "I64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
_CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Fragment:
    """`data` is `box` of the logical tensor `name`, whose whole shape is `shape`. A view will do, on any device."""

    name: str
    shape: Shape
    box: Box
    data: torch.Tensor

    @cached_property
    def key(self) -> str:
        """Its name inside a file: the logical name, with the box where that is not the whole."""
        return self.name if self.box == Box.whole(self.shape) else self.name + render_box(self.box)


@dataclass(frozen=True)
class Written:
    """What came of writing a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class StoredFragment:
    """A fragment that a file says it holds."""

    key: str
    name: str
    shape: Shape
    dtype: str
    box: Box


def check_fragments(fragments: Sequence[Fragment]) -> None:
    """Raises ValueError for fragments that contradict themselves: a mistake in the calling code, not the user's."""
    keys = set()
    for fragment in fragments:
        if tuple(fragment.data.shape) != fragment.box.shape or not Box.whole(fragment.shape).contains(fragment.box):
            raise ValueError(
                f"fragment {fragment.key} of a tensor of shape {fragment.shape} has data of shape "
                f"{tuple(fragment.data.shape)}"
            )
        if dtype_name(fragment.data.dtype) not in DTYPES:
            raise ValueError(f"fragment {fragment.key} has dtype {fragment.data.dtype}; can store {', '.join(DTYPES)}")
        if fragment.name == "__metadata__":
            raise ValueError("a tensor cannot be named __metadata__: safetensors keeps that name for itself")
        if fragment.key in keys:
            raise ValueError(f"fragment {fragment.key} is given twice")
        keys.add(fragment.key)


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def file_header(fragments: Sequence[Fragment]) -> tuple[bytes, list[Fragment]]:
    """The header of the file of these fragments, and the order their bytes follow it in.

    Wide elements go first, so that every tensor is aligned to its element size in the memory map.
    """
    ordered = sorted(fragments, key=lambda fragment: -fragment.data.element_size())
    table: dict[str, Any] = {}
    origins = {}
    offset = 0
    for fragment in ordered:
        after = offset + fragment.data.numel() * fragment.data.element_size()
        table[fragment.key] = {
            "dtype": DTYPES[dtype_name(fragment.data.dtype)],
            "shape": fragment.box.shape,
            "data_offsets": [offset, after],
        }
        origins[fragment.key] = [fragment.name, fragment.shape, fragment.box.start]
        offset = after
    table["__metadata__"] = {"format": "pt", "fragments": json.dumps(origins)}
    text = json.dumps(table).encode()
    text += b" " * (-(8 + len(text)) % 64)
    return len(text).to_bytes(8, "little") + text, ordered


def file_size(fragments: Sequence[Fragment]) -> int:
    """Bytes that the file of these fragments will have."""
    return len(file_header(fragments)[0]) + sum(part.data.numel() * part.data.element_size() for part in fragments)


def write_tensor_file(path: Path, fragments: Sequence[Fragment]) -> Written:
    """Write and fsync a new file. Holds at most one chunk of copies at a time. Raises OSError."""
    header, ordered = file_header(fragments)
    digest = hashlib.sha256()
    size = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for chunk in _chunks(header, ordered):
            digest.update(chunk)
            size += len(chunk)
            write_all(descriptor, chunk)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Written(size, digest.hexdigest())


def write_all(descriptor: int, content: memoryview) -> None:
    """os.write until all is written: one call may write less."""
    while content:
        content = content[os.write(descriptor, content) :]


def read_stored_fragments(path: Path) -> list[StoredFragment]:
    """What the file says it holds, from its header alone. Raises ValueError for a file of another writer."""
    try:
        with safe_open(path, "pt") as file:
            origins = json.loads((file.metadata() or {})["fragments"])
            stored = []
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name, shape, start = origins[key]
                part = file.get_slice(key)
                box = Box.whole(part.get_shape()).shift(start)
                stored.append(StoredFragment(key, name, tuple(shape), _torch_name(part.get_dtype()), box))
            return stored
    except (SafetensorError, KeyError, TypeError) as error:
        raise ValueError(f"not a file of fragments: {error}") from error


class TensorFile:
    """An open, memory-mapped file of fragments."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError or OSError where it is no safetensors file."""
        try:
            self._file = safe_open(path, "pt")
            self._handle = self._file.__enter__()
        except SafetensorError as error:
            raise ValueError(f"not a safetensors file: {error}") from error

    def copy_into(self, out: torch.Tensor, key: str, fragment: Box, dtype: str, wanted: Box) -> None:
        """Fill `out` with the part `wanted` of tensor `key`, which holds the box `fragment`. Raises ValueError."""
        try:
            part = self._handle.get_slice(key)
            if tuple(part.get_shape()) != fragment.shape or part.get_dtype() != DTYPES.get(dtype):
                raise ValueError(
                    f"tensor {key} is {part.get_dtype()} {part.get_shape()}, "
                    f"the manifest says {dtype} {list(fragment.shape)}"
                )
            # A scalar has no slices; all of a tensor is read without a strided copy.
            whole = wanted == fragment
            out.copy_(self._handle.get_tensor(key) if whole else part[wanted.slices(fragment.start)])
        except SafetensorError as error:
            raise ValueError(f"cannot read tensor {key}: {error}") from error

    def close(self) -> None:
        """Let go of the memory map."""
        self._file.__exit__(None, None, None)


def _torch_name(dtype: str) -> str:
    for name, stored in DTYPES.items():
        if stored == dtype:
            return name
    raise ValueError(f"dtype {dtype} is not one of {', '.join(DTYPES.values())}")


def _chunks(header: bytes, fragments: Sequence[Fragment]) -> Iterator[memoryview]:
    yield memoryview(header)
    for fragment in fragments:
        yield from _byte_chunks(fragment.data.detach())


def _byte_chunks(data: torch.Tensor) -> Iterator[memoryview]:
    """A tensor's bytes, row-major; copies only what is strided or on a device, some rows at a time."""
    if not data.numel():
        return
    if data.device.type == "cpu" and data.is_contiguous():
        flat = _bytes_of(data)
        for start in range(0, len(flat), _CHUNK_BYTES):
            yield flat[start : start + _CHUNK_BYTES]
        return
    rows = data.reshape(1) if data.ndim == 0 else data
    rows_per_chunk = max(1, _CHUNK_BYTES * len(rows) // (data.numel() * data.element_size()))
    for first in range(0, len(rows), rows_per_chunk):
        yield _bytes_of(rows[first : first + rows_per_chunk].cpu().contiguous())


def _bytes_of(data: torch.Tensor) -> memoryview:
    return data.reshape(-1).view(torch.uint8).numpy().data
