"""Batches for one data rank: sample numbers -> tensors, read ahead by a thread.

Knows which data rank it serves and how large each global batch is; does not know steps, tensor or pipeline ranks,
devices, or where a sample's tokens come from (`samples.py`).
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from gptdist.data.order import micro_batches
from gptdist.data.reader import LostShard, TokenReader
from gptdist.data.samples import SampleSource
from gptdist.errors import ConfigError

# A look at the order costs as much for a few hundred samples as for one.
_SAMPLES_LOCATED_AT_ONCE = 1024


@dataclass(frozen=True)
class LoadedBatch:
    """One data rank's part of a global batch.

    `tokens` is int64 [num_micro_batches, micro_batch_size, sequence_length + 1]; `lost` are the shards that were passed
    over when it was read; `wait_seconds` is how long training waited.
    """

    first_sample: int
    global_batch_size: int
    tokens: torch.Tensor
    lost: tuple[LostShard, ...]
    wait_seconds: float


@dataclass(frozen=True)
class _Ready:
    first_sample: int
    global_batch_size: int
    tokens: torch.Tensor
    lost: tuple[LostShard, ...]


class BatchLoader:
    """Yields global batches in sample order from any sample on; at most `prefetch` of them wait in memory.

    Samples are counted as they are trained on; which ones they are is the source's (`SampleSource.gaps`).
    """

    def __init__(
        self,
        source: SampleSource,
        micro_batch_size: int,
        data_rank: int,
        data_size: int,
        prefetch: int = 4,
    ) -> None:
        if not 0 <= data_rank < data_size:
            raise ValueError(f"data_rank {data_rank} is not one of {data_size}")
        self.source = source
        self._micro_batch_size = micro_batch_size
        self._data_rank = data_rank
        self._data_size = data_size
        self._prefetch = max(1, prefetch)
        self._run: _Prefetch | None = None

    def start(self, first_sample: int, batch_size_at: Callable[[int], int]) -> None:
        """Begin reading ahead at `first_sample`; `batch_size_at(samples consumed)` is the next global batch size.

        May be called again, to go on from another sample.
        """
        self.close()
        self._run = _Prefetch(lambda: self._batches(first_sample, batch_size_at), self._prefetch)

    def next(self) -> LoadedBatch:
        """The next batch. What went wrong in the reading thread is raised here, each time."""
        if self._run is None:
            raise RuntimeError("BatchLoader.next() before start()")
        started = time.perf_counter()
        ready = self._run.take()
        waited = time.perf_counter() - started
        return LoadedBatch(ready.first_sample, ready.global_batch_size, ready.tokens, ready.lost, waited)

    def close(self) -> None:
        """Stop reading ahead; returns when the thread has ended."""
        if self._run is not None:
            self._run.stop()
            self._run = None

    def _batches(self, sample: int, batch_size_at: Callable[[int], int]) -> Iterator[_Ready]:
        length = self.source.sequence_length + 1
        while True:
            ahead = self._samples_ahead(sample, batch_size_at)
            located = self.source.locate(np.concatenate([samples.ravel() for _, samples in ahead]))
            done = 0
            for size, samples in ahead:
                tokens = np.empty((*samples.shape, length), dtype=np.int64)
                self.source.prepare(self.source.gaps.number(sample))
                self.source.read(located[done : done + samples.size], tokens.reshape(-1, length))
                yield _Ready(sample, size, torch.from_numpy(tokens), self.source.lost)
                sample += size
                done += samples.size

    def _samples_ahead(self, sample: int, batch_size_at: Callable[[int], int]) -> list[tuple[int, np.ndarray]]:
        """(size, this data rank's samples) of the next global batches: as many as make a look at the order pay."""
        ahead: list[tuple[int, np.ndarray]] = []
        count = 0
        while count < _SAMPLES_LOCATED_AT_ONCE:
            size = batch_size_at(sample)
            try:
                own = micro_batches(sample, size, self._micro_batch_size, self._data_rank, self._data_size)
            except ConfigError:
                if ahead:
                    break  # the batches before it are good: it is raised when its turn comes
                raise
            ahead.append((size, self.source.gaps.numbers(own)))
            sample += size
            count += own.size
        return ahead


class _Prefetch:
    """A thread that fills a bounded queue from `make_batches()`; one run of it, never restarted."""

    def __init__(self, make_batches: Callable[[], Iterator[_Ready]], depth: int) -> None:
        self._make_batches = make_batches
        self._queue: queue.Queue[_Ready | BaseException] = queue.Queue(maxsize=depth)
        self._stopping = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._fill, name="gptdist-data", daemon=True)
        self._thread.start()

    def take(self) -> _Ready:
        if self._error is None:
            item = self._queue.get()
            if not isinstance(item, BaseException):
                return item
            self._error = item
        raise self._error

    def stop(self) -> None:
        self._stopping.set()
        while self._thread.is_alive():
            # The thread may be waiting for room: make some until it has seen that it should stop.
            try:
                self._queue.get(timeout=0.01)
            except queue.Empty:
                continue
        self._thread.join()

    def _fill(self) -> None:
        try:
            for batch in self._make_batches():
                self._queue.put(batch)
                if self._stopping.is_set():
                    return
        except BaseException as error:  # whatever it is, the thread that waits for data must hear of it
            self._queue.put(error)


def held_out_batches(
    reader: TokenReader,
    sequence_length: int,
    num_samples: int,
    micro_batch_size: int,
    data_rank: int,
    data_size: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """At most `num_samples` windows, spread evenly over the split: the same set for every `data_size`.

    Yields (tokens int64 [micro_batch_size, sequence_length + 1], real bool [micro_batch_size]). Every data rank gets
    the same number of batches; rows whose `real` is False only fill the last ones and must not count.
    """
    if num_samples < 1 or micro_batch_size < 1:
        raise ConfigError(
            f"Evaluation of {num_samples} samples in micro-batches of {micro_batch_size}: both must be at least 1."
        )
    num_windows = reader.num_windows(sequence_length)
    count = min(num_samples, num_windows)
    batches = -(-count // (micro_batch_size * data_size))
    for places in micro_batches(0, batches * micro_batch_size * data_size, micro_batch_size, data_rank, data_size):
        tokens = np.empty((micro_batch_size, sequence_length + 1), dtype=np.int64)
        for row, place in zip(tokens, places.tolist(), strict=True):
            # count <= num_windows, so these are different windows
            reader.window(place * num_windows // count if place < count else 0, sequence_length, out=row)
        yield torch.from_numpy(tokens), torch.from_numpy(places < count)
