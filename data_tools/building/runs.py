"""Sorted runs: tokenised documents in the corpus's order, on disk between reading and the shards that take them.

A run is a safetensors file of columns, one row a document, sorted by `order`. Knows columns and files; not what a
document is good for. Memory: a run while it is written, the documents asked for when it is read.
"""

import io
import json
import math
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.building.work import temporary_path

ORDER_RANGE = 1 << 64

# safetensors' names of the types that runs are made of.
_DTYPES = {"U8": "u1", "U16": "u2", "U32": "u4", "U64": "u8", "I32": "i4", "I64": "i8"}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Batch:
    """Some documents, one after the other, in any order.

    `tokens` are theirs in a row without end-of-text ids; document i ends at `token_ends[i]`. `columns` holds one more
    value (or row of values) for each document under any name.
    """

    keys: Sequence[bytes]
    order: np.ndarray  # uint64 [n]
    tokens: np.ndarray
    token_ends: np.ndarray  # int64 [n]
    columns: Mapping[str, np.ndarray]


def write_run(path: Path, batches: Sequence[Batch], dtype: np.dtype, end_of_text: int) -> None:
    """Sort the documents of `batches` by (order, key) and put them in the file `path`, all of it or nothing.

    Every document gets its end-of-text id here, and its tokens their final type.
    """
    keys = [key for batch in batches for key in batch.keys]
    order = np.concatenate([batch.order for batch in batches])
    rows = sorted_rows(order, keys)
    lengths = np.concatenate([np.diff(batch.token_ends, prepend=0) for batch in batches]) + 1
    token_ends = np.cumsum(lengths[rows])
    tokens = np.empty(int(token_ends[-1]), dtype=dtype)
    _place_tokens(tokens, batches, rows, token_ends)
    tokens[token_ends - 1] = end_of_text
    sorted_keys = [keys[row] for row in rows.tolist()]
    columns = {
        "order": order[rows],
        "key_ends": np.cumsum([len(key) for key in sorted_keys], dtype=np.int64),
        "keys": np.frombuffer(b"".join(sorted_keys), dtype=np.uint8),
        "token_ends": token_ends,
        "tokens": tokens,
    }
    for name in batches[0].columns:
        columns[name] = np.concatenate([batch.columns[name] for batch in batches])[rows]
    write_columns(path, columns)


def _place_tokens(out: np.ndarray, batches: Sequence[Batch], rows: np.ndarray, token_ends: np.ndarray) -> None:
    """Copy each document's tokens to where it stands in the sorted run."""
    place = np.empty(len(rows), dtype=np.int64)
    place[rows] = np.concatenate([[0], token_ends[:-1]])
    places = place.tolist()
    document = 0
    for batch in batches:
        tokens, start = batch.tokens, 0
        for end in batch.token_ends.tolist():
            at = places[document]
            out[at : at + end - start] = tokens[start:end]
            start = end
            document += 1


def sorted_rows(order: np.ndarray, keys: Sequence[bytes]) -> np.ndarray:
    """The permutation that sorts by `order`, and by key where two are equal."""
    rows = np.argsort(order, kind="stable")
    same = np.flatnonzero(order[rows[1:]] == order[rows[:-1]])
    if same.size:  # one pair in 2^64, or a key twice
        return np.array(sorted(rows.tolist(), key=lambda row: (int(order[row]), keys[row])), dtype=np.int64)
    return rows


def write_columns(path: Path, columns: Mapping[str, np.ndarray]) -> None:
    """A safetensors file that is there whole or not at all: the length of a JSON header (u64), the header, the data.

    Written here and not by the library, which says of a full disk only that something went wrong.
    """
    header, offset = {}, 0
    arrays = {name: np.ascontiguousarray(values) for name, values in columns.items()}
    for name, values in arrays.items():
        place = [offset, offset + values.nbytes]
        header[name] = {"dtype": _NAMES[values.dtype.str[1:]], "shape": values.shape, "data_offsets": place}
        offset += values.nbytes
    content = json.dumps(header).encode()
    content = content.ljust(-(-len(content) // 8) * 8)  # so that the data begin at a multiple of 8
    temporary = temporary_path(path)
    try:
        with temporary.open("wb", buffering=0) as file:
            _write_all(file, len(content).to_bytes(8, "little") + content)
            for values in arrays.values():
                if values.size:  # an empty array has no memory to view
                    _write_all(file, values.data.cast("B"))
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_all(file: io.FileIO, data: memoryview | bytes) -> None:
    view = memoryview(data)
    while len(view):
        view = view[file.write(view) :]


def map_columns(path: Path) -> dict[str, np.ndarray]:
    """The columns of a run, mapped: what is not looked at is not read."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data = 8 + int.from_bytes(mapped[:8], "little")
    columns = {}
    for name, entry in json.loads(mapped[8:data]).items():
        if name != "__metadata__":
            dtype = np.dtype("<" + _DTYPES[entry["dtype"]])
            count = math.prod(entry["shape"])
            flat = np.frombuffer(mapped, dtype, count, data + entry["data_offsets"][0]) if count else np.zeros(0, dtype)
            columns[name] = flat.reshape(entry["shape"])
    return columns


def read_columns(path: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Some columns of a run, mapped."""
    columns = map_columns(path)
    return {name: columns[name] for name in names}


@dataclass(frozen=True)
class RunRows:
    """Some documents of a run, in memory: nothing of the file is held open. Document i ends at `token_ends[i]`."""

    keys: list[bytes]
    tokens: np.ndarray
    token_ends: np.ndarray
    columns: dict[str, np.ndarray]


class RunSlice:
    """The rows of a run whose order is at least `low` and below `high`, mapped; `first_row` is where they begin."""

    def __init__(self, path: Path, low: int, high: int) -> None:
        self._run = map_columns(path)
        self.first_row = _place(self._run["order"], low)
        self._stop = max(self.first_row, _place(self._run["order"], high))

    def __len__(self) -> int:
        return self._stop - self.first_row

    def column(self, name: str) -> np.ndarray:
        """One value (or row of values) for each document of the slice."""
        return self._run[name][self.first_row : self._stop]

    def take(self, rows: np.ndarray, names: Sequence[str]) -> RunRows:
        """Documents of the slice by their rows in it, ascending, with the columns `names`: a copy."""
        run, rows = self._run, rows + self.first_row
        keys, key_ends = _gathered(run["keys"], run["key_ends"], rows)
        tokens, token_ends = _gathered(run["tokens"], run["token_ends"], rows)
        content, ends = keys.tobytes(), key_ends.tolist()
        return RunRows(
            keys=[content[start:end] for start, end in zip([0, *ends], ends, strict=False)],
            tokens=tokens,
            token_ends=token_ends,
            columns={name: run[name][rows] for name in names},
        )


def _gathered(values: np.ndarray, ends: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the values of these rows in a row, where each row's end). Rows that lie side by side are copied as one."""
    if not len(rows):
        return values[:0].copy(), np.zeros(0, dtype=np.int64)
    starts, stops = np.where(rows > 0, ends[rows - 1], 0), ends[rows]
    gaps = np.flatnonzero(starts[1:] != stops[:-1])
    firsts, lasts = starts[np.r_[0, gaps + 1]].tolist(), stops[np.r_[gaps, len(rows) - 1]].tolist()
    pieces = [values[first:last] for first, last in zip(firsts, lasts, strict=True)]
    return np.concatenate(pieces), np.cumsum(stops - starts)


def _place(order: np.ndarray, value: int) -> int:
    if value >= ORDER_RANGE:
        return len(order)
    return int(order.searchsorted(np.uint64(value), side="left"))
