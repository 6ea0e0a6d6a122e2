"""Which of several failures is the run's, over every order in which ranks may end."""

import itertools
import json
import signal
from dataclasses import asdict, replace

import pytest

from launch.ranks.verdict import RankEnd, Report, judge


def report(
    message: str, at: int, kind: str = "ValueError", code: int = 1, deliberate: bool = False, echo: bool = False
) -> Report:
    return Report(kind, message, "Traceback ...\n", code, deliberate, echo, at)


def fails(global_rank: int, said: Report) -> RankEnd:
    return RankEnd(global_rank, said.exit_code, None, said, said.at_nanoseconds)


def ends(global_rank: int, code: int, at: int = 0) -> RankEnd:
    return RankEnd(global_rank, code, None, None, at)


def killed(global_rank: int, number: int, at: int = 0) -> RankEnd:
    return RankEnd(global_rank, None, number, None, at)


@pytest.mark.parametrize(
    ("codes", "code"), [((0, 0), 0), ((75, 75, 75), 75), ((0, 75), 75), ((0, 3), 3), ((93, 93), 93)]
)
def test_exit_codes_of_quiet_ends(codes: tuple[int, ...], code: int) -> None:
    assert judge([ends(rank, value) for rank, value in enumerate(codes)], len(codes)).exit_code == code


def test_hosts_that_cannot_take_part_are_passed_on() -> None:
    said = replace(report("node7 cannot take part", 3, "NodeUnfit", deliberate=True), unfit=("node7",))
    assert Report.read(json.dumps(asdict(said)).encode()) == said
    verdict = judge([fails(0, said), fails(1, said)], 2)
    assert (verdict.unfit, verdict.exit_code, verdict.message) == (("node7",), 1, "node7 cannot take part")


def test_first_real_error_wins_in_any_order() -> None:
    lost = report("Connection closed by peer", 10, "RuntimeError", echo=True)
    group = [fails(0, lost), fails(1, report("boom", 20)), fails(2, report("later", 30)), killed(3, signal.SIGABRT, 5)]
    for order in itertools.permutations(group):
        verdict = judge(order, 4)
        assert (verdict.message, verdict.global_rank, verdict.exit_code) == ("[rank 1] ValueError: boom", 1, 1)
        assert verdict.traceback


def test_a_killed_rank_explains_the_lost_peers() -> None:
    lost = [fails(rank, report("Connection closed by peer", rank, "RuntimeError", echo=True)) for rank in (0, 1)]
    for order in itertools.permutations([*lost, killed(2, signal.SIGKILL, at=99)]):
        verdict = judge(order, 3)
        assert verdict.exit_code == 1
        assert verdict.message == "rank 2 was killed by signal 9 (SIGKILL): out of memory?"


def test_an_agreed_error_is_told_once_by_the_rank_that_had_it() -> None:
    own = fails(2, report("disk full", 9, "StorageError", 2, deliberate=True))
    others = [
        fails(rank, report("[rank 2] disk full", rank, "StorageError", 2, deliberate=True, echo=True))
        for rank in (0, 1)
    ]
    for order in itertools.permutations([own, *others]):
        verdict = judge(order, 3)
        assert (verdict.message, verdict.exit_code, verdict.traceback) == ("[rank 2] disk full", 2, "")
    assert judge(others, 3).message == "[rank 2] disk full", "even before that rank has ended"


def test_the_same_mistake_on_all_ranks_has_no_rank() -> None:
    group = [fails(rank, report("bad", rank, "ConfigError", 2, deliberate=True)) for rank in range(3)]
    assert judge(group, 3).message == "bad"
    assert judge(group[:2], 3).message == "[rank 0] bad"
    assert judge(group, 3, debug=True).traceback


@pytest.mark.parametrize("number", [4, 11, 7, 34, 64])
def test_any_signal_has_a_message(number: int) -> None:
    verdict = judge([killed(0, number)], 1)
    assert verdict.exit_code == 1 and f"rank 0 was killed by signal {number} (" in verdict.message


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_stopped_before_anyone_listened(stop: int, code: int) -> None:
    died_of = signal.SIGTERM if stop == signal.SIGINT else stop
    verdict = judge([killed(0, died_of), ends(1, 75)], 2, stop_signal=stop)
    assert verdict.exit_code == code and "stopped" in verdict.message


def test_a_real_error_while_stopping_is_still_an_error() -> None:
    verdict = judge([fails(0, report("boom", 1)), ends(1, 75)], 2, stop_signal=signal.SIGTERM)
    assert (verdict.exit_code, verdict.message) == (1, "[rank 0] ValueError: boom")
