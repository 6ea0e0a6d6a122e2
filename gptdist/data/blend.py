"""Which corpus of a blend sample number i comes from, and which sample of that corpus it is: O(1), by closed form.

Knows integer weights and names; no files. Within a phase the corpora take turns so that after every sample each has had
its share to within 1 - 1/(2K - 2) of a sample, K corpora (Tijdeman 1980, "The chairman assignment problem"; the best
bound there is). Turns repeat with a period of the sum of the weights, which is tabulated. A corpus is its name: its
count of samples goes on from phase to phase, so that a changed blend repeats nothing.
"""

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np


@dataclass(frozen=True)
class Phase:
    """From sample number `from_sample` on, corpora by (name, whole weight)."""

    from_sample: int
    weights: tuple[tuple[str, int], ...]

    @property
    def period(self) -> int:
        return sum(weight for _, weight in self.weights)

    def share(self, name: str) -> float:
        """The part of the samples that corpus `name` gets; 0.0 for one that is not in this phase."""
        return dict(self.weights).get(name, 0) / self.period


class BlendOrder:
    """Sample number -> (corpus, position): the `position`-th sample of `corpora[corpus]`, counted from 0.

    Phases are in the order of their first samples; the first begins at 0.
    """

    def __init__(self, phases: Sequence[Phase]) -> None:
        starts = [phase.from_sample for phase in phases]
        if not phases or starts[0] != 0 or any(later <= earlier for earlier, later in pairwise(starts)):
            raise ValueError(f"phases begin at {starts}; the first must be at 0, and they must rise")
        self.phases = tuple(phases)
        self.corpora = tuple(dict.fromkeys(name for phase in phases for name, _ in phase.weights))
        self._starts = np.asarray(starts, dtype=np.int64)
        self._spans: list[_Span] = []
        counts = [0] * len(self.corpora)
        for number, phase in enumerate(phases):
            span = _Span(phase, self.corpora, tuple(counts))
            self._spans.append(span)
            if number + 1 < len(phases):
                counts = span.counts(phases[number + 1].from_sample)

    def phase_at(self, sample: int) -> Phase:
        """The phase that sample number `sample` is of."""
        return self.phases[bisect_right(self._starts, sample) - 1]

    def at(self, sample: int) -> tuple[int, int]:
        """The corpus and the position in it of one sample."""
        corpora, positions = self.of(np.asarray([sample]))
        return int(corpora[0]), int(positions[0])

    def of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Corpora and positions of any sample numbers: two int64 arrays of the shape of `samples`."""
        if samples.size and int(samples.min()) < 0:
            raise ValueError(f"samples count from 0, not {int(samples.min())}")
        samples = np.asarray(samples, dtype=np.int64)
        spans = np.searchsorted(self._starts, samples, side="right") - 1
        corpora, positions = np.empty_like(samples), np.empty_like(samples)
        for number in np.unique(spans):
            chosen = spans == number
            corpora[chosen], positions[chosen] = self._spans[number].of(samples[chosen])
        return corpora, positions

    def counts(self, sample: int) -> list[int]:
        """How many samples of each corpus come before sample number `sample`."""
        return self._spans[bisect_right(self._starts, sample) - 1].counts(sample)

    def sample(self, corpus: int, position: int) -> int | None:
        """The sample number that is the `position`-th of `corpora[corpus]`; None where no phase gets that far."""
        for number, span in enumerate(self._spans):
            last = number + 1 == len(self._spans)
            if last or position < self._spans[number + 1].first_counts[corpus]:
                return span.sample(corpus, position)
        return None


class _Span:
    """A phase and the counts with which it begins."""

    def __init__(self, phase: Phase, corpora: tuple[str, ...], first_counts: tuple[int, ...]) -> None:
        self.first_counts = first_counts
        self._from_sample = phase.from_sample
        self._period = phase.period
        members = np.asarray([corpora.index(name) for name, _ in phase.weights], dtype=np.int64)
        weights = [weight for _, weight in phase.weights]
        turns = turns_of_period(tuple(weights))
        self._corpus = members[turns.corpus]
        self._rank = turns.rank
        self._weights = np.zeros(len(corpora), dtype=np.int64)
        self._weights[members] = weights
        self._first_counts = np.asarray(first_counts, dtype=np.int64)
        self._places = dict(zip(members.tolist(), turns.places, strict=True))

    def of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        periods, places = np.divmod(samples - self._from_sample, self._period)
        corpora = self._corpus[places]
        return corpora, self._first_counts[corpora] + periods * self._weights[corpora] + self._rank[places]

    def counts(self, sample: int) -> list[int]:
        periods, place = divmod(sample - self._from_sample, self._period)
        counts = list(self.first_counts)
        for corpus, places in self._places.items():
            counts[corpus] += periods * len(places) + int(np.searchsorted(places, place))
        return counts

    def sample(self, corpus: int, position: int) -> int | None:
        if corpus not in self._places:
            return None
        places = self._places[corpus]
        periods, rank = divmod(position - self.first_counts[corpus], len(places))
        return self._from_sample + periods * self._period + int(places[rank])


@dataclass(frozen=True)
class Turns:
    """One period: whose turn each place is, the how-many-eth of that corpus it is, and the places of each corpus."""

    corpus: np.ndarray
    rank: np.ndarray
    places: tuple[np.ndarray, ...]


@lru_cache(maxsize=16)
def turns_of_period(weights: tuple[int, ...]) -> Turns:
    """The turns of a period of sum(weights) samples.

    The j-th turn of a corpus of share w is due in a stretch of places: with a deviation of at most 1 - e,
    e = 1/(2K - 2), not before place (j - 1 + e)/w and not after (j - e)/w. Tijdeman shows that there is a way to keep
    all of these; giving each place to the turn that is due first finds it, in whole numbers throughout.
    """
    period, halves = sum(weights), max(1, 2 * len(weights) - 2)
    due = [_due(period, weight, halves) for weight in weights]
    releases = np.concatenate([release for release, _ in due])
    # The deadline and the corpus in one number, so that the heap compares nothing else.
    base = 1 << len(weights).bit_length()
    deadlines = np.concatenate([deadline * base + corpus for corpus, (_, deadline) in enumerate(due)])
    by_release = np.argsort(releases, kind="stable")
    released, deadline_of = [*releases[by_release].tolist(), period + 1], deadlines[by_release].tolist()
    heap: list[int] = []
    turns = []
    upcoming = 0
    for place in range(1, period + 1):
        while released[upcoming] <= place:
            heapq.heappush(heap, deadline_of[upcoming])
            upcoming += 1
        turns.append(heapq.heappop(heap))
    corpus = np.asarray(turns, dtype=np.int64) % base
    places = tuple(np.flatnonzero(corpus == number) for number in range(len(weights)))
    rank = np.empty(period, dtype=np.int64)
    for own in places:
        rank[own] = np.arange(len(own))
    return Turns(corpus, rank, places)


def _due(period: int, weight: int, halves: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last place, counted from 1, of each turn of a corpus; `halves` is 1/e, or 1 for one corpus alone."""
    turn = np.arange(1, weight + 1, dtype=np.int64)
    if weight == period:
        return turn, turn
    release = -(-((turn - 1) * halves + 1) * period // (weight * halves))
    return release, (turn * halves - 1) * period // (weight * halves) + 1
