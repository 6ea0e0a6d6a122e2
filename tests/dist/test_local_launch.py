"""Real forked ranks with tiny targets, no engine: exit codes, the first real error, signals, output, no orphans.

Each launch runs in a process of its own, as the command does: signals and a kill must not reach pytest.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from gptdist.errors import ConfigError, StorageError
from gptdist.world import World
from tests.dist.pretended import announce

LAUNCH = """
import sys
from launch.ranks.local import launch_local
from tests.dist import test_local_launch as targets
nproc, name, payload = int(sys.argv[1]), sys.argv[2], sys.argv[3]
sys.exit(launch_local(nproc, getattr(targets, name), payload, timeout_seconds=30))
"""
ROOT = Path(__file__).resolve().parents[2]


def start(nproc: int, target: Callable[[World, str], int | None], payload: str = "") -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(nproc), target.__name__, payload],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def launch(nproc: int, target: Callable[[World, str], int | None], payload: str = "") -> tuple[int, str, str]:
    process = start(nproc, target, payload)
    out, err = process.communicate(timeout=40)
    return process.returncode, out, err


def await_files(folder: Path, count: int, pattern: str = "*") -> list[Path]:
    deadline = time.monotonic() + 10
    while len(found := sorted(folder.glob(pattern))) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} files in {folder}"
        time.sleep(0.01)
    return found


def is_running(pid: int) -> bool:
    """Not a zombie: the init process of a container may never reap."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def return_codes(world: World, codes: str) -> int:
    return int(codes.split(",")[world.global_rank])


def speak(world: World, payload: str) -> None:
    print(f"out {world.global_rank} of {world.world_size} at {world.master_port > 0}")
    print(f"err {world.global_rank}", file=sys.stderr)
    os.write(1, b"raw")  # no end of line, past sys.stdout


def fail_on_one(world: World, payload: str) -> None:
    if world.global_rank == 2:
        raise ValueError("the real one")
    time.sleep(0.1)
    raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")


def fail_while_others_hang(world: World, payload: str) -> None:
    if world.global_rank == 1:
        raise StorageError("no space left.")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def fail_alike(world: World, payload: str) -> None:
    raise ConfigError("train.steps (0) must be at least 1.")


def die(world: World, number: str) -> None:
    if world.global_rank == 1:
        os.kill(os.getpid(), int(number))
    time.sleep(60)


def wait_for_signal(world: World, folder: str) -> int:
    seen: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: seen.append(number))
    announce(folder, f"ready-{world.global_rank}", str(os.getpid()))
    while not seen:
        time.sleep(0.01)
    announce(folder, f"seen-{world.global_rank}", signal.Signals(seen[0]).name)
    return 75


