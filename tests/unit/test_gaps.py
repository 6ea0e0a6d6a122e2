"""The order with gaps: every sample number is trained on once or passed over, counted by brute force and by itself."""

from itertools import count, islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.corpus.order_check import prove_gaps
from gptdist.data.gaps import Gaps

ranges = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda span: (span[0], span[0] + span[1])), max_size=6
)


def brute(spans: list[tuple[int, int]], trained: int) -> list[int]:
    """The first `trained` numbers that are in none of the ranges."""
    free = (number for number in count() if not any(first <= number < stop for first, stop in spans))
    return list(islice(free, trained))


@given(ranges, st.integers(1, 100))
def test_numbers_are_what_the_gaps_leave(spans: list[tuple[int, int]], trained: int) -> None:
    gaps, expected = Gaps.of(spans), brute(spans, trained)
    assert gaps.numbers(np.arange(trained)).tolist() == expected
    assert [gaps.number(position) for position in range(trained)] == expected
    assert gaps.stop(trained) == expected[-1] + 1 and gaps.stop(0) == 0
    for number in range(expected[-1] + 1):
        assert gaps.count(number) == (expected.index(number) if number in expected else None)
    assert gaps.total == len({number for first, stop in spans for number in range(first, stop)})
    assert gaps.settled(trained) >= max([gaps.number(trained), *(stop for _, stop in spans)])
    proof = prove_gaps(gaps, trained)
    assert proof.holds and (proof.samples, proof.trained) == (expected[-1] + 1, trained)


@given(ranges, st.integers(0, 50), st.integers(1, 30))
def test_a_gap_more_takes_exactly_the_samples_of_a_window(
    spans: list[tuple[int, int]], first: int, length: int
) -> None:
    """What `plan_rollback` does: the window of counts [first, first + length) is never trained on again."""
    gaps = Gaps.of(spans)
    numbers = gaps.numbers(np.arange(first + length)).tolist()
    after = Gaps.of([*gaps.ranges, (gaps.number(first), gaps.stop(first + length))])
    again = after.numbers(np.arange(first + 200)).tolist()
    assert again[:first] == numbers[:first], "what came before the window comes again"
    assert not set(again) & set(numbers[first:])
    assert set(again) | set(numbers[first:]) | {n for start, stop in gaps.ranges for n in range(start, stop)} >= set(
        range(again[-1])
    ), "nothing else is left out"


def test_ranges_that_touch_are_one() -> None:
    assert Gaps.of([(8, 10), (2, 4), (4, 6), (3, 5)]).ranges == ((2, 6), (8, 10))
    for bad in ((3, 3), (5, 4), (-1, 2)):
        with pytest.raises(ValueError, match="gap"):
            Gaps.of([bad])


def test_the_proof_can_fail() -> None:
    class Wrong(Gaps):
        def numbers(self, counts: np.ndarray) -> np.ndarray:
            return counts

    assert prove_gaps(Gaps(((5, 8),)), 20).holds
    assert prove_gaps(Wrong(((5, 8),)), 20).wrong == 3
    assert not prove_gaps(Wrong(((5, 8),)), 20).holds
