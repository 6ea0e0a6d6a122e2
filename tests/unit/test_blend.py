"""A blend gives each corpus its share after every sample, changes without repeating, and answers anywhere at once."""

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.corpus.order_check import prove_blend
from gptdist.config.weights import LARGEST_PERIOD, rounded_weights, whole_weights
from gptdist.data.blend import BlendOrder, Phase, turns_of_period

weights_of_blends = st.lists(st.integers(1, 400), min_size=1, max_size=8)


@st.composite
def blends(draw: st.DrawFn) -> BlendOrder:
    """Up to four phases over up to five corpora."""
    phases, start = [], 0
    for _ in range(draw(st.integers(1, 4))):
        names = draw(st.lists(st.sampled_from("abcde"), min_size=1, max_size=5, unique=True))
        phases.append(Phase(start, tuple((name, draw(st.integers(1, 30))) for name in names)))
        start += draw(st.integers(1, 200))
    return BlendOrder(phases)


def one_phase(weights: list[int]) -> BlendOrder:
    return BlendOrder([Phase(0, tuple((str(number), weight) for number, weight in enumerate(weights)))])


def test_the_turns_never_change() -> None:
    # Runs in progress depend on these: a change here changes what their next samples are.
    blend = BlendOrder([Phase(0, (("a", 7), ("b", 2), ("c", 1))), Phase(25, (("b", 1), ("d", 3)))])
    corpora, positions = blend.of(np.arange(40))
    assert "".join(blend.corpora[corpus] for corpus in corpora) == "aabaacaabaaabaacaabaaabaadbdddbdddbdddbd"
    assert positions[20:].tolist() == [14, 15, 4, 16, 17, 0, 5, 1, 2, 3, 6, 4, 5, 6, 7, 7, 8, 9, 8, 10]
    assert blend.counts(40) == [18, 9, 2, 11]
    assert blend.at(10**12) == (3, 749999999981)


@given(weights_of_blends)
@settings(max_examples=150, deadline=None)
def test_every_prefix_is_within_the_bound_of_the_weights(weights: list[int]) -> None:
    period, corpora = sum(weights), len(weights)
    turns = one_phase(weights).of(np.arange(2 * period + 5))[0]
    counts = np.cumsum(turns[:, None] == np.arange(corpora), axis=0)
    places = np.arange(1, len(turns) + 1)[:, None]
    # |count - n w| x period in whole numbers, against (1 - 1/(2K - 2)) x period: no rounding anywhere.
    distance = int(np.abs(counts * period - places * np.asarray(weights)).max())
    assert distance * max(1, 2 * corpora - 2) <= (2 * corpora - 3) * period if corpora > 1 else distance == 0
    assert counts[period - 1].tolist() == weights


def test_the_bound_holds_for_the_largest_period_and_for_many_corpora() -> None:
    for weights in ([1, 65_535], [30_000, 2, 1, 20_000, 7, 15_526], [1] * 40, [5_000, *[1] * 60]):
        proof = prove_blend(one_phase(weights), 2 * sum(weights))
        assert proof.holds and proof.furthest <= 1 - 1 / (2 * len(weights) - 2) + 1e-9


@given(blends())
@settings(max_examples=150, deadline=None)
def test_a_changed_blend_repeats_nothing_and_leaves_nothing_out(blend: BlendOrder) -> None:
    samples = blend.phases[-1].from_sample + 150
    corpora, positions = blend.of(np.arange(samples))
    for corpus in range(len(blend.corpora)):
        own = positions[corpora == corpus]
        assert own.tolist() == list(range(len(own)))
    for sample in range(0, samples, 7):
        assert blend.counts(sample) == np.bincount(corpora[:sample], minlength=len(blend.corpora)).tolist()
        assert blend.at(sample) == (corpora[sample], positions[sample])
        assert blend.sample(*blend.at(sample)) == sample
    assert prove_blend(blend, samples).holds
    for phase, following in pairwise(blend.phases):
        assert blend.phase_at(phase.from_sample) is phase
        assert blend.phase_at(following.from_sample - 1) is phase


@given(blends(), st.integers(0, 10**12))
@settings(max_examples=100, deadline=None)
def test_any_sample_has_its_inverse(blend: BlendOrder, sample: int) -> None:
    assert blend.sample(*blend.at(sample)) == sample


def test_a_sample_that_no_phase_reaches() -> None:
    blend = BlendOrder([Phase(0, (("a", 1), ("b", 1))), Phase(10, (("b", 1),))])
    assert blend.sample(0, 4) in (8, 9)
    assert blend.sample(0, 5) is None
    assert blend.sample(1, 5) == 10


def test_a_blend_of_one_is_the_corpus() -> None:
    corpora, positions = one_phase([1]).of(np.asarray([0, 1, 10**12]))
    assert corpora.tolist() == [0, 0, 0] and positions.tolist() == [0, 1, 10**12]


def test_the_check_notices_a_blend_that_is_not_as_weighted() -> None:
    class Wrong(BlendOrder):
        def of(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            corpora, positions = super().of(samples)
            return corpora, np.where(samples == 77, 3, positions)

    assert prove_blend(Wrong([Phase(0, (("a", 1), ("b", 2)))]), 100).gaps == 1
    uneven = BlendOrder([Phase(0, (("a", 1), ("b", 2)))])
    uneven.phases = (Phase(0, (("a", 2), ("b", 2))),)
    assert not prove_blend(uneven, 100).holds


def test_the_longest_period_is_ready_in_no_time() -> None:
    seconds = []
    for turn in range(4):
        turns_of_period.cache_clear()
        started = time.perf_counter()
        blend = one_phase([30_000, 2, 1, 20_000, 7, 15_500 + turn])
        blend.of(np.arange(10**9, 10**9 + 512))
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.1


@pytest.mark.parametrize(
    "phases",
    [[], [Phase(1, (("a", 1),))], [Phase(0, (("a", 1),)), Phase(0, (("b", 1),))]],
)
def test_phases_out_of_order_are_refused(phases: list[Phase]) -> None:
    with pytest.raises(ValueError, match="first must be at 0"):
        BlendOrder(phases)


def test_a_negative_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="-1"):
        one_phase([1, 2]).of(np.asarray([-1]))


def test_weights_are_exact_decimals() -> None:
    assert whole_weights([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert whole_weights([1, 2.5]) == (2, 5)
    assert whole_weights([1e-3, 1]) == (1, 1000)
    assert whole_weights([5.0]) == (1,)
    assert whole_weights([0.1 + 0.2, 1]) == (7500000000000001, 25000000000000000)


@given(st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=8))
def test_rounded_weights_are_near_and_allowed(weights: list[float]) -> None:
    rounded = rounded_weights(weights)
    assert sum(whole_weights(rounded)) <= LARGEST_PERIOD
    for weight, near in zip(weights, rounded, strict=True):
        assert abs(weight / sum(weights) - near / sum(rounded)) < 2e-3
