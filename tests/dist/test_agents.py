"""Several agents of one run on this machine, as srun's tasks or other hosts would be.

They find each other; whatever is killed, stopped or strange, the run goes on or ends, and nothing is left of it. Ranks
only pretend to train, but for the last tests.
"""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptdist.world import World
from launch.ranks.messages import Hello, encode
from launch.runs.attempts import read_attempts
from tests.dist.commands import Commands, curve, last_step
from tests.dist.pretended import end_at_once, train
from tests.dist.test_local_launch import await_files, is_running
from tests.dist.test_saving import children

ROOT = Path(__file__).resolve().parents[2]
AGENT = """
import json, sys
from pathlib import Path
from launch.ranks.hang import Patience
from launch.ranks.lead import Supervision
from launch.ranks.local import show_verdict
from launch.ranks.place import Allocation, Place
from launch.ranks.record import Record
from launch.ranks.slow_ranks import SlowRanks
from launch.ranks.supervise import run_agent
from gptdist.errors import LaunchError
from tests.dist import pretended
told = json.loads(sys.argv[1])
folder = Path(told["folder"])
place = Place(
    world_size=4, first_rank=2 * told["agent"], local_ranks=2, first_local_rank=2 * told["agent"], local_world_size=4,
    launcher="srun", lead_ports=tuple(told["ports"]), identity=told["identity"], key_file=folder / told["key"],
)
record = Record(folder, Allocation("slurm 7", 0, can_requeue=True), can_restart=True, fresh=False)
supervision = Supervision(record, Patience(told["hang"], 60.0), SlowRanks(2.0)) if place.leads else None
try:
    verdict = run_agent(
        place, getattr(pretended, told["target"]), told["folder"], supervision=supervision, join_seconds=told["join"],
    )
except LaunchError as error:
    sys.exit(f"error: {error}")
show_verdict(verdict)
sys.exit(verdict.exit_code)
"""


