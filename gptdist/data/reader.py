"""The tokens of one split as windows, read from the memory-mapped shards.

Knows files and offsets; does not know in which order windows are wanted, nor which rank asks. Nothing is copied but the
window itself. A chunk is checked before its first use, so that no damaged token reaches training.
"""

import ast
import mmap
import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gptdist.data.chunk_index import ChunkIndex
from gptdist.data.digest import chunk_digest
from gptdist.data.manifest import Manifest
from gptdist.errors import CorpusError

# A mapped shard holds a file descriptor, and a process often has no more than 1,024.
MAX_OPEN_SHARDS = 256

_REMEDY = "Copy the corpus again from where it came, or build it again; `gptdist data verify` lists all damage."
_NPY_MAGIC = b"\x93NUMPY\x01\x00"


class _Shard:
    """A mapped shard and the token arrays already cut from it."""

    def __init__(self, mapped: mmap.mmap) -> None:
        self.mapped = mapped
        self.chunks: dict[int, np.ndarray] = {}


class TokenReader:
    """The token stream of a split, cut into windows of sequence_length + 1 tokens at stride sequence_length.

    Shards open when first needed; a wrong size is noticed then. With `verify`, each chunk's digest is checked the
    first time it is read. Raises CorpusError naming the shard. Not safe for two threads at once: give each its own
    reader.
    """

    def __init__(self, corpus_dir: Path, split: str, verify: bool = True) -> None:
        self.corpus_dir = Path(corpus_dir)
        self.split = split
        self.manifest = Manifest.load(self.corpus_dir)
        info = self.manifest.split(split)
        self.num_tokens = info.tokens
        self.index = ChunkIndex.open(self.corpus_dir / info.index.file, info.chunks, info.tokens, info.documents)
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._shard_infos = info.shards
        self._verify = verify
        self._checked = bytearray(len(self.index))
        self._shards: OrderedDict[int, _Shard] = OrderedDict()

    def num_windows(self, sequence_length: int) -> int:
        """How many windows there are. Raises CorpusError where there is not even one."""
        if sequence_length < 1:
            raise ValueError(f"sequence_length is {sequence_length}; a window predicts at least 1 token")
        windows = (self.num_tokens - 1) // sequence_length
        if windows < 1:
            more = (
                "build the corpus with a larger --validation-fraction or with --validation sources"
                if self.split == "validation"
                else "build a corpus from more text"
            )
            raise CorpusError(
                f"The {self.split} split of {self.corpus_dir} holds {self.num_tokens} tokens; one window of "
                f"sequence length {sequence_length} needs {sequence_length + 1}. Set model.sequence_length to at most "
                f"{max(self.num_tokens - 1, 0)}, or {more}."
            )
        return windows

    def window(self, index: int, sequence_length: int, out: np.ndarray | None = None) -> np.ndarray:
        """Tokens index x sequence_length to (index + 1) x sequence_length inclusive: int64 [sequence_length + 1].

        Written into `out` where given.
        """
        length = sequence_length + 1
        token = index * sequence_length
        if index < 0 or token + length > self.num_tokens:
            raise IndexError(f"window {index} of {(self.num_tokens - 1) // sequence_length} in the {self.split} split")
        if out is None:
            out = np.empty(length, dtype=np.int64)
        chunk = self.index.chunk_of(token)
        skip = token - int(self.index.token_start[chunk])
        filled = 0
        while filled < length:
            piece = self.chunk_tokens(chunk)[skip : skip + length - filled]
            if not len(piece):  # only an index out of order leads here
                raise CorpusError(f"The index of the {self.split} split of {self.corpus_dir} is damaged. {_REMEDY}")
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
            chunk, skip = chunk + 1, 0
        return out

    def chunk_tokens(self, chunk: int) -> np.ndarray:
        """The tokens of a chunk, a read-only view of the mapped shard in the corpus's dtype."""
        number = int(self.index.shard[chunk])
        shard = self._shard(number)
        tokens = shard.chunks.get(chunk)
        if tokens is None:
            tokens = shard.chunks[chunk] = self._open_chunk(chunk, number, shard.mapped)
        return tokens

    def chunks(self) -> Iterator[np.ndarray]:
        """Every chunk's tokens, in the order of the split."""
        return (self.chunk_tokens(chunk) for chunk in range(len(self.index)))

    def _shard(self, number: int) -> _Shard:
        shard = self._shards.get(number)
        if shard is None:
            shard = self._shards[number] = _Shard(self._map_shard(number))
            if len(self._shards) > MAX_OPEN_SHARDS:
                self._shards.popitem(last=False)  # unmapped when the last array cut from it is gone
        else:
            self._shards.move_to_end(number)
        return shard

    def _map_shard(self, number: int) -> mmap.mmap:
        if number >= len(self._shard_infos):
            raise CorpusError(f"The index of the {self.split} split of {self.corpus_dir} is damaged. {_REMEDY}")
        info = self._shard_infos[number]
        path = self.corpus_dir / info.file
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != info.bytes:
                    what = "truncated" if size < info.bytes else "not the file that was built"
                    raise CorpusError(f"Shard {path} is {what}: {size:,} bytes, not {info.bytes:,}. {_REMEDY}")
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise CorpusError(f"Shard {path} cannot be read: {error.strerror}. {_REMEDY}") from None

    def _open_chunk(self, chunk: int, number: int, mapped: mmap.mmap) -> np.ndarray:
        path = self.corpus_dir / self._shard_infos[number].file
        first = int(self.index.sample_offset[chunk])
        end = self.index.sample_end(chunk, len(mapped))
        if self._verify and not self._checked[chunk]:
            with memoryview(mapped) as view, view[first:end] as sample:
                if chunk_digest(sample) != int(self.index.digest[chunk]):
                    raise CorpusError(
                        f"Shard {path} is damaged: chunk {chunk} (bytes {first:,} to {end:,}) is not what was "
                        f"built. {_REMEDY}"
                    )
            self._checked[chunk] = 1
        count = int(self.index.token_start[chunk + 1] - self.index.token_start[chunk])
        data = npy_data_offset(mapped, int(self.index.tokens_offset[chunk]), self._dtype, count)
        if data is None or data + count * self._dtype.itemsize > end:
            raise CorpusError(
                f"Shard {path} and the index disagree: chunk {chunk} should hold {count:,} tokens of {self._dtype}. "
                f"{_REMEDY}"
            )
        return np.frombuffer(mapped, dtype=self._dtype, count=count, offset=data)


def npy_data_offset(buffer: mmap.mmap, offset: int, dtype: np.dtype, count: int) -> int | None:
    """Where the data of the npy array that begins at `offset` begins; None where it is not `count` items of `dtype`.

    Only the header is read, as a literal: a pickled array has another dtype and is refused.
    """
    prefix = buffer[offset : offset + 10] if offset >= 0 else b""
    if prefix[:8] != _NPY_MAGIC:
        return None
    data = offset + 10 + int.from_bytes(prefix[8:10], "little")
    try:
        header = ast.literal_eval(buffer[offset + 10 : data].decode("latin-1"))
        expected = {"descr": dtype.str, "fortran_order": False, "shape": (count,)}
    except (SyntaxError, ValueError):
        return None
    return data if header == expected else None