def sleep_through(world: World, folder: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    announce(folder, f"ready-{world.global_rank}", str(os.getpid()))
    time.sleep(60)


def sleep(world: World, folder: str) -> None:
    announce(folder, f"ready-{world.global_rank}", str(os.getpid()))
    time.sleep(60)


@pytest.mark.parametrize(
    ("codes", "code"), [("0", 0), ("0,0,0", 0), ("75,75", 75), ("0,75", 75), ("0,2,0", 2), ("93,93", 93)]
)
def test_exit_codes(codes: str, code: int) -> None:
    assert launch(codes.count(",") + 1, return_codes, codes)[0] == code


def test_output_is_tagged_line_by_line() -> None:
    code, out, err = launch(3, speak)
    assert code == 0
    lines = out.replace("raw", "", 1).splitlines() if out.startswith("raw") else out.splitlines()
    for global_rank in (1, 2):
        assert f"[rank {global_rank}] out {global_rank} of 3 at True" in out.replace("raw[", "[").splitlines()
        assert f"[rank {global_rank}] raw" in out
        assert f"[rank {global_rank}] err {global_rank}" in err.splitlines()
    assert any(line.removeprefix("raw") == "out 0 of 3 at True" for line in lines), "rank 0 writes for itself"
    assert "err 0" in err.splitlines()


def test_the_first_real_error_is_shown_once() -> None:
    code, _, err = launch(4, fail_on_one)
    assert code == 1
    assert err.count("Traceback") == 1 and "Connection closed" not in err
    assert err.rstrip().endswith("error: [rank 2] ValueError: the real one")
    assert "fail_on_one" in err and "run_as_rank" not in err


def test_ranks_that_would_hang_are_ended() -> None:
    begun = time.monotonic()
    code, _, err = launch(3, fail_while_others_hang)
    assert (code, err) == (2, "error: [rank 1] no space left.\n")
    assert time.monotonic() - begun < 8, "settle, TERM, grace, KILL"


def test_the_same_mistake_is_told_once() -> None:
    assert launch(3, fail_alike) == (2, "", "error: train.steps (0) must be at least 1.\n")


def test_a_killed_rank_is_named() -> None:
    code, _, err = launch(2, die, str(int(signal.SIGKILL)))
    assert (code, err) == (1, "error: rank 1 was killed by signal 9 (SIGKILL): out of memory?\n")


@pytest.mark.parametrize(
    ("sent", "received"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1"), (signal.SIGUSR2, "SIGUSR2"), (signal.SIGINT, "SIGTERM")],
)
def test_signals_reach_every_rank(sent: signal.Signals, received: str, tmp_path: Path) -> None:
    process = start(2, wait_for_signal, str(tmp_path))
    await_files(tmp_path, 2, "ready-*")
    if sent == signal.SIGINT:
        os.killpg(process.pid, sent)  # a terminal sends Ctrl-C to the ranks as well
    else:
        process.send_signal(sent)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert [path.read_text() for path in sorted(tmp_path.glob("seen-*"))] == [received] * 2


def test_a_second_interrupt_ends_stubborn_ranks(tmp_path: Path) -> None:
    process = start(2, sleep_through, str(tmp_path))
    pids = [int(path.read_text()) for path in await_files(tmp_path, 2, "ready-*")]
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None and "Ctrl-C again" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=5)
    assert process.returncode == 130
    assert not any(is_running(pid) for pid in pids)


def test_stopped_before_the_ranks_listen(tmp_path: Path) -> None:
    process = start(2, sleep, str(tmp_path))
    await_files(tmp_path, 2, "ready-*")
    process.terminate()
    _, err = process.communicate(timeout=10)
    assert process.returncode == 75
    assert err.startswith("error: stopped before") and err.count("\n") == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a rank dies with its launcher through Linux's prctl")
def test_no_orphan_after_the_launcher_is_killed(tmp_path: Path) -> None:
    process = start(3, sleep_through, str(tmp_path))
    pids = [int(path.read_text()) for path in await_files(tmp_path, 3, "ready-*")]
    assert all(is_running(pid) for pid in pids)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 2
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived its launcher by 2 s"
        time.sleep(0.01)
    process.communicate()


def test_a_port_in_use_is_the_users_to_mend() -> None:
    program = (
        "from launch.rendezvous import open_listener\nfrom launch import cli\n"
        "from launch.ranks.local import launch_local\n"
        "from gptdist.errors import LaunchError\nimport sys\n"
        "taken = open_listener('127.0.0.1', 0)\n"
        "try: launch_local(2, lambda world, payload: print('ran'), port=taken.getsockname()[1])\n"
        "except LaunchError as error: sys.exit(error.exit_code)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")


JOIN = """
import os, sys
from launch.ranks.local import launch_local
def check_listeners():
    own = set()
    for fd in os.listdir("/proc/self/fd"):
        try: own.add(os.readlink(f"/proc/self/fd/{fd}"))
        except OSError: pass  # the listing's own
    rows = [line.split() for table in ("tcp", "tcp6") for line in open(f"/proc/net/{table}")]
    mine = [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]
    assert mine and all(address.startswith("0100007F:") for address in mine), mine
def add(world, payload):
    import torch, torch.distributed as dist
    from launch.rendezvous import join, leave
    comms = join(world, 20.0, "cpu")
    assert comms.gather(world.global_rank) == list(range(world.world_size))
    total = torch.tensor([2.0**world.global_rank]); dist.all_reduce(total)
    check_listeners()
    leave()
    assert "RANK" not in os.environ
    return 0 if total.item() == 2**world.world_size - 1 else 1
sys.exit(launch_local(3, add, preload=("torch.distributed",), timeout_seconds=60))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/net/tcp")
def test_ranks_join_over_loopback_only() -> None:
    ended = subprocess.run([sys.executable, "-c", JOIN], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


LATE = """
import sys
from launch.ranks.local import launch_local
def late(world, payload):
    import time
    from launch.rendezvous import join
    if world.global_rank:
        time.sleep(60)
    join(world, 1.0, "cpu")
sys.exit(launch_local(3, late, preload=("torch.distributed",), timeout_seconds=60))
"""


def test_a_rank_that_does_not_come_is_named() -> None:
    ended = subprocess.run([sys.executable, "-c", LATE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "Of 3 ranks, 2 did not join" in ended.stderr and "1, 2." in ended.stderr
    assert "Traceback" not in ended.stderr


def test_one_rank_joins_without_a_port(monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "from gptdist.world import World\nfrom launch.rendezvous import join, leave\nimport torch.distributed as dist\n"
        "comms = join(World(), 10.0, 'cpu')\nassert dist.get_world_size() == 1 and comms.gather(7) == [7]\nleave()\n"
        "assert not dist.is_initialized()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