class Run:
    """Two agents of two ranks each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        first = random.randrange(20_000, 30_000)
        self.ports = list(range(first, first + 4))
        self.agents: list[subprocess.Popen[str]] = []

    def start(self, target: Callable[[World, str], int | None], agent: int, **told: object) -> "subprocess.Popen[str]":
        values = {"identity": "job 1", "key": ".key", "hang": 30.0, "join": 40.0, **told}
        values |= {"folder": str(self.folder), "ports": self.ports, "target": target.__name__, "agent": agent}
        process = subprocess.Popen(
            [sys.executable, "-c", AGENT, json.dumps(values)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.agents.append(process)
        return process

    def both(self, target: Callable[[World, str], int | None], **told: object) -> None:
        for agent in (0, 1):
            self.start(target, agent, **told)

    def ended(self, seconds: float = 60.0) -> list[tuple[int, str]]:
        """Exit code and stderr of each agent."""
        ends = []
        deadline = time.monotonic() + seconds
        for process in self.agents:
            _, err = process.communicate(timeout=max(0.1, deadline - time.monotonic()))
            ends.append((process.returncode, err))
        return ends

    def ranks(self, generation: int = 0) -> list[int]:
        """Process ids by rank, once all of a generation are training."""
        return [int(path.read_text()) for path in await_files(self.folder, 4, f"pid-{generation}-*")]

    def close(self) -> None:
        for process in self.agents:
            if process.poll() is None:
                process.kill()
            process.communicate()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    started = Run(tmp_path / "run")
    yield started
    started.close()


def gone(pids: list[int], seconds: float = 3.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(is_running(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def test_they_meet_and_end(run: Run) -> None:
    run.both(end_at_once)
    assert run.ended() == [(0, ""), (0, "")]
    worlds = {path.read_text() for path in await_files(run.folder, 4, "world-*")}
    assert len(worlds) == 1 and worlds.pop().startswith("127.0.0.1:")
    attempt = read_attempts(run.folder)[-1]
    assert (attempt.action, attempt.ranks, attempt.hosts) == ("done", 4, (os.uname().nodename,))


def test_the_lead_may_come_last(run: Run) -> None:
    run.start(end_at_once, 1)
    time.sleep(1.0)
    run.start(end_at_once, 0)
    assert run.ended() == [(0, ""), (0, "")]


def test_a_killed_rank_far_from_the_lead(run: Run) -> None:
    run.both(train)
    before = run.ranks()
    os.kill(before[3], signal.SIGKILL)
    killed_at = time.monotonic()
    after = run.ranks(1)
    assert time.monotonic() - killed_at < 5
    assert gone(before) and not set(before) & set(after)
    (run.folder / "stop").touch()
    (lead, err), other = run.ended()
    assert (lead, other) == (0, (0, ""))
    assert "rank 3 was killed by signal 9" in err and "restarting all ranks in place, from step 1" in err
    assert [attempt.action for attempt in read_attempts(run.folder)] == ["restart in place", "done"]


def test_a_killed_agent_is_a_lost_node(run: Run) -> None:
    run.both(train)
    ranks = run.ranks()
    run.agents[1].kill()
    killed_at = time.monotonic()
    assert run.agents[0].wait(15) == 75
    assert time.monotonic() - killed_at < 5
    assert gone(ranks)
    assert "lost" in run.ended()[0][1] and "with ranks 2-3" in run.ended()[0][1]
    attempt = read_attempts(run.folder)[-1]
    assert (attempt.action, attempt.exit_code, attempt.culprits) == ("requeue", 75, (os.uname().nodename,))


def test_a_killed_lead_leaves_no_orphan(run: Run) -> None:
    run.both(train)
    ranks = run.ranks()
    run.agents[0].kill()
    assert run.agents[1].wait(10) == 1
    assert gone(ranks)
    assert "lost the agent on 127.0.0.1 that leads the run" in run.ended()[1][1]
    assert read_attempts(run.folder)[-1].ended is None, "killed without a word"


def test_a_stopped_agent_is_missed(run: Run) -> None:
    run.both(train)
    ranks = run.ranks()
    run.agents[1].send_signal(signal.SIGSTOP)
    stopped_at = time.monotonic()
    assert run.agents[0].wait(15) == 75
    assert 4.5 < time.monotonic() - stopped_at < 8
    assert gone(ranks[:2])
    run.agents[1].send_signal(signal.SIGCONT)
    (_, err), (code, _) = run.ended()
    assert "nothing was heard of it for 5 s" in err and code != 0
    assert gone(ranks)


def test_a_stopped_lead_is_missed(run: Run) -> None:
    run.both(train)
    ranks = run.ranks()
    run.agents[0].send_signal(signal.SIGSTOP)
    assert run.agents[1].wait(25) == 1
    assert gone(ranks[2:])
    run.agents[0].send_signal(signal.SIGCONT)
    (code, err), _ = run.ended()
    assert code == 75 and "its connection" in err
    assert gone(ranks)


def numbers(ranks: str) -> list[int]:
    """`0-1, 3` is 0, 1 and 3."""
    runs = [[int(end) for end in run.split("-")] for run in ranks.split(", ")]
    return [number for run in runs for number in range(run[0], run[-1] + 1)]


def test_a_hang_shows_the_stacks_of_all_agents(run: Run) -> None:
    run.both(train, hang=2.0)
    ranks = run.ranks()
    os.kill(ranks[2], signal.SIGSTOP)
    stopped_at = time.monotonic()
    run.ranks(1)
    assert 2.0 < time.monotonic() - stopped_at < 2.0 + 5.0 + 1.0
    (run.folder / "stop").touch()
    (code, err), _ = run.ended()
    assert code == 0 and gone(ranks)
    assert "rank 2 is stopped" in err
    # Ranks whose stacks are the same share one: `stack of ranks 0-1, 3`.
    shown = re.findall(r"stack of ranks? ([-\d, ]+):\n((?: {4}.*\n)+)", err)
    where = [ranks for ranks, stack in shown if "in train\n" in stack]
    assert {0, 1, 3} <= {rank for ranks in where for rank in numbers(ranks)}, err  # of rank 2 only py-spy knows
    assert "it is stopped" in err and "stack of rank 2" in err


def test_a_signal_that_all_tasks_get_reaches_each_rank_once(run: Run) -> None:
    run.both(train)
    run.ranks()
    for process in run.agents:
        process.send_signal(signal.SIGUSR1)
    assert [code for code, _ in run.ended()] == [75, 75]
    for path in await_files(run.folder, 4, "caught-*"):
        assert json.loads(path.read_text()) == [signal.SIGUSR1]
    attempt = read_attempts(run.folder)[-1]
    assert (attempt.action, attempt.reason) == ("requeue", "stopped by SIGUSR1")


def test_ports_of_strangers_do_no_harm(run: Run) -> None:
    strangers = [socket.create_server(("127.0.0.1", port)) for port in run.ports[:2]]  # one says nothing,
    strangers[1].settimeout(0.0)
    run.both(end_at_once)
    deadline = time.monotonic() + 30
    talkative = []
    while any(process.poll() is None for process in run.agents) and time.monotonic() < deadline:
        try:
            connection = strangers[1].accept()[0]
            connection.send(b"SSH-2.0-OpenSSH_9.2\r\n" * 1000)  # the other another language
            talkative.append(connection)
        except BlockingIOError:
            time.sleep(0.01)
    assert [code for code, _ in run.ended()] == [0, 0]
    for listener in (*strangers, *talkative):
        listener.close()


def test_two_runs_at_the_same_ports_keep_apart(run: Run, tmp_path: Path) -> None:
    other = Run(tmp_path / "other")
    other.ports = run.ports
    try:
        for agent in (1, 0):
            run.start(end_at_once, agent, identity="job 1")
            other.start(end_at_once, agent, identity="job 2")
        assert run.ended() == other.ended() == [(0, ""), (0, "")]
        worlds = [{path.read_text() for path in await_files(one.folder, 4, "world-*")} for one in (run, other)]
        assert len(worlds[0]) == len(worlds[1]) == 1 and worlds[0] != worlds[1]
    finally:
        other.close()


def test_without_the_key_nobody_joins(run: Run) -> None:
    (run.folder / ".key").write_text("secret\n")
    run.start(end_at_once, 0, join=6.0)
    run.start(end_at_once, 1, join=2.0, key=".other")
    (lead, told), (code, err) = run.ended()
    assert code == 1 and "found no lead" in err and "another key" in err
    assert lead == 75 and "2 did not come in time: ranks 2-3" in told
    assert "secret" not in err + told


def test_strangers_at_the_door_do_no_harm(run: Run) -> None:
    """While agents join: garbage, endless lines, silence, and a guess at who we are."""
    run.start(end_at_once, 0)
    deadline = time.monotonic() + 20
    while True:
        try:
            visitors = [socket.create_connection(("127.0.0.1", run.ports[0])) for _ in range(4)]
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    visitors[0].send(b"GET / HTTP/1.1\r\n\r\n")
    visitors[1].send(b"x" * 100_000)
    guess = json.loads(encode(Hello(first_rank=2, ranks=2, host="evil", pid=1)))
    said = {"identity": "job 1", "hello": guess, "drawn": "0" * 64, "proof": "0" * 64}
    visitors[2].send(json.dumps(said).encode() + b"\n")
    assert b"another key" in b"".join(iter(lambda: visitors[2].recv(4096), b""))
    run.start(end_at_once, 1)
    assert run.ended() == [(0, ""), (0, "")]
    for visitor in visitors:
        visitor.close()


# -- through the command, as the tasks of a job ------------------------------------------------------------------------


def task(number: int, job: int) -> dict[str, str]:
    """What Slurm sets for one of two tasks on one node."""
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "SLURM_NODEID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "node1",
    }


def test_tasks_of_a_job_start_again_in_place(commands: Commands, tmp_path: Path) -> None:
    run_dir, own, job = tmp_path / "run", tmp_path / "own", random.randrange(1, 10**6)
    settings = {"train__steps": 40, "checkpoint__interval": 5}
    words = commands.train_words(run_dir, **settings)
    words = [*words[:2], *words[4:]]  # without --nproc
    tasks = [commands.start(*words, **task(number, job)) for number in (0, 1)]
    assert tasks[0].wait_until(lambda: last_step(run_dir) >= 12), [one.wait().err for one in tasks]
    os.kill(children(tasks[1]._process.pid or 0)[0], signal.SIGKILL)
    first, second = [one.wait(60).expect(0) for one in tasks]
    assert "restarting all ranks in place" in first.err and "rank 1 was killed" in first.err
    assert not second.errors
    attempts = read_attempts(run_dir)
    assert [(attempt.allocation, attempt.action) for attempt in attempts] == [
        (f"slurm {job}", "restart in place"),
        (f"slurm {job}", "done"),
    ]
    commands.train(own, 2, **settings).expect(0)
    assert curve(run_dir) == curve(own)


def test_tasks_of_a_job_hear_of_a_folder_in_use(commands: Commands, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run = commands.start_train(run_dir, 1, train__steps=100_000)
    assert run.wait_until(lambda: last_step(run_dir) >= 1), run.wait().err
    words = commands.train_words(run_dir)
    words = [*words[:2], *words[4:]]
    job = random.randrange(1, 10**6)
    tasks = [commands.start(*words, **task(number, job)) for number in (0, 1)]
    first, second = [one.wait(60) for one in tasks]
    first.one_error("in use by", str(run_dir))
    assert (second.code, second.errors) == (2, [])
    run.kill()
