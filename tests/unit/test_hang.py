"""Who hangs, and for how long one may: grids of ranks and their places."""

import itertools
import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gptdist.monitor.heartbeat import Heartbeat, Pulse, StepTimes, create_memory
from launch.ranks.failure_report import RankStack, hang_report, hang_sentence, rank_list
from launch.ranks.hang import Patience, Standing, find_culprits, find_hang
from launch.ranks.process_io import bytes_moved
from launch.ranks.rank_process import RankProcess


def stands(
    rank: int,
    phase: str = "reducing gradients",
    collective: str | None = "all_reduce",
    step: int = 7,
    still: float = 100.0,
    stopped: bool = False,
) -> Standing:
    return Standing(rank, stopped, step, phase, collective, still)


def took(rank: int, seconds: float, first: int = 1, count: int = 1) -> Standing:
    times = tuple(StepTimes(step, seconds, 0, seconds, 0) for step in range(first, first + count))
    return Standing(rank, False, first + count - 1, "forward and backward", None, 0.0, None, times)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize(
    "odd",
    {
        "stopped": {"stopped": True},
        "stopped elsewhere": {"stopped": True, "collective": None, "step": 8},
        "computes": {"phase": "forward and backward", "collective": None},
        "behind in a collective of its own": {"collective": "broadcast", "step": 6},
    }.values(),
)
def test_the_odd_one_out(size: int, odd: dict[str, object]) -> None:
    for culprit in range(size):
        ranks = [stands(rank, **odd) if rank == culprit else stands(rank) for rank in range(size)]  # type: ignore[arg-type]
        for order in itertools.islice(itertools.permutations(ranks), 24):
            found = find_culprits(order)
            assert found == ((culprit,) if size > 1 or "stopped" in odd else ())


@pytest.mark.parametrize("size", [3, 4, 8])
def test_a_rank_that_skipped_a_collective_is_ahead_of_the_others(size: int) -> None:
    for culprit in range(size):
        ranks = [stands(rank, step=8 if rank == culprit else 7) for rank in range(size)]
        assert find_culprits(ranks) == (culprit,)


def test_of_two_in_different_collectives_the_one_behind() -> None:
    assert find_culprits([stands(0, step=8), stands(1, step=7)]) == (1,)
    assert find_culprits([stands(0, "saving", "broadcast"), stands(1)]) == ()


def test_all_in_the_same_place_is_nobodys_fault() -> None:
    assert find_culprits([stands(rank) for rank in range(4)]) == ()


def test_patience_is_learned_from_steps() -> None:
    patience, here = Patience(None, 600.0), stands(0)
    assert patience.seconds(here) == 600.0, "nothing is known yet"
    patience.learn(took(0, 0.1, count=20))
    assert patience.seconds(here) == 60.0
    patience.learn(took(0, 30.0, first=21, count=40))
    assert patience.seconds(here) == 300.0
    patience.learn(took(0, 0.1, first=61, count=64))
    assert patience.seconds(here) == 60.0, "a run that has become faster"
    patience.learn(took(0, 50.0, first=125))
    assert patience.seconds(here) == 150.0, "one long step counts less than many"


def test_patience_of_other_phases_is_their_own() -> None:
    patience = Patience(None, 600.0)
    patience.learn(took(0, 0.1, count=20))
    for phase in ("loading", "saving", "evaluating", "waiting for data", "starting", "ending"):
        assert patience.seconds(stands(0, phase)) == 600.0
    patience.learn(stands(0, "saving", still=500.0))
    assert patience.seconds(stands(0, "saving")) == 600.0, "it may hang there"
    patience.learn(stands(0, "saving", still=0.0))
    assert patience.seconds(stands(0, "saving")) == 1500.0
    assert patience.seconds(stands(0, "evaluating")) == 600.0


def test_patience_where_ranks_wait_longer_for_each_other() -> None:
    patience = Patience(5.0, 600.0, {"saving": 3600.0, "loading": 30.0})
    assert [patience.seconds(stands(0, phase)) for phase in ("saving", "loading", "ending")] == [3600.0, 600.0, 600.0]
    assert patience.seconds(stands(0, "saving", stopped=True)) == 5.0


