"""Sample numbers -> rows of tokens: where readers, their orders and the blend meet.

Knows which window of which corpus a sample is, the same on every rank; does not know ranks, batches or torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gptdist.data.blend import BlendOrder
from gptdist.data.gaps import Gaps
from gptdist.data.local_order import LocalOrder
from gptdist.data.order import EpochOrder
from gptdist.data.reader import LostShard, TokenReader


@dataclass(frozen=True)
class Place:
    """What a sample trains on: `window` of corpus `corpus`, in pass `epoch` over it, counted from 0."""

    corpus: str
    epoch: int
    window: int


@dataclass(frozen=True)
class Located:
    """Where samples are: the number of each one's corpus in the blend, and its window there. int64 [count] each."""

    corpora: np.ndarray
    windows: np.ndarray

    def __getitem__(self, chosen: slice) -> "Located":
        return Located(self.corpora[chosen], self.windows[chosen])


@dataclass(frozen=True)
class _Corpus:
    reader: TokenReader
    order: EpochOrder


class SampleSource:
    """The samples of a run. `readers` and `orders` have an entry for each corpus of the blend, by its name.

    `gaps` are the sample numbers that the run passes over, for whoever counts samples; all that is asked of a source by
    a sample number goes by the whole order. It may be set while nothing reads.
    """

    def __init__(
        self,
        readers: Mapping[str, TokenReader],
        orders: Mapping[str, EpochOrder],
        blend: BlendOrder,
        sequence_length: int,
        gaps: Gaps | None = None,
    ) -> None:
        self.blend = blend
        self.gaps = gaps or Gaps()
        self.sequence_length = sequence_length
        self.orders = {name: orders[name] for name in blend.corpora}
        self._corpora = [_Corpus(readers[name], orders[name]) for name in blend.corpora]
        for corpus in self._corpora:
            windows = corpus.reader.num_windows(sequence_length)
            if corpus.order.num_windows != windows:
                raise ValueError(f"the order is over {corpus.order.num_windows} windows, the reader has {windows}")
        # By corpus: the samples (of that corpus) whose windows, and those of the next buffer, were asked for.
        self._asked_ahead = [range(0)] * len(self._corpora)

    def locate(self, samples: np.ndarray) -> "Located":
        """Which windows of which corpora `samples` [count] are. Some thousand at a time cost little more than one."""
        if len(self._corpora) == 1:
            return Located(np.zeros(len(samples), dtype=np.int64), self._corpora[0].order.windows_of(samples))
        numbers, positions = self.blend.of(samples)
        windows = np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            own = numbers == number
            windows[own] = self._corpora[number].order.windows_of(positions[own])
        return Located(numbers, windows)

    def read(self, located: "Located", rows: np.ndarray) -> None:
        """Write the tokens of located samples into `rows`, int64 [count, sequence_length + 1]."""
        length = self.sequence_length
        if len(self._corpora) == 1:
            self._corpora[0].reader.windows(located.windows, length, rows)
            return
        for number in np.unique(located.corpora).tolist():
            own = np.flatnonzero(located.corpora == number)
            found = np.empty((len(own), length + 1), dtype=np.int64)
            rows[own] = self._corpora[number].reader.windows(located.windows[own], length, found)

    def place(self, sample: int) -> Place:
        """What sample number `sample` trains on."""
        number, position = self.blend.at(sample)
        return Place(self.blend.corpora[number], *self._corpora[number].order.window(position))

    def sample(self, place: Place) -> int | None:
        """The sample number that trains on `place`; None where no phase of the blend gets that far."""
        number = self.blend.corpora.index(place.corpus)
        return self.blend.sample(number, self._corpora[number].order.sample(place.epoch, place.window))

    def prepare(self, sample: int) -> None:
        """Ask readers that fetch ahead for what is needed from sample number `sample` on: the buffer that each corpus
        of the phase is in, and the next. Returns at once; costs nothing where there is no such reader.
        """
        counts: Sequence[int] | None = None
        for number, corpus in enumerate(self._corpora):
            if not isinstance(corpus.order, LocalOrder) or not corpus.reader.wants_ahead:
                continue
            counts = counts or self.blend.counts(sample)
            if counts[number] in self._asked_ahead[number]:
                continue
            if not self.blend.phase_at(sample).share(self.blend.corpora[number]):
                continue
            buffer = corpus.order.buffer_of(counts[number])
            following = corpus.order.buffer_of(buffer.stop_sample)
            length = self.sequence_length
            ranges = [
                (start * length, stop * length + 1) for start, stop in (*buffer.window_ranges, *following.window_ranges)
            ]
            corpus.reader.fetch_ahead(ranges)
            self._asked_ahead[number] = range(buffer.first_sample, buffer.stop_sample)

    @property
    def lost(self) -> tuple[LostShard, ...]:
        """The shards that are passed over because they cannot be read."""
        return tuple(lost for corpus in self._corpora for lost in corpus.reader.lost)

    def lose(self, lost: Iterable[LostShard]) -> None:
        """Pass over these shards as well. Not while `read` runs in another thread."""
        readers = {corpus.reader.corpus: corpus.reader for corpus in self._corpora}
        for shard in lost:
            readers[shard.corpus].lose(shard.number, shard.message)

    def passed_over(self) -> dict[str, float]:
        """How many shards are passed over, and how many windows this process replaced for it, for the metrics; nothing
        where all is well.
        """
        readers = [corpus.reader for corpus in self._corpora]
        counts = {
            "data/unreadable_shards": len(self.lost),
            "data/replaced_windows": sum(reader.replaced_windows for reader in readers),
        }
        return {name: float(count) for name, count in counts.items() if count}

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each corpus has been read through once `samples` samples are trained on; what was passed over
        until then counts as read."""
        counts = self.blend.counts(self.gaps.stop(samples))
        return {
            name: count / corpus.order.num_windows
            for name, count, corpus in zip(self.blend.corpora, counts, self._corpora, strict=True)
        }
