"""Ranks that are killed, stopped or left alone in the middle of a run: noticed, named, and started again in place.

Through the command, on a tiny model; what follows is held against the same run left in peace, bit for bit.
"""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from launch.runs.attempts import Attempt, read_attempts
from tests.dist.commands import Command, Commands, curve, last_step, state_bytes
from tests.dist.test_saving import children

STEPS = 60
SETTINGS = {"train__steps": STEPS, "checkpoint__interval": 10}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    Commands(folder, corpus).train(folder / "run", 3, **SETTINGS).expect(0)
    return folder / "run"


def pids(run: Command) -> list[int]:
    """Of its ranks, in their order."""
    return sorted(children(run._process.pid or 0))


def await_attempts(run_dir: Path, count: int) -> list[Attempt]:
    deadline = time.monotonic() + 60
    while len(attempts := read_attempts(run_dir)) < count:
        assert time.monotonic() < deadline, attempts
        time.sleep(0.02)
    return attempts


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_is_named_and_all_start_again(
    victim: int, undisturbed: Path, commands: Commands, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run = commands.start_train(run_dir, 3, **SETTINGS)
    assert run.wait_until(lambda: last_step(run_dir) >= 25), run.wait().err
    before = pids(run)
    os.kill(before[victim], signal.SIGKILL)
    killed_at = time.time()
    first, second = await_attempts(run_dir, 2)
    assert second.began - killed_at < 5
    ended = run.wait(60).expect(0)
    first, second = read_attempts(run_dir)

    host = os.uname().nodename
    assert first.reason is not None and f"rank {victim} was killed by signal 9" in first.reason
    assert re.search(rf"\(on {re.escape(host)}, in step \d+: [a-z ]+", first.reason)
    assert (first.action, first.culprits, first.failed) == ("restart in place", (host,), True)
    assert (second.action, second.generation, second.exit_code) == ("done", 1, 0)
    assert second.start_step == first.saved_step in (10, 20, 30, 40)
    assert ended.err.count("restarting all ranks in place") == 1 and not ended.errors
    assert curve(run_dir) == curve(undisturbed)
    assert state_bytes(run_dir) == state_bytes(undisturbed)


def test_a_stopped_rank_hangs_the_run_and_is_named(undisturbed: Path, commands: Commands, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = commands.start_train(run_dir, 3, **SETTINGS, launch__hang_timeout="3s")
    assert run.wait_until(lambda: last_step(run_dir) >= 25), run.wait().err
    os.kill(pids(run)[1], signal.SIGSTOP)
    stopped_at = time.time()
    first, second = await_attempts(run_dir, 2)
    assert 2.5 < second.began - stopped_at < 3 + 5 + 2
    ended = run.wait(60).expect(0)

    assert (
        first.reason is not None and first.reason.startswith("rank 1 is stopped") and "ranks 0, 2 wait" in first.reason
    )
    assert "rank 1 on" in ended.err and "<- not where the others are" in ended.err
    assert re.search(r"stack of rank[s]? .*0.*:\n.*", ended.err) and "loop.py" in ended.err
    assert curve(run_dir) == curve(undisturbed)
    assert state_bytes(run_dir) == state_bytes(undisturbed)


def test_killed_before_the_first_step_it_is_not_started_again(commands: Commands, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = commands.start_train(run_dir, 2, **SETTINGS)
    assert run.wait_until(lambda: len(pids(run)) == 2)
    os.kill(pids(run)[1], signal.SIGKILL)
    run.wait(30).one_error("rank 1 was killed by signal 9", code=1)
    assert not run_dir.exists(), "nothing is left of it"


def test_a_crash_loop_is_given_up(commands: Commands, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = commands.start_train(run_dir, 2, train__steps=100_000, checkpoint__interval=0)
    for number in range(4):
        await_attempts(run_dir, number + 1)
        reached = last_step(run_dir) if number == 0 else 0
        assert run.wait_until(lambda reached=reached: last_step(run_dir) > reached and len(pids(run)) == 2)
        time.sleep(0.3)
        os.kill(pids(run)[1], signal.SIGKILL)
    ended = run.wait(60)
    ended.one_error("rank 1 was killed by signal 9", code=93)
    assert "3 restarts in a row saved no step after 0" in ended.err
    attempts = read_attempts(run_dir)
    assert [attempt.action for attempt in attempts] == ["restart in place"] * 3 + ["stop"]
    assert attempts[-1].exit_code == 93


def test_a_second_run_in_the_same_folder_is_refused(commands: Commands, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = commands.start_train(run_dir, 2, train__steps=100_000)
    assert run.wait_until(lambda: last_step(run_dir) >= 2), run.wait().err
    host, pid = os.uname().nodename, run._process.pid
    commands.train(run_dir, 1).one_error(str(run_dir), f"on {host}, process {pid} (local)", "launch.run_dir")
    os.kill(pids(run)[0], signal.SIGKILL)
    await_attempts(run_dir, 2)
    commands.train(run_dir, 1).one_error("in use by", str(pid))
    run.kill()
    commands.train(run_dir, 1, train__steps=last_step(run_dir) + 1).expect(0)
    assert not (run_dir / ".lock").exists()
