"""The local order is a permutation made buffer by buffer, knows its inverse, and shuffles all that it says it does."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.data.local_order import LocalOrder
from gptdist.data.order import WindowOrder
from gptdist.data.permutation import KeyedPermutation
from tests.unit.test_order import excess

seeds = st.integers(0, 2**70)
sizes = st.tuples(st.integers(1, 600), st.integers(1, 150), st.integers(1, 9))
large = st.tuples(st.integers(1, 10**12), st.integers(1, 10**7), st.integers(1, 40))


def test_the_order_never_changes() -> None:
    # Runs in progress depend on these: a change here changes what their next samples are.
    order = LocalOrder(1234, 1000, 30, 4)
    assert order.windows(0, 10).tolist() == [634, 639, 958, 399, 390, 292, 658, 649, 957, 945]
    assert order.windows(1000, 5).tolist() == [662, 529, 831, 663, 835]
    assert order.buffer_of(0).window_ranges == ((930, 960), (630, 660), (390, 420), (270, 300))
    assert LocalOrder(7, 10**12, 2**20, 16).windows(5, 3).tolist() == [330088674808, 624633265433, 616897553670]
    assert LocalOrder(0, 10**15, 1000, 3).window(123456789012345678) == (123, 270781941058153)


@given(seeds, sizes, st.integers(0, 4))
@settings(max_examples=150, deadline=None)
def test_an_epoch_is_a_permutation(seed: int, size: tuple[int, int, int], epoch: int) -> None:
    order = LocalOrder(seed, *size)
    windows = order.windows(epoch * size[0], size[0])
    assert windows.dtype == np.int64
    assert np.array_equal(np.sort(windows), np.arange(size[0]))


@pytest.mark.parametrize("num_windows", range(1, 26))
def test_every_small_size_is_a_permutation(num_windows: int) -> None:
    for block in range(1, num_windows + 2):
        for per_buffer in (1, 2, 3, 7):
            windows = LocalOrder(3, num_windows, block, per_buffer).windows(0, 2 * num_windows)
            assert np.bincount(windows, minlength=num_windows).tolist() == [2] * num_windows


@given(seeds, sizes | large, st.data())
@settings(max_examples=150, deadline=None)
def test_one_at_a_time_is_the_same_as_many_and_has_an_inverse(
    seed: int, size: tuple[int, int, int], data: st.DataObject
) -> None:
    order = LocalOrder(seed, *size)
    first = data.draw(st.integers(0, 3 * size[0]))
    windows = order.windows(first, 20).tolist()
    pairs = [order.window(sample) for sample in range(first, first + 20)]
    assert [window for _, window in pairs] == windows
    assert [epoch for epoch, _ in pairs] == [sample // size[0] for sample in range(first, first + 20)]
    assert [order.sample(*pair) for pair in pairs] == list(range(first, first + 20))


@given(seeds, st.integers(1, 10**15), st.data())
@settings(max_examples=100, deadline=None)
def test_the_inverse_of_the_global_order_and_of_a_permutation(seed: int, size: int, data: st.DataObject) -> None:
    sample = data.draw(st.integers(0, 3 * size))
    order = WindowOrder(seed, size)
    assert order.sample(*order.window(sample)) == sample
    permutation = KeyedPermutation(f"test {seed}", size)
    point = data.draw(st.integers(0, size - 1))
    assert permutation.at(permutation.position_of(point)) == point
    assert permutation.position_of(permutation.at(point)) == point


@given(seeds, st.tuples(st.integers(1, 300), st.integers(1, 80), st.integers(1, 9)), st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_buffers_follow_each_other_and_say_what_they_read(seed: int, size: tuple[int, int, int], epoch: int) -> None:
    order = LocalOrder(seed, *size)
    sample, end = epoch * size[0], (epoch + 1) * size[0]
    while sample < end:
        buffer = order.buffer_of(sample)
        assert (buffer.first_sample, sample) == (sample, buffer.first_sample)
        assert order.buffer_of(buffer.stop_sample - 1) == buffer
        assert len(buffer.window_ranges) <= size[2]
        said = [window for start, stop in buffer.window_ranges for window in range(start, stop)]
        read = order.windows(buffer.first_sample, buffer.stop_sample - buffer.first_sample)
        assert sorted(said) == np.sort(read).tolist()
        sample = buffer.stop_sample
    assert sample == end


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_within_a_buffer_the_order_looks_like_a_uniform_permutation(seed: int) -> None:
    block, per_buffer = 4096, 12
    order = LocalOrder(seed, 40 * block - 1000, block, per_buffer)
    for sample in (0, block * per_buffer * 2):
        buffer = order.buffer_of(sample)
        size = buffer.stop_sample - buffer.first_sample
        windows = order.windows(buffer.first_sample, size)
        ranks = np.argsort(np.argsort(windows))

        # Spearman's rank correlation with the position and with the buffer's next windows: N(0, 1/(n - 1)).
        assert abs(np.corrcoef(ranks, np.arange(size))[0, 1]) * math.sqrt(size - 1) < 4.5
        assert abs(np.corrcoef(ranks[:-1], ranks[1:])[0, 1]) * math.sqrt(size - 1) < 4.5

        # Which blocks the first half of the buffer comes from: chi-square of blocks and halves.
        half = np.bincount(windows[: size // 2] // block, minlength=40)
        own = np.unique(windows // block)
        whole = np.bincount(windows // block, minlength=40)[own]
        expected = whole * (size // 2) / size
        variance = expected * (1 - (size // 2) / size)
        chi_square = float(((half[own] - expected) ** 2 / variance).sum())
        assert (chi_square - len(own)) / math.sqrt(2 * len(own)) < 5

        # Pairs of neighbours that stay neighbours: Poisson with mean 1 in each direction.
        assert np.count_nonzero(np.diff(windows) == 1) < 9
        assert np.count_nonzero(np.diff(windows) == -1) < 9


def test_each_block_is_equally_likely_in_each_slot_and_each_window_at_each_place_of_a_buffer() -> None:
    blocks, block, per_buffer, epochs = 12, 5, 3, 1500
    order = LocalOrder(99, blocks * block, block, per_buffer)
    windows = order.windows(0, epochs * blocks * block).reshape(epochs, blocks // per_buffer, per_buffer * block)
    slots = np.zeros((blocks, blocks // per_buffer))
    places = np.zeros((block, per_buffer * block))
    for place in range(per_buffer * block):
        for buffer in range(blocks // per_buffer):
            np.add.at(slots[:, buffer], windows[:, buffer, place] // block, 1 / block)
        np.add.at(places[:, place], windows[:, :, place].ravel() % block, 1)
    expected = epochs * per_buffer / blocks
    # Each row and each column of the counts has its sum fixed. Blocks are drawn without replacement, which spreads them
    # by blocks / (blocks - 1) more than the chi-square of a table with fixed sums.
    degrees = (blocks - 1) * (blocks // per_buffer - 1)
    chi_square = float(((slots - expected) ** 2).sum() / expected) * (blocks - 1) / blocks
    assert abs(chi_square - degrees) / math.sqrt(2 * degrees) < 5
    uniform = epochs * blocks // per_buffer * per_buffer * block / places.size
    assert abs(excess(places, uniform, (block - 1) * (per_buffer * block - 1))) < 5


def test_what_the_local_order_does_not_shuffle() -> None:
    """Windows of a block stay within a buffer of each other: that is what makes its reads local."""
    order = LocalOrder(5, 10_000, 100, 4)
    positions = np.empty(10_000, dtype=np.int64)
    positions[order.windows(0, 10_000)] = np.arange(10_000)
    spread = positions.reshape(100, 100).max(axis=1) - positions.reshape(100, 100).min(axis=1)
    assert spread.max() < 400 and spread.min() > 200


def test_epochs_and_seeds_give_different_orders() -> None:
    orders = [
        LocalOrder(seed, 500, 20, 3).windows(epoch * 500, 500).tolist() for seed in range(4) for epoch in range(4)
    ]
    assert len({tuple(order) for order in orders}) == 16


@pytest.mark.parametrize(("num_windows", "block", "per_buffer"), [(0, 1, 1), (10, 0, 1), (10, 1, 0)])
def test_an_order_of_nothing_is_refused(num_windows: int, block: int, per_buffer: int) -> None:
    with pytest.raises(ValueError, match="0"):
        LocalOrder(0, num_windows, block, per_buffer)
    with pytest.raises(ValueError, match="-1"):
        LocalOrder(0, 10, 3, 2).window(-1)
    with pytest.raises(ValueError, match="-2"):
        LocalOrder(0, 10, 3, 2).windows(-2, 3)
    with pytest.raises(ValueError, match="window is 10; there are 10"):
        LocalOrder(0, 10, 3, 2).sample(0, 10)
