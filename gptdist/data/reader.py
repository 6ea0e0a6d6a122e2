"""The tokens of one split as windows, read from the memory-mapped shards.

Knows offsets; does not know in which order windows are wanted, nor which rank asks. Nothing is copied but the window
itself. The files are in `mapped_shards.py`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gptdist.data.chunk_index import ChunkIndex
from gptdist.data.manifest import Manifest
from gptdist.data.mapped_shards import REMEDY, MappedShards, UnreadableShard
from gptdist.data.store import Store, open_store
from gptdist.errors import CorpusError

# Tokens gathered by one call of numpy: the narrow copy that it makes of them, and what it becomes, stay in the
# processor's cache. Up to twice as many (64 rows of 2,049) are not worth a second call.
_TOKENS_AT_ONCE = 66_000
# Fewer rows of a shard are copied one by one.
_FEW_ROWS = 4


class LostShard(NamedTuple):
    """A shard that is passed over, and why. Plain data: ranks tell it each other."""

    corpus: str
    number: int
    message: str


class TokenReader:
    """The token stream of a split, cut into windows of sequence_length + 1 tokens at stride sequence_length.

    `corpus` is a folder or a URL; with `store`, that is used, and stays the caller's to close. Shards open when first
    needed; a wrong size is noticed then. With `verify`, each chunk's digest is checked the first time it is read.
    Raises CorpusError naming the shard. Up to `max_unreadable_shards` of the store's settings are passed over instead:
    for a window that touches one, the next window that touches none is served. Not safe for two threads at once: give
    each its own reader.
    """

    def __init__(self, corpus: Path | str, split: str, verify: bool = True, store: Store | None = None) -> None:
        self.split = split
        self.store = store or open_store(corpus)
        self._owns_store = store is None
        self.corpus = self.store.name
        self.manifest = Manifest.load(self.store)
        info = self.manifest.split(split)
        self.num_tokens = info.tokens
        self.replaced_windows = 0
        self._lines = info.shard_lines
        self._index_bytes = info.index.bytes
        self._largest_bytes = self._lines.largest_bytes() if self.store.wants_ahead else 0
        if self.store.wants_ahead:
            self.store.check_room(
                self._index_bytes + self._largest_bytes, f"the index of the {split} split and its largest shard"
            )
        index_path = self.store.path(info.index, keep=True)
        self.index = ChunkIndex.open(index_path, info.chunks, info.tokens, info.documents)
        self._dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._verify = verify
        if len(self.index) and self.index.token_start[0]:
            raise self._damaged_index()
        self._one_shard = len(self._lines) == 1
        self._chunk_ends = self.index.token_start[1:]
        # For each chunk what makes a token's place in the split its place in the shard, counted in tokens. 0: not yet
        # looked at (or, once in a great while, really 0: then it is looked at each time). The system gives memory only
        # to the pages that are written.
        self._shifts = np.zeros(len(self.index), dtype=np.int64)
        # For each chunk that a window of _limits_for tokens was read from: where, in the split, windows begin to reach
        # beyond it. 0: none was.
        self._limits_for = 0
        self._limits = self._shifts
        self._shards = MappedShards(self.store, self._lines, self._dtype)
        self._unreadable: dict[int, str] = {}

    @property
    def wants_ahead(self) -> bool:
        """Whether `fetch_ahead` is of use."""
        return self.store.wants_ahead

    @property
    def lost(self) -> tuple[LostShard, ...]:
        """The shards that are passed over because they cannot be read, by number."""
        return tuple(LostShard(self.corpus, number, text) for number, text in sorted(self._unreadable.items()))

    def lose(self, number: int, message: str) -> None:
        """Pass over a shard that another rank cannot read, so that both serve the same windows."""
        self._shards.drop(number)
        self._unreadable[number] = message

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
                f"The {self.split} split of {self.corpus} holds {self.num_tokens} tokens; one window of "
                f"sequence length {sequence_length} needs {sequence_length + 1}. Set model.sequence_length to at most "
                f"{max(self.num_tokens - 1, 0)}, or {more}."
            )
        return windows

    def window(self, index: int, sequence_length: int, out: np.ndarray | None = None) -> np.ndarray:
        """Tokens index x sequence_length to (index + 1) x sequence_length inclusive: int64 [sequence_length + 1].

        Written into `out` where given.
        """
        if out is None:
            out = np.empty(sequence_length + 1, dtype=np.int64)
        self.windows([index], sequence_length, out[None])
        return out

    def windows(self, indices: Sequence[int] | np.ndarray, sequence_length: int, out: np.ndarray) -> np.ndarray:
        """Many windows, into the rows of `out`: int64 [len(indices), sequence_length + 1], which is returned."""
        # After each batch the processor's caches are cold, and a call of numpy costs as much as half a row. So there
        # are few calls for all windows but those that cross chunks.
        wanted = np.asarray(indices, dtype=np.int64)
        count, length = len(wanted), sequence_length + 1
        if not count:
            return out
        if np.maximum.reduce(wanted.view(np.uint64)) >= (self.num_tokens - 1) // sequence_length:
            raise self._no_such_window(wanted, sequence_length)  # below 0 is far above
        if out.shape != (count, length):
            raise ValueError(f"out is {out.shape}, not {(count, length)}")
        if length != self._limits_for:
            self._limits_for, self._limits = length, np.zeros(len(self.index), dtype=np.int64)
        while True:
            served = self._readable(wanted, sequence_length) if self._unreadable else wanted
            try:
                if self.store.wants_ahead:
                    self._copy_in_room(served, out)
                else:
                    self._copy_windows(served, out)
            except UnreadableShard as error:
                self._pass_over(error)
                continue
            except IndexError:  # only an index out of order leads there
                raise self._damaged_index() from None
            if served is not wanted:
                self.replaced_windows += int(np.count_nonzero(served != wanted))
            return out

    def chunk_tokens(self, chunk: int) -> np.ndarray:
        """The tokens of a chunk, a read-only view of the mapped shard in the corpus's dtype."""
        try:
            if not self._shifts[chunk]:
                self._look_at(chunk)
            shard = self._shards.get(int(self.index.shard[chunk]))
        except IndexError:
            raise self._damaged_index() from None
        first, end = self.index.token_start[chunk : chunk + 2] + self._shifts[chunk]
        return shard.flat[first:end]

    def chunks(self) -> Iterator[np.ndarray]:
        """Every chunk's tokens, in the order of the split."""
        return (self.chunk_tokens(chunk) for chunk in range(len(self.index)))

    def fetch_ahead(self, token_ranges: Sequence[tuple[int, int]]) -> None:
        """Have the shards of these token ranges [first, end) soon, the first needed first; returns at once."""
        if not self.store.wants_ahead or not len(token_ranges):
            return
        ranges = np.clip(np.asarray(token_ranges, dtype=np.int64), 0, self.num_tokens - 1)
        ranges[:, 1] = np.maximum(ranges[:, 1] - 1, ranges[:, 0])
        shards = self.index.shard[self.index.token_start.searchsorted(ranges, side="right") - 1]
        numbers = dict.fromkeys(number for first, last in shards.tolist() for number in range(first, last + 1))
        self.store.fetch_ahead([self._lines[number] for number in numbers if number not in self._unreadable])

    def room_for(self, num_ranges: int, tokens_each: int) -> int:
        """Bytes of the index and of the shards that so many ranges of tokens touch, where all shards are alike.

        A range seldom begins where a shard does, so it touches one more than it would fill.
        """
        if not self.num_tokens:
            return self._index_bytes
        mean_bytes = sum(shard.bytes for shard in self._lines[:1000]) / len(self._lines[:1000])
        shards = num_ranges * (1 - (-tokens_each * len(self._lines) // self.num_tokens))
        return self._index_bytes + int(mean_bytes * min(shards, len(self._lines)))

    def close(self) -> None:
        """Unmap all shards, and close the store if it is the reader's own."""
        self._shards.close()
        if self._owns_store:
            self.store.close()

    def _no_such_window(self, wanted: np.ndarray, sequence_length: int) -> IndexError:
        wrong = wanted.min() if wanted.min() < 0 else wanted.max()
        return IndexError(f"window {wrong} of {(self.num_tokens - 1) // sequence_length} in the {self.split} split")

    def _copy_in_room(self, served: np.ndarray, out: np.ndarray) -> None:
        """As `_copy_windows`; from one shard after the other where not all of them fit in the store's cache at once.

        Each step of `_copy_windows` goes through all shards, so that it would fetch them anew.
        """
        starts = served * (out.shape[1] - 1)
        numbers = self.index.shard.take(self._chunk_ends.searchsorted(starts, side="right"))
        shards = np.unique(numbers).tolist()
        most = self._index_bytes + (len(shards) + 1) * self._largest_bytes  # a window can go on in the next
        if len(shards) == 1 or most <= self.store.settings.cache_size:
            self._copy_windows(served, out)
            return
        for number in shards:
            rows = np.flatnonzero(numbers == number)
            part = np.empty((len(rows), out.shape[1]), dtype=np.int64)
            self._copy_windows(served[rows], part)
            out[rows] = part

    def _copy_windows(self, served: np.ndarray, out: np.ndarray) -> None:
        """The windows `served` into the rows of `out`. Raises UnreadableShard; IndexError for a damaged index."""
        count, length = out.shape
        starts = served * (length - 1)
        # Whatever the index holds: a search ends where the chunk's end is above the key, the one before not.
        chunks = self._chunk_ends.searchsorted(starts, side="right")
        across: list[tuple[int, int, int]] = []
        if np.count_nonzero(starts < self._limits.take(chunks)) < count:
            across = self._look_up(starts, chunks, length)
        if len(across) < count:
            starts += self._shifts.take(chunks)  # positions in shards from here on
            if self._one_shard:
                self._copy_rows(0, starts, out)
            else:
                self._copy_from_shards(self.index.shard.take(chunks), starts, out)
        for row, chunk, start in across:
            self._copy_across(out[row], chunk, start)

    def _look_up(self, starts: np.ndarray, chunks: np.ndarray, length: int) -> list[tuple[int, int, int]]:
        """Look at the chunks of windows where that was not done yet. Returns (row, chunk, start) of those that go on in
        the next chunk; `starts` and `chunks` then have another window in their place, to be written over.
        """
        across = []
        for row in np.flatnonzero(starts >= self._limits.take(chunks)).tolist():
            chunk, start = int(chunks[row]), int(starts[row])
            first, end = self.index.token_start[chunk : chunk + 2].tolist()
            if start < first:
                raise self._damaged_index()
            if start + length > end:
                across.append((row, chunk, start))
            elif not self._limits[chunk]:
                if not self._shifts[chunk]:
                    self._look_at(chunk)
                self._limits[chunk] = end - length + 1
        if across and len(across) < len(starts):
            others = {row for row, _, _ in across}
            stand_in = next(row for row in range(len(starts)) if row not in others)
            for row in others:
                starts[row], chunks[row] = starts[stand_in], chunks[stand_in]
        return across

    def _copy_from_shards(self, numbers: np.ndarray, positions: np.ndarray, out: np.ndarray) -> None:
        """For each row of `out` the window that begins at its position in the shard of its number."""
        if numbers[0] == numbers[-1] and np.count_nonzero(numbers == numbers[0]) == len(numbers):
            self._copy_rows(int(numbers[0]), positions, out)
            return
        order = numbers.argsort(kind="stable")
        numbers, positions = numbers[order], positions[order]
        ends = [*(np.flatnonzero(numbers[1:] != numbers[:-1]) + 1).tolist(), len(order)]
        first = 0
        for end in ends:
            number, rows = int(numbers[first]), order[first:end]
            if end - first < _FEW_ROWS:
                flat, length = self._shards.get(number).flat, out.shape[1]
                for row, position in zip(rows.tolist(), positions[first:end].tolist(), strict=True):
                    out[row] = flat[position : position + length]
            else:
                self._copy_rows(number, positions[first:end], out, rows)
            first = end

    def _copy_rows(self, number: int, positions: np.ndarray, out: np.ndarray, rows: np.ndarray | None = None) -> None:
        """Windows that begin at `positions` of one shard, into `rows` of `out`; None: into all of them."""
        count, length = len(positions), out.shape[1]
        runs = self._shards.get(number).runs(length)
        at_once = max(1, _TOKENS_AT_ONCE // length)
        if rows is None and count <= 2 * at_once:
            out[:] = runs[positions]
            return
        for first in range(0, count, at_once):
            block = slice(first, first + at_once)
            out[block if rows is None else rows[block]] = runs[positions[block]]

    def _copy_across(self, out: np.ndarray, chunk: int, start: int) -> None:
        """The window from token `start` of the split on, which is in `chunk` and goes on in the next ones."""
        filled, length = 0, len(out)
        while filled < length:
            shift = int(self._shifts[chunk])
            if not shift:
                self._look_at(chunk)
                shift = int(self._shifts[chunk])
            end = min(int(self._chunk_ends[chunk]), start + length - filled)
            if end <= start:  # only an index out of order leads here
                raise self._damaged_index()
            flat = self._shards.get(0 if self._one_shard else int(self.index.shard[chunk])).flat
            out[filled : filled + end - start] = flat[start + shift : end + shift]
            filled += end - start
            chunk, start = chunk + 1, end

    def _readable(self, wanted: np.ndarray, sequence_length: int) -> np.ndarray:
        """For each window the first one from it on, cyclically, that touches no unreadable shard."""
        served = wanted.copy()
        spans = [self._token_span(number) for number in self._unreadable]
        for _ in range(2 * len(spans) + 2):  # each round passes a span, and the end is met at most once
            touched = False
            for first, end in spans:
                starts = served * sequence_length
                bad = (starts < end) & (starts + sequence_length >= first)
                if bad.any():
                    served[bad] = -(-end // sequence_length)
                    touched = True
            served[served >= (self.num_tokens - 1) // sequence_length] = 0
            if not touched:
                return served
        raise CorpusError(f"No window of the {self.split} split of {self.corpus} can be read.{self._losses()}")

    def _token_span(self, number: int) -> tuple[int, int]:
        first = int(self.index.shard.searchsorted(np.uint32(number)))
        end = int(self.index.shard.searchsorted(np.uint32(number), side="right"))
        return int(self.index.token_start[first]), int(self.index.token_start[end])

    def _pass_over(self, error: UnreadableShard) -> None:
        """Do without a shard from now on. Raises CorpusError where too many are lost."""
        self._shards.drop(error.number)
        self._unreadable[error.number] = str(error)
        allowed = self.store.settings.max_unreadable_shards
        if len(self._unreadable) <= allowed:
            return
        if not allowed:
            raise error
        raise CorpusError(
            f"{len(self._unreadable)} shards of the {self.split} split of {self.corpus} cannot be read; "
            f"data.max_unreadable_shards is {allowed}.{self._losses()}"
        ) from None

    def _losses(self) -> str:
        return "".join(f"\n  {message}" for message in self._unreadable.values())

    def _look_at(self, chunk: int) -> None:
        """Find, and with `verify` check, a chunk before its first use."""
        self._shifts[chunk] = self._shards.place_of(chunk, self.index, self._verify)

    def _damaged_index(self) -> CorpusError:
        return CorpusError(f"The index of the {self.split} split of {self.corpus} is damaged. {REMEDY}")
