"""Proves by counting: windows exactly once an epoch, blends as weighted, no sample left out but those passed over.

Asks the same orders as training and believes nothing of how they are made. Memory is bounded for any corpus: one bit a
window, at most `WINDOWS_AT_ONCE` of them at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from gptdist.data.blend import BlendOrder, Phase
from gptdist.data.gaps import Gaps
from gptdist.data.order import EpochOrder

WINDOWS_AT_ONCE = 1 << 32  # 512 MiB of bits
_SAMPLES_AT_ONCE = 1 << 20

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EpochProof:
    """What was counted in one epoch of one corpus."""

    windows: int
    samples: int
    used: int
    outside: int

    @property
    def holds(self) -> bool:
        """As many samples as windows, every window used and none that is not there: then each exactly once."""
        return self.samples == self.used == self.windows and not self.outside


@dataclass(frozen=True)
class BlendProof:
    """What was counted in a run's samples: `gaps` where a corpus's count did not go on by one, and the largest distance
    of any corpus from its weight after any sample of a phase."""

    samples: int
    gaps: int
    furthest: float

    @property
    def holds(self) -> bool:
        return not self.gaps and self.furthest < 1


@dataclass(frozen=True)
class GapsProof:
    """What was counted of a run that passes over samples: `trained` and `left_out` of the first `samples` numbers, and
    how many numbers came `wrong`: twice, or in a gap."""

    samples: int
    trained: int
    left_out: int
    wrong: int

    @property
    def holds(self) -> bool:
        """Each number is trained on once, or passed over."""
        return not self.wrong and self.trained + self.left_out == self.samples


def prove_gaps(gaps: Gaps, trained: int) -> GapsProof:
    """Go through the first `trained` samples that a run trains on: their numbers must rise, and none be in a gap."""
    wrong, last = 0, -1
    for first in range(0, trained, _SAMPLES_AT_ONCE):
        numbers = gaps.numbers(np.arange(first, min(first + _SAMPLES_AT_ONCE, trained), dtype=np.int64))
        wrong += int(np.count_nonzero(np.diff(numbers, prepend=last) < 1))
        wrong += sum(int(np.count_nonzero((numbers >= start) & (numbers < stop))) for start, stop in gaps.ranges)
        last = int(numbers[-1])
    left_out = sum(min(stop, last + 1) - start for start, stop in gaps.ranges if start <= last)
    return GapsProof(last + 1, trained, left_out, wrong)


def prove_epoch(order: EpochOrder, epoch: int, progress: Progress | None = None) -> EpochProof:
    """Mark the window of every sample of the epoch and count the marks.

    A corpus of more windows than can be marked at once is gone through several times.
    """
    windows = order.num_windows
    passes = range(0, windows, WINDOWS_AT_ONCE)
    used = outside = samples = 0
    for turn, first_window in enumerate(passes):
        size = min(WINDOWS_AT_ONCE, windows - first_window)
        marks = np.zeros(-(-size // 8), dtype=np.uint8)
        samples = 0
        for position in range(0, windows, _SAMPLES_AT_ONCE):
            count = min(_SAMPLES_AT_ONCE, windows - position)
            found = order.windows(epoch * windows + position, count)
            outside += 0 if turn else int(np.count_nonzero((found < 0) | (found >= windows)))
            own = found[(found >= first_window) & (found < first_window + size)] - first_window
            np.bitwise_or.at(marks, own >> 3, np.left_shift(1, own & 7).astype(np.uint8))
            samples += count
            if progress:
                progress("check", turn * windows + samples, len(passes) * windows)
        used += _count_bits(marks)
    return EpochProof(windows, samples, used, outside)


def prove_blend(blend: BlendOrder, samples: int, progress: Progress | None = None) -> BlendProof:
    """Go through the run's first `samples` samples: the positions in each corpus must run on from 0, one by one."""
    gaps, furthest = 0, 0.0
    seen = np.zeros(len(blend.corpora), dtype=np.int64)
    for phase, stop in _phases_until(blend, samples):
        before = seen.copy()
        for first in range(phase.from_sample, stop, _SAMPLES_AT_ONCE):
            numbers = np.arange(first, min(first + _SAMPLES_AT_ONCE, stop), dtype=np.int64)
            corpora, positions = blend.of(numbers)
            in_phase = numbers - phase.from_sample + 1
            for corpus, name in enumerate(blend.corpora):
                own = corpora == corpus
                counts = seen[corpus] + np.cumsum(own)
                gaps += int(np.count_nonzero(positions[own] != counts[own] - 1))
                wanted = in_phase * phase.share(name)
                furthest = max(furthest, float(np.abs(counts - before[corpus] - wanted).max()))
                seen[corpus] = counts[-1]
            if progress:
                progress("check blend", int(numbers[-1]) + 1, samples)
    return BlendProof(samples, gaps, furthest)


def _phases_until(blend: BlendOrder, samples: int) -> list[tuple[Phase, int]]:
    stops = [*(phase.from_sample for phase in blend.phases[1:]), samples]
    spans = zip(blend.phases, (min(stop, samples) for stop in stops), strict=True)
    return [(phase, stop) for phase, stop in spans if phase.from_sample < stop]


def _count_bits(marks: np.ndarray) -> int:
    step = 1 << 20
    return sum(int(np.unpackbits(marks[at : at + step]).sum(dtype=np.int64)) for at in range(0, len(marks), step))
