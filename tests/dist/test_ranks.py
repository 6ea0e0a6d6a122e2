"""The pool of ranks itself: what a failure shows, what a hang costs, and that nothing survives a killed pytest."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gptdist.world import World
from tests.dist.ranks import RankError, RankPool

ROOT = Path(__file__).resolve().parents[2]
# Two ranks that say who they are and are busy when their parent is killed.
KILLED = """
from tests.dist.ranks import RankPool
from tests.dist.test_ranks import say_and_hang
if __name__ == "__main__":
    RankPool().run(say_and_hang, 2)
"""


def process_id(world: World) -> int:
    return os.getpid()


def total(world: World, number: int) -> int:
    tensor = torch.tensor([world.global_rank * number])
    dist.all_reduce(tensor)
    return int(tensor)


def fail_on_one(world: World) -> None:
    if world.global_rank == 1:
        raise ValueError("this rank's own error")
    dist.barrier()


def hang_on_one(world: World) -> None:
    if world.global_rank == 1:
        time.sleep(60)


def say_and_hang(world: World) -> None:
    os.write(1, f"{os.getpid()}\n".encode())  # in one piece, whatever the other rank writes
    time.sleep(60)


def is_running(pid: int) -> bool:
    """Not a zombie: the init process of a container may never reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_same_processes_serve_groups_of_any_size(pool: RankPool) -> None:
    first = pool.run(process_id, 3)
    assert len(set(first)) == 3
    assert pool.run(process_id, 2) == first[:2]
    assert pool.run(total, 3, 10) == [30, 30, 30]
    assert pool.run(total, 1, 10) == [0]


def test_the_error_of_the_rank_that_failed_is_shown_and_the_pool_goes_on(pool: RankPool) -> None:
    with pytest.raises(RankError, match=r"rank 1 failed:(?s:.*)this rank's own error"):
        pool.run(fail_on_one, 2)
    assert pool.run(total, 2, 1) == [1, 1]


def test_a_hang_ends_the_ranks_and_the_pool_goes_on(pool: RankPool) -> None:
    before = pool.run(process_id, 2)
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2"):
        pool.run(hang_on_one, 2, timeout_seconds=2.0)
    assert not any(is_running(pid) for pid in before)
    assert pool.run(total, 2, 1) == [1, 1]


def test_killing_the_parent_leaves_no_rank() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", KILLED], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    assert len(pids) == 2 and all(is_running(pid) for pid in pids)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 5
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its parent"
        time.sleep(0.05)
