"""When a run stops for the end of its allocation: early enough for a save, and no earlier."""

from hypothesis import given
from hypothesis import strategies as st

from launch.cluster.time_limit import LARGEST_MARGIN, MARGIN_SECONDS, SAFETY, TimeLimit, find_end

SECONDS = st.floats(0, 1e5)


def test_the_end_is_what_slurm_or_the_script_says() -> None:
    assert find_end({"SLURM_JOB_END_TIME": "1800000000", "GPTDIST_JOB_ENDS": "5"}) == 1.8e9
    assert find_end({"GPTDIST_JOB_ENDS": "1800000000"}) == 1.8e9
    assert find_end({"GPTDIST_JOB_ENDS": ""}) is None
    assert find_end({"SLURM_JOB_END_TIME": "UNLIMITED"}) is None
    assert find_end({}) is None


def test_without_an_end_it_is_never_near() -> None:
    assert not TimeLimit(None).is_near(1e9, 1e9)


@given(SECONDS, SECONDS, SECONDS)
def test_a_step_and_a_save_fit_twice(save: float, step: float, left: float) -> None:
    now = [0.0]
    limit = TimeLimit(1e5, clock=lambda: now[0])
    now[0] = 1e5 - left
    assert limit.is_near(save, step) == (limit.seconds_left < SAFETY * (save + step) + MARGIN_SECONDS)


def test_a_short_allocation_is_not_all_margin() -> None:
    now = [0.0]
    limit = TimeLimit(60.0, clock=lambda: now[0])
    assert not limit.is_near(1.0, 1.0)
    now[0] = 60 * (1 - LARGEST_MARGIN) - 2 * SAFETY - 0.1
    assert not limit.is_near(1.0, 1.0)
    now[0] += 0.2
    assert limit.is_near(1.0, 1.0)


def test_an_end_in_the_past_is_a_clock_that_is_off() -> None:
    assert not TimeLimit(5.0, clock=lambda: 6.0).is_near(1.0, 1.0)


@given(SECONDS, SECONDS, SECONDS, SECONDS)
def test_longer_saves_stop_earlier(save: float, more: float, step: float, left: float) -> None:
    limit = TimeLimit(left, clock=lambda: 0.0)
    assert limit.is_near(save + more, step) or not limit.is_near(save, step)
