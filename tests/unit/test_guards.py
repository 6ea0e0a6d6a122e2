"""What ends a run early: signals, the stop file, steps skipped in a row."""

import contextlib
import os
import signal
from pathlib import Path

import pytest

from gptdist.errors import EXIT_FAILED, TrainingDiverged
from gptdist.train.guards import STOP_SIGNALS, SkipCounter, StopSignals, find_stop_file, take_stop_file


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_sets_a_flag_and_nothing_else(number: signal.Signals) -> None:
    with StopSignals() as signals:
        assert signals.requested is None
        signal.raise_signal(number)
        assert signals.requested == number.name


def test_the_first_signal_is_the_reason() -> None:
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGUSR2)
        signal.raise_signal(signal.SIGTERM)
        assert signals.requested == "SIGUSR2"


def test_the_handlers_of_before_come_back() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        with contextlib.suppress(RuntimeError), StopSignals() as signals:
            signal.raise_signal(signal.SIGUSR1)
            assert seen == []
            raise RuntimeError
        assert signals.requested == "SIGUSR1"
        signal.raise_signal(signal.SIGUSR1)
        assert seen == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_stop_file_is_found_left_and_removed_when_taken(tmp_path: Path) -> None:
    assert find_stop_file(tmp_path) is None
    assert find_stop_file(tmp_path / "no such run") is None
    path = tmp_path / "STOP"
    path.touch()
    assert find_stop_file(tmp_path) == path
    assert path.exists()
    assert take_stop_file(tmp_path) == f"stop file {path} (now removed)"
    assert find_stop_file(tmp_path) is None


def test_taking_a_stop_file_that_another_removed_is_fine(tmp_path: Path) -> None:
    assert "now removed" in take_stop_file(tmp_path)


def test_a_stop_file_that_cannot_be_removed_is_said(tmp_path: Path) -> None:
    (tmp_path / "STOP").mkdir()  # unlink refuses a folder, also for root
    assert find_stop_file(tmp_path) is not None
    message = take_stop_file(tmp_path)
    assert str(tmp_path / "STOP") in message
    assert "could not be removed" in message
    assert os.path.isdir(tmp_path / "STOP")


def test_steps_skipped_in_a_row_stop_the_run() -> None:
    counter = SkipCounter(limit=3)
    for step, skipped in enumerate([True, True, False, True, True], start=1):
        counter.update(skipped, step)
    assert (counter.in_a_row, counter.total) == (2, 4)
    with pytest.raises(TrainingDiverged) as caught:
        counter.update(True, 6, (2, 5))
    assert caught.value.exit_code == EXIT_FAILED
    for part in (
        "not finite on ranks 2, 5 in 3 steps in a row",
        "up to step 6",
        "5 skipped in all",
        "train.max_skipped_steps",
        "learning_rate",
    ):
        assert part in str(caught.value)


def test_a_resumed_counter_goes_on() -> None:
    with pytest.raises(TrainingDiverged):
        SkipCounter(limit=3, in_a_row=2, total=9).update(True, 100)
