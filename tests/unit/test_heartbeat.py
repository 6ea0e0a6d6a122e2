"""Signs of life in shared memory: what is written is read, a reader never sees half of anything."""

import os
import signal
import threading
import time
from dataclasses import astuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.monitor.heartbeat import COLLECTIVES, PHASES, Heartbeat, Pulse, StepTimes, create_memory

_SECONDS = st.floats(0, 1e6, allow_nan=False)
_TIMES = st.builds(StepTimes, st.integers(1, 10**12), *[_SECONDS] * 6)
_ACTIONS = st.one_of(
    st.tuples(st.just("phase"), st.sampled_from(PHASES)),
    st.tuples(st.just("collective"), st.sampled_from([None, *COLLECTIVES])),
    st.tuples(st.just("step_done"), _TIMES),
    st.tuples(st.just("saved"), st.integers(1, 10**12)),
    st.tuples(st.just("resume"), st.integers(0, 10**12)),
)


def open_pair() -> tuple[Heartbeat, Pulse]:
    fd = create_memory()
    heartbeat, pulse = Heartbeat.open(fd), Pulse(fd)
    os.close(fd)
    return heartbeat, pulse


@given(st.lists(_ACTIONS, max_size=150))
def test_what_is_written_is_read(actions: list[tuple[str, object]]) -> None:
    heartbeat, pulse = open_pair()
    for name, value in actions:
        getattr(heartbeat, name)(value)
    beat = pulse.read()
    pulse.close()

    def last(kind: str, default: object) -> object:
        return next((value for name, value in reversed(actions) if name == kind), default)

    steps = [value for name, value in actions if name == "step_done"]
    step, saved = 0, None
    for name, value in actions:
        if name == "step_done":
            step = value.step  # type: ignore[attr-defined]
        if name == "saved":
            saved = value
        if name == "resume":
            step, saved = value, value or None  # type: ignore[assignment]
    assert (beat.step, beat.saved_step) == (step, saved)
    assert beat.phase == last("phase", "starting")
    assert beat.collective == last("collective", None)
    assert list(beat.recent) == steps[-63:]


def test_times_are_of_the_clock_all_processes_share_and_only_go_on() -> None:
    before = time.monotonic_ns()
    heartbeat, pulse = open_pair()
    heartbeat.phase("waiting for data")
    first = pulse.read()
    time.sleep(0.002)
    heartbeat.collective("all_reduce")
    second = pulse.read()
    time.sleep(0.002)
    heartbeat.collective(None)
    third = pulse.read()
    assert before - 1000 <= first.phase_started_ns == first.beat_ns == second.phase_started_ns
    assert first.beat_ns < second.beat_ns < third.beat_ns <= time.monotonic_ns()
    assert (first.collective, second.collective, third.collective) == (None, "all_reduce", None)


def test_a_save_by_another_thread_is_no_sign_of_life_of_training() -> None:
    heartbeat, pulse = open_pair()
    beat_ns = pulse.read().beat_ns
    time.sleep(0.002)
    heartbeat.saved(7, 2.5)
    beat = pulse.read()
    assert (beat.beat_ns, beat.saved_step, beat.save_seconds) == (beat_ns, 7, 2.5)


def test_memory_that_no_rank_has_opened_yet_reads_as_starting() -> None:
    fd = create_memory()
    beat = Pulse(fd).read()
    os.close(fd)
    assert (beat.step, beat.phase, beat.saved_step, beat.collective, beat.recent) == (0, "starting", None, None, ())


def test_a_rank_nobody_watches_writes_to_memory_of_its_own() -> None:
    heartbeat = Heartbeat.open(-1)
    for name in PHASES:
        heartbeat.phase(name)
    for step in range(200):
        heartbeat.step_done(StepTimes(step, 1.0, 0.0, 1.0, 0.0))
    heartbeat.collective("barrier")
    heartbeat.saved(3)


@pytest.mark.parametrize("name", ["", "Saving", "all_reduce"])
def test_a_phase_that_is_not_one_is_an_error(name: str) -> None:
    with pytest.raises(KeyError):
        Heartbeat.open(-1).phase(name)


def test_the_next_rank_to_open_the_memory_begins_anew() -> None:
    fd = create_memory()
    first = Heartbeat.open(fd)
    first.resume(5)
    first.step_done(StepTimes(6, 1.0, 0.0, 1.0, 0.0))
    Heartbeat.open(fd)
    beat = Pulse(fd).read()
    os.close(fd)
    assert (beat.step, beat.saved_step, beat.recent) == (0, None, ())


def _numbered(step: int) -> StepTimes:
    """Times of which one torn part would show."""
    return StepTimes(step, *(float(step * factor) for factor in (1, 2, 3, 5, 7, 11)))


def test_a_reader_beside_a_writer_never_sees_a_torn_step() -> None:
    heartbeat, pulse = open_pair()
    stop = threading.Event()

    def write() -> None:
        step = 0
        while not stop.is_set():
            step += 1
            heartbeat.step_done(_numbered(step))

    writer = threading.Thread(target=write)
    writer.start()
    seen = 0
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        for times in pulse.read().recent:
            assert astuple(times) == astuple(_numbered(times.step))
            seen += 1
    stop.set()
    writer.join()
    assert seen > 1000


def test_a_rank_killed_in_the_middle_of_writing_leaves_only_whole_steps() -> None:
    fd = create_memory()
    pulse = Pulse(fd)
    for _ in range(20):
        heartbeat = Heartbeat.open(fd)  # and what the last one counted is gone
        pid = os.fork()
        if pid == 0:
            step = 0
            while True:
                step += 1
                heartbeat.phase("forward and backward")
                heartbeat.step_done(_numbered(step))
        while pulse.read().step < 100:
            time.sleep(0.0005)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        beat = pulse.read()
        assert len(beat.recent) >= 62  # all but the one being written
        assert all(times == _numbered(times.step) for times in beat.recent)
        assert beat.step - beat.recent[-1].step in (-1, 0, 1)
    os.close(fd)


def test_half_a_slot_is_left_out() -> None:
    heartbeat, pulse = open_pair()
    for step in range(1, 6):
        heartbeat.step_done(_numbered(step))
    heartbeat._memory[64 + 2 * 64 + 20] ^= 1  # a byte of the third
    assert [times.step for times in pulse.read().recent] == [1, 2, 4, 5]


def test_the_ending_tells_what_it_came_from() -> None:
    """Also where it is said twice: once by what failed, once by who called it."""
    fd = create_memory()
    heartbeat, pulse = Heartbeat.open(fd), Pulse(fd)
    os.close(fd)
    for phase in PHASES[:-1]:
        heartbeat.phase(phase)
        assert (pulse.read().phase, pulse.read().ended_in) == (phase, None)
        heartbeat.phase("ending")
        heartbeat.phase("ending")
        assert (pulse.read().phase, pulse.read().ended_in) == ("ending", phase)
    pulse.close()
