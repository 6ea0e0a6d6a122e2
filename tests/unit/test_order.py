"""The order of windows is a permutation, looks random, and is dealt to ranks exactly once whatever their number."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.data.order import MAX_WINDOWS, WindowOrder, micro_batches
from gptdist.errors import ConfigError

seeds = st.integers(0, 2**70)


def excess(counts: np.ndarray, expected: float, degrees: int) -> float:
    """How many standard deviations the chi-square of `counts` lies from its mean."""
    chi_square = float(((counts - expected) ** 2).sum() / expected)
    return (chi_square - degrees) / math.sqrt(2 * degrees)


def test_the_order_never_changes() -> None:
    # Runs in progress depend on these: a change here changes what their next samples are.
    order = WindowOrder(1234, 1000)
    assert order.windows(0, 8).tolist() == [897, 411, 635, 865, 782, 345, 660, 687]
    assert order.windows(1000, 4).tolist() == [512, 311, 92, 842]
    assert WindowOrder(0, 10**12).windows(5, 3).tolist() == [241411497374, 983026184386, 94821598997]
    assert WindowOrder(7, 10**15).window(123456789012345678) == (123, 763595277555545)


@given(seeds, st.integers(1, 3000), st.integers(0, 5))
@settings(max_examples=150, deadline=None)
def test_an_epoch_is_a_permutation(seed: int, num_windows: int, epoch: int) -> None:
    windows = WindowOrder(seed, num_windows).windows(epoch * num_windows, num_windows)
    assert windows.dtype == np.int64
    assert np.array_equal(np.sort(windows), np.arange(num_windows))


@pytest.mark.parametrize("num_windows", [*range(1, 40), 4096, 4097, 65_535, 200_003])
def test_every_size_is_a_permutation(num_windows: int) -> None:
    assert np.array_equal(np.sort(WindowOrder(3, num_windows).windows(0, num_windows)), np.arange(num_windows))


@given(seeds, st.integers(1, 10**15), st.data())
@settings(max_examples=150, deadline=None)
def test_one_at_a_time_is_the_same_as_many(seed: int, num_windows: int, data: st.DataObject) -> None:
    order = WindowOrder(seed, num_windows)
    first = data.draw(st.integers(0, 3 * num_windows))
    windows = order.windows(first, 20).tolist()
    pairs = [order.window(sample) for sample in range(first, first + 20)]
    assert [window for _, window in pairs] == windows
    assert [epoch for epoch, _ in pairs] == [sample // num_windows for sample in range(first, first + 20)]
    assert all(0 <= window < num_windows for window in windows)


@pytest.mark.parametrize("num_windows", [10**9 + 7, 10**12, 10**15, MAX_WINDOWS])
def test_no_window_repeats_in_a_large_corpus(num_windows: int) -> None:
    assert len(np.unique(WindowOrder(11, num_windows).windows(num_windows - 200_000, 200_000))) == 200_000


@pytest.mark.parametrize("num_windows", [3, 4])
def test_a_tiny_corpus_sees_every_order_alike(num_windows: int) -> None:
    order = WindowOrder(9, num_windows)
    epochs = 3000
    counts = Counter(tuple(order.windows(epoch * num_windows, num_windows).tolist()) for epoch in range(epochs))
    orders = math.factorial(num_windows)
    assert len(counts) == orders
    assert excess(np.array(list(counts.values())), epochs / orders, orders - 1) < 5


def test_epochs_and_seeds_give_different_orders() -> None:
    orders = [WindowOrder(seed, 500).windows(epoch * 500, 500).tolist() for seed in range(4) for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 16


@pytest.mark.parametrize("num_windows", [5, 12, 63, 64, 100])
def test_each_window_is_equally_likely_at_each_position(num_windows: int) -> None:
    epochs = 1000
    counts = np.zeros((num_windows, num_windows))
    order = WindowOrder(99, num_windows)
    for epoch in range(epochs):
        counts[np.arange(num_windows), order.windows(epoch * num_windows, num_windows)] += 1
    assert abs(excess(counts, epochs / num_windows, (num_windows - 1) ** 2)) < 5


@pytest.mark.parametrize("num_windows", [50_000, 65_536, 99_991])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_an_order_looks_like_a_uniform_permutation(num_windows: int, seed: int) -> None:
    order = WindowOrder(seed, num_windows)
    windows = order.windows(0, num_windows)
    positions = np.arange(num_windows)

    # Spearman's rank correlation with the position, with the next epoch and with the next seed: N(0, 1/(n - 1)).
    for other in (
        positions,
        order.windows(num_windows, num_windows),
        WindowOrder(seed + 1, num_windows).windows(0, num_windows),
    ):
        assert abs(np.corrcoef(windows, other)[0, 1]) * math.sqrt(num_windows - 1) < 4.5

    # Where the first half of the order falls in the corpus, and how far apart neighbours are, in 64 equal bins.
    first_half = np.histogram(windows[: num_windows // 2], bins=64, range=(0, num_windows))[0]
    assert excess(first_half, num_windows / 128, 63) < 5
    steps = np.histogram(np.diff(windows) % num_windows, bins=64, range=(0, num_windows))[0]
    assert excess(steps, (num_windows - 1) / 64, 63) < 5

    # Pairs of neighbours that stay neighbours: Poisson with mean 1 in each direction.
    assert np.count_nonzero(np.diff(windows) == 1) < 9
    assert np.count_nonzero(np.diff(windows) == -1) < 9


def test_pairs_of_neighbours_stay_as_often_as_by_chance() -> None:
    order = WindowOrder(5, 97)
    kept = sum(np.count_nonzero(np.diff(order.windows(epoch * 97, 97)) == 1) for epoch in range(2000))
    assert abs(kept - 2000 * 96 / 97) < 200  # about Poisson: a standard deviation of 45


@pytest.mark.parametrize("num_windows", [0, -1, MAX_WINDOWS + 1])
def test_an_order_of_nothing_is_refused(num_windows: int) -> None:
    with pytest.raises(ValueError, match=str(num_windows)):
        WindowOrder(0, num_windows)


def test_a_negative_sample_is_refused() -> None:
    order = WindowOrder(0, 10)
    with pytest.raises(ValueError, match="-1"):
        order.window(-1)
    with pytest.raises(ValueError, match="-2"):
        order.windows(-2, 3)


@given(st.integers(0, 10**12), st.integers(1, 6), st.integers(1, 5), st.integers(1, 8))
def test_data_ranks_share_a_batch_out(first: int, turns: int, micro: int, data_size: int) -> None:
    batch = turns * micro * data_size
    parts = [micro_batches(first, batch, micro, data_rank, data_size) for data_rank in range(data_size)]
    assert all(part.shape == (turns, micro) for part in parts)
    # Micro-batch by micro-batch, data rank by data rank, the samples come in their order: no number of ranks changes
    # it.
    assert np.stack(parts, axis=1).ravel().tolist() == list(range(first, first + batch))
    for data_rank, part in enumerate(parts):
        for turn in range(turns):
            start = first + (turn * data_size + data_rank) * micro
            assert part[turn].tolist() == list(range(start, start + micro))


@given(
    seeds,
    st.integers(1, 400),
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6)), min_size=1, max_size=6
    ),
)
@settings(max_examples=60, deadline=None)
def test_exactly_once_over_restarts(seed: int, num_windows: int, stretches: list[tuple[int, int, int, int]]) -> None:
    """Stretches of (data ranks, micro-batch size, micro-batches, steps), each a restart, until an epoch is done."""
    order = WindowOrder(seed, num_windows)
    seen: list[int] = []
    consumed = 0
    while consumed < num_windows:
        for data_size, micro, turns, steps in stretches:
            for _ in range(steps):
                batch = data_size * micro * turns
                parts = [
                    order.windows_of(micro_batches(consumed, batch, micro, rank, data_size))
                    for rank in range(data_size)
                ]
                seen.extend(np.stack(parts, axis=1).ravel().tolist())
                consumed += batch
    assert seen[:num_windows] == order.windows(0, num_windows).tolist()
    whole = consumed // num_windows * num_windows
    assert np.bincount(seen[:whole], minlength=num_windows).tolist() == [whole // num_windows] * num_windows


@pytest.mark.parametrize(("batch", "choices"), [(10, "8 or 12"), (3, "Use 4."), (0, "Use 4.")])
def test_a_batch_that_does_not_divide_is_refused(batch: int, choices: str) -> None:
    with pytest.raises(ConfigError, match=rf"global batch size \({batch}\).*{choices}"):
        micro_batches(0, batch, 2, 0, 2)