def test_patience_as_the_user_set_it() -> None:
    patience = Patience(5.0, 600.0)
    patience.learn(took(0, 30.0, count=20))
    for phase in ("reducing gradients", "waiting for data", "optimizer step"):
        assert patience.seconds(stands(0, phase)) == 5.0
    assert patience.seconds(stands(0, "saving")) == 600.0
    assert patience.seconds(replace(stands(0, "saving"), stopped=True)) == 5.0


def test_those_who_wait_are_as_patient_as_who_is_waited_for() -> None:
    patience = Patience(None, 600.0)
    patience.learn(took(0, 0.1, count=20))
    waiting = [stands(rank, still=100.0) for rank in (1, 2)]
    for phase in ("saving", "waiting for data", "evaluating"):
        assert find_hang([stands(0, phase, None, still=100.0), *waiting], patience) is None
        assert find_hang([stands(0, phase, None, still=601.0), *waiting], patience) is not None
    hang = find_hang([stands(0, "forward and backward", None, still=61.0), *waiting], patience)
    assert hang is not None and (hang.culprits, hang.patience_seconds) == ((0,), 60.0)
    assert find_hang([stands(0, "forward and backward", None, still=59.0), *waiting], patience) is None
    assert find_hang([stands(0, still=61.0), *waiting], patience) is not None, "all in one collective"


@pytest.mark.parametrize("phase", ["saving", "loading"])
def test_nobody_hangs_where_files_are_read_or_written_while_one_rank_moves(phase: str) -> None:
    patience = Patience(5.0, 600.0)
    wait = [stands(rank, phase, None, still=2000.0) for rank in (0, 1)]
    assert find_hang([*wait, stands(2, phase, None, still=1.0)], patience) is None
    assert find_hang([*wait, stands(2, phase, None, still=601.0)], patience) is not None
    assert find_hang([*wait, stands(2, still=1.0)], patience) is not None, "one that is elsewhere moves no file"
    hang = find_hang([*wait, stands(2, phase, None, still=6.0, stopped=True)], patience)
    assert hang is not None and hang.culprits == (2,)


def test_a_rank_that_reads_or_writes_moves(tmp_path: Path) -> None:
    memory = create_memory()
    beats = Heartbeat.open(os.dup(memory))
    with (
        (tmp_path / "file").open("wb") as file,
        subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=file) as writer,
    ):
        assert writer.stdin is not None
        rank = RankProcess(0, writer.pid, -1, -1, [], Pulse(memory))
        for phase, moves in (("saving", True), ("optimizer step", False), ("loading", True)):
            beats.phase(phase)
            rank.look(1.0)
            assert rank.look(1.0).still_seconds == 1.0
            assert rank.look(1.0).still_seconds == 2.0
            before = bytes_moved(writer.pid)
            assert before is not None
            writer.stdin.write(bytes(1 << 20))
            writer.stdin.flush()
            while (bytes_moved(writer.pid) or 0) < before + (1 << 20):
                time.sleep(0.01)
            assert rank.look(1.0).still_seconds == (0.0 if moves else 3.0)
    assert bytes_moved(writer.pid) is None, "it is gone"


def test_the_report_names_everyone() -> None:
    patience = Patience(5.0, 600.0)
    ranks = [stands(0), stands(1, "forward and backward", None), stands(2)]
    hang = find_hang(ranks, patience)
    assert hang is not None
    host = "node{}".format
    sentence = hang_sentence(hang, host)
    assert sentence == "rank 1 hangs for 100 s (on node1, in step 8: forward and backward); ranks 0, 2 wait"
    same = RankStack(0, "loop.py:3 in run", "all_reduce")
    stacks = {0: same, 1: RankStack(1, "model.py:9 in forward"), 2: replace(same, global_rank=2)}
    lines = hang_report(hang, host, stacks).splitlines()
    assert lines[1] == (
        "  rank 0 on node0, in step 8: reducing gradients, in all_reduce, waits in all_reduce, for 100 s"
    )
    assert lines[2].endswith("for 100 s  <- not where the others are")
    assert lines[4:] == [
        "stack of rank 1:",
        "    model.py:9 in forward",
        "stack of ranks 0, 2:",
        "    loop.py:3 in run",
    ]


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([2, 0, 1, 5], "ranks 0-2, 5"), ([0, 1], "ranks 0-1"), ([1, 3], "ranks 1, 3")]
)
def test_lists_of_ranks(ranks: list[int], text: str) -> None:
    assert rank_list(ranks) == text
