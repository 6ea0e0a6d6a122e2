"""When the clock wants a save, and the interval that loses least."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.config.sections import CheckpointConfig
from gptdist.train.save_clock import FIRST_SECONDS, LONGEST_SECONDS, SaveClock, best_interval


class Time:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def clock_of(time: Time, nodes: int = 1, **settings: object) -> SaveClock:
    return SaveClock(CheckpointConfig.model_validate(settings), nodes, time)


def lost(interval: float, stall: float, mtbf: float) -> float:
    """Part of all time that saves cost, and half an interval for each failure."""
    return stall / interval + interval / 2 / mtbf


@given(st.floats(0.01, 100), st.floats(1e4, 1e8))
def test_no_other_interval_loses_less(stall: float, mtbf: float) -> None:
    best = best_interval(stall, mtbf)
    for factor in (0.5, 0.9, 1.1, 2.0):
        other = best * factor
        if other <= LONGEST_SECONDS and best < LONGEST_SECONDS:
            assert lost(best, stall, mtbf) <= lost(other, stall, mtbf)


def test_known_values_and_bounds() -> None:
    assert best_interval(0.5, 40_000) == 200.0
    assert best_interval(0.5, 40_000, save_seconds=300) == 300.0  # the next save would wait for this one
    assert best_interval(10, 1e12) == LONGEST_SECONDS
    assert best_interval(60, 100) == 100  # saving takes as long as it runs: no approximation holds
    assert best_interval(0, 1e6) == 0.0


def test_minutes_count_from_the_last_save_whatever_it_was_due_to() -> None:
    time = Time()
    clock = clock_of(time, interval=10, interval_minutes=5.0)
    assert clock.interval_seconds == 300
    time.now += 299
    assert not clock.is_due()
    clock.began()
    time.now += 299
    assert not clock.is_due()
    time.now += 1
    assert clock.is_due()


def test_steps_alone_leave_the_clock_out_of_it() -> None:
    time = Time()
    clock = clock_of(time, interval=10)
    time.now += 1e9
    assert not clock.is_due() and clock.interval_seconds == math.inf


def test_auto_measures_first_and_then_follows_the_number_of_nodes() -> None:
    time = Time()
    clock = clock_of(time, nodes=100, interval="auto", node_mtbf="100d")
    assert clock.interval_seconds == FIRST_SECONDS
    time.now += FIRST_SECONDS
    assert clock.is_due()
    clock.began()
    clock.measured(stall_seconds=0.5, save_seconds=20)
    assert clock.interval_seconds == pytest.approx(math.sqrt(2 * 0.5 * 86400))
    clock.measured(stall_seconds=1.5, save_seconds=4000)
    assert clock.interval_seconds == pytest.approx((4000 + 20) / 2)  # slower than it should come
