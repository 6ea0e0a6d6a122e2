"""Goodput by hand-made histories: what is lost is not counted, and what was not wished for is."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.runs.attempts import Attempt
from launch.runs.goodput import LoggedStep, goodput, kept_seconds, kept_steps

FIRST = Attempt("slurm 1", 0, 0, ("node1",), 2, began=100.0, start_step=0)


def steps(start: float, first: int, last: int, seconds: float = 1.0, every: int = 1) -> list[LoggedStep]:
    """Lines of steps made one after the other from `start` on."""
    return [
        LoggedStep(start + seconds * (step - first + 1), step, seconds)
        for step in range(first + every - 1, last + 1, every)
    ]


def test_without_trouble_only_the_start_is_lost() -> None:
    log = steps(110.0, 1, 90)
    assert goodput(log, [FIRST], now=200.0) == pytest.approx(0.9)
    assert goodput([], [FIRST], now=200.0) is None


def test_steps_made_again_count_once() -> None:
    killed = replace(FIRST, ended=160.0, last_step=50, saved_step=30, reason="killed", action="restart in place")
    again = replace(FIRST, generation=1, began=160.0, start_step=30)
    log = steps(110.0, 1, 50) + steps(160.0, 31, 70)
    assert kept_seconds(log, [killed, again]) == pytest.approx(70.0)
    assert goodput(log, [killed, again], now=200.0) == pytest.approx(0.7)


def test_an_interrupted_interval_is_filled_in() -> None:
    log = [*steps(110.0, 1, 50, every=10), LoggedStep(200.0, 60, 2.0)]  # 45 was saved, 41 to 45 have no line left
    again = replace(FIRST, generation=1, began=165.0, start_step=45)
    assert [line.step for line in kept_steps(log, [FIRST, again])] == [10, 20, 30, 40, 60]
    assert kept_seconds(log, [FIRST, again]) == pytest.approx(40 + 20 * 2.0)


def test_while_it_waits_what_was_not_saved_is_lost() -> None:
    ended = replace(FIRST, ended=160.0, last_step=50, saved_step=30, reason="preempted", action="requeue")
    assert goodput(steps(110.0, 1, 50), [ended], now=400.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("ended", "seconds"),
    [
        ({"ended": 160.0, "saved_step": 47, "action": "requeue"}, 47.0),  # the last line is of step 40
        ({"ended": 160.0, "saved_step": 33, "action": "requeue"}, 33.0),  # 31 to 33 as fast as the 40 that is lost
        ({"ended": 160.0, "last_step": 48, "saved_step": 48, "action": "done"}, 48.0),
        ({"ended": 160.0, "saved_step": None, "action": "requeue"}, 0.0),
        ({}, 40.0),  # it still runs, and may lose what it did since
    ],
)
def test_steps_after_the_last_line_count_where_they_are_kept(ended: dict[str, object], seconds: float) -> None:
    attempt = replace(FIRST, **ended)  # type: ignore[arg-type]
    assert kept_seconds(steps(110.0, 1, 49, every=10), [attempt]) == pytest.approx(seconds)


def test_steps_of_earlier_attempts_stay_while_a_later_one_saves_none() -> None:
    first = replace(FIRST, ended=160.0, last_step=50, saved_step=45, action="requeue")
    log = steps(110.0, 1, 50, every=10)
    again = replace(FIRST, restart=1, began=170.0, start_step=45)
    assert kept_seconds(log, [first, again]) == pytest.approx(45.0), "before its first line"
    failed = replace(again, ended=180.0, saved_step=None, action="requeue")
    assert kept_seconds(log, [first, failed]) == pytest.approx(45.0)


def test_the_time_stops_when_the_run_does() -> None:
    done = replace(FIRST, ended=200.0, last_step=90, action="done", exit_code=0)
    assert goodput(steps(110.0, 1, 90), [done], now=9999.0) == pytest.approx(0.9)


def test_a_pause_that_was_wished_for_is_not_counted_and_a_queue_is() -> None:
    stopped = replace(FIRST, ended=160.0, last_step=50, saved_step=50, action="stop", exit_code=75)
    again = replace(FIRST, restart=1, began=1060.0, start_step=50)
    log = steps(110.0, 1, 50) + steps(1060.0, 51, 90)
    assert goodput(log, [stopped, again], now=1100.0) == pytest.approx(0.9)
    requeued = replace(stopped, action="requeue")
    assert goodput(log, [requeued, again], now=1100.0) == pytest.approx(0.09)
    given_up = replace(stopped, exit_code=93)
    assert goodput(log, [given_up, again], now=1100.0) == pytest.approx(0.09)


def test_without_records_the_steps_themselves_show_a_restart() -> None:
    log = steps(100.0, 1, 50) + steps(200.0, 31, 60)
    assert [line.step for line in kept_steps(log, [])] == list(range(1, 61))
    assert goodput(log, [], now=230.0) == pytest.approx(60 / 130)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40)), min_size=1, max_size=8))
def test_it_is_a_share_whatever_happened(history: list[tuple[int, int]]) -> None:
    now, step, log, attempts = 100.0, 0, [], []
    for number, (made, saved) in enumerate(history):
        attempts.append(replace(FIRST, generation=number, began=now, start_step=step))
        log += steps(now + 1, step + 1, step + made)
        now += made + 2
        attempts[-1] = replace(attempts[-1], ended=now, saved_step=min(step + saved, step + made), action="requeue")
        step = attempts[-1].saved_step or 0
    value = goodput(log, attempts, now)
    assert value is not None
    assert 0 <= value < 1
    assert kept_seconds(log, attempts) == pytest.approx(step)
