"""The lead's decisions, with agents and a clock that are only pretended."""

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gptdist.errors import LaunchError
from gptdist.monitor.heartbeat import StepTimes
from launch.cluster.time_limit import TimeLimit
from launch.ranks.hang import Patience, Standing
from launch.ranks.lead import Lead, Supervision
from launch.ranks.messages import Beats, Dump, End, Ended, Exit, Hello, Order, PassOn, Signalled, Stacks, Start
from launch.ranks.place import Allocation
from launch.ranks.record import Record
from launch.ranks.slow_ranks import SlowRanks
from launch.ranks.verdict import RankEnd, Report
from launch.runs.attempts import read_attempts


class Cluster:
    """Nodes of two ranks each, and their lead."""

    def __init__(
        self, run_dir: Path, nodes: int = 2, slurm: bool = False, supervised: bool = True, limit: float = 1e6
    ) -> None:
        self.run_dir, self.nodes = run_dir, nodes
        run_dir.mkdir(exist_ok=True)
        self.now = 100.0
        self.orders: list[tuple[int, Order]] = []
        self.ports = iter(range(5000, 6000))
        allocation = Allocation("slurm 7", 0, True) if slurm else Allocation()
        record = Record(run_dir, allocation, can_restart=True, fresh=False)
        time_limit = TimeLimit(100.0 + limit, lambda: self.now)
        supervision = Supervision(record, Patience(10.0, 600.0), SlowRanks(2.0), time_limit)
        self.lead = Lead(
            2 * nodes,
            lambda: ("node0", next(self.ports)),
            lambda agent, order: self.orders.append((agent, order)),
            supervision if supervised else None,
            join_seconds=60.0,
            clock=lambda: self.now,
        )
        self.generation = -1

    def joined(self) -> "Cluster":
        for node in range(self.nodes):
            assert self.lead.welcome(Hello(first_rank=2 * node, ranks=2, host=f"node{node}", pid=1)) is None
        self.tick()
        return self

    def trains(self, step: int = 5, saved: int | None = 3) -> "Cluster":
        self.generation += 1
        for rank in range(2 * self.nodes):
            self.stand(rank, step=step, saved=saved)
        return self

    def stand(
        self,
        rank: int,
        *,
        step: int = 5,
        saved: int | None = 3,
        still: float = 0.0,
        busy: bool = False,
        save_seconds: float = 0.0,
    ) -> None:
        phase, collective = ("forward and backward", None) if busy else ("reducing gradients", "all_reduce")
        times = (StepTimes(step, 0.1, 0, 0.1, 0),)
        standing = Standing(rank, False, step, phase, collective, still, saved, times, save_seconds)
        self.lead.hear(rank // 2 * 2, Beats(generation=self.generation, standings=(standing,)))

    def end(self, rank: int, code: int | None = 0, number: int | None = None, said: Report | None = None) -> None:
        end = RankEnd(rank, code, number, said, int(self.now * 1e9))
        word = Ended(generation=self.generation, end=end, now_nanoseconds=int(self.now * 1e9))
        self.lead.hear(rank // 2 * 2, word)

    def end_all(self, number: int = signal.SIGTERM) -> None:
        for rank in range(2 * self.nodes):
            if rank not in self.lead._generation.ends:
                self.end(rank, None, number)
        self.tick(2)

    def tick(self, times: int = 1, seconds: float = 0.1) -> None:
        for _ in range(times):
            self.now += seconds
            self.lead.tick()

    def took(self, kind: Callable[..., Order]) -> list[tuple[int, Order]]:
        """Orders of one kind since the last look."""
        found = [(agent, order) for agent, order in self.orders if isinstance(order, kind)]  # type: ignore[arg-type]
        self.orders = [entry for entry in self.orders if entry not in found]
        return found


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "run").joined()


def said(message: str, deliberate: bool = False, echo: bool = False, code: int = 1) -> Report:
    return Report("ValueError", message, "Traceback ...\n", code, deliberate, echo, 0)


def test_all_start_once_all_are_there(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", nodes=3)
    for node in (2, 0, 1):
        assert cluster.took(Start) == []
        cluster.lead.welcome(Hello(first_rank=2 * node, ranks=2, host=f"node{node}", pid=1))
        cluster.tick()
    started = cluster.took(Start)
    assert sorted(agent for agent, _ in started) == [0, 2, 4]
    assert {order for _, order in started} == {Start(generation=0, master_address="node0", master_port=5000)}


def test_strangers_are_refused(cluster: Cluster) -> None:
    lead = cluster.lead
    assert "already came from node1" in (lead.welcome(Hello(first_rank=3, ranks=1, host="x", pid=1)) or "")
    assert "ranks up to 4 of 4" in (lead.welcome(Hello(first_rank=4, ranks=1, host="x", pid=1)) or "")


@pytest.mark.parametrize(("codes", "code"), [((0, 0, 0, 0), 0), ((75, 75, 75, 75), 75), ((0, 75, 0, 0), 75)])
def test_a_good_end(codes: tuple[int, ...], code: int, cluster: Cluster) -> None:
    cluster.trains()
    for rank, value in enumerate(codes):
        assert cluster.lead.verdict is None
        cluster.end(rank, value)
        cluster.tick(2)
    assert cluster.lead.verdict is not None and cluster.lead.verdict.exit_code == code
    assert [order for _, order in cluster.took(Exit)] == [Exit(code=code)] * 2
    attempt = read_attempts(cluster.run_dir)[-1]
    assert (attempt.action, attempt.exit_code, attempt.last_step) == ("done" if code == 0 else "stop", code, 5)


def test_a_killed_rank_is_named_and_all_start_again(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.took(Start)
    cluster.trains().end(2, None, signal.SIGKILL)
    cluster.tick()
    assert cluster.took(End) == [], "how the others end may say more"
    cluster.tick(3)
    assert [agent for agent, _ in cluster.took(End)] == [0, 2]
    cluster.tick(3)
    assert cluster.took(Start) == [], "not while ranks are left"
    cluster.end_all()
    restarted = cluster.took(Start)
    assert restarted == [(agent, Start(generation=1, master_address="node0", master_port=5001)) for agent in (0, 2)]
    err = capsys.readouterr().err
    where = "(on node1, in step 6: reducing gradients, in all_reduce)"
    assert f"rank 2 was killed by signal 9 (SIGKILL): out of memory? {where}\n" in err
    assert "restarting all ranks in place, from step 3" in err
    first, second = read_attempts(cluster.run_dir)
    assert (first.culprits, first.saved_step, first.last_step) == (("node1",), 3, 5)
    assert where in (first.reason or "") and second.ended is None


def test_words_of_an_earlier_generation_are_too_late(cluster: Cluster) -> None:
    cluster.trains().end(2, None, signal.SIGKILL)
    cluster.tick(4)
    cluster.end_all()
    cluster.end(0, 0)  # still of generation 0
    cluster.trains()
    assert cluster.lead._running() == [0, 1, 2, 3]


def test_the_first_real_error_counts_on_whichever_clock(cluster: Cluster) -> None:
    cluster.trains()
    cluster.end(0, 1, said=said("Connection closed by peer", echo=True))
    cluster.tick(20)
    assert cluster.lead.verdict is None, "the lost one is still to show"
    boom = replace(said("boom", deliberate=True), at_nanoseconds=7_000_000_000)
    end = RankEnd(3, 1, None, boom, 8_000_000_000)
    cluster.lead.hear(2, Ended(generation=0, end=end, now_nanoseconds=9_000_000_000))
    assert cluster.lead._generation.ends[3].at_nanoseconds == pytest.approx((cluster.now - 1) * 1e9, abs=10)
    cluster.tick(11)
    cluster.end_all()
    verdict = cluster.lead.verdict
    assert verdict is not None and (verdict.exit_code, verdict.message) == (1, "[rank 3] boom")


def test_what_is_the_users_to_mend_ends_it_at_once(cluster: Cluster) -> None:
    for rank in range(4):
        cluster.generation = 0
        cluster.end(rank, 2, said=said("train.steps is wrong", deliberate=True, code=2))
    cluster.tick(3)
    verdict = cluster.lead.verdict
    assert verdict is not None and (verdict.exit_code, verdict.message) == (2, "train.steps is wrong")
    assert read_attempts(cluster.run_dir) == [], "training had not begun"


@pytest.mark.parametrize(("slurm", "code"), [(True, 75), (False, 1)])
def test_a_node_that_is_unfit_before_the_first_step(slurm: bool, code: int, tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", slurm=slurm).joined()
    cluster.generation = 0
    unfit = replace(said("node1 cannot take part", deliberate=True), unfit=("node1",))
    for rank in range(4):
        cluster.end(rank, 1, said=unfit)
    cluster.tick(3)
    verdict = cluster.lead.verdict
    assert verdict is not None and (verdict.exit_code, verdict.message) == (code, "node1 cannot take part")
    attempts = [(each.action, each.culprits) for each in read_attempts(cluster.run_dir)]
    assert attempts == ([("requeue", ("node1",))] if slurm else []), "locally nothing had begun"


def test_a_rank_that_just_leaves_in_the_middle(cluster: Cluster) -> None:
    cluster.trains()
    end = RankEnd(1, 0, None, None, int(cluster.now * 1e9), premature=True)
    cluster.lead.hear(0, Ended(generation=0, end=end, now_nanoseconds=int(cluster.now * 1e9)))
    cluster.tick(4)
    cluster.end_all()
    assert "rank 1 ended with exit code 0 without saying why" in (read_attempts(cluster.run_dir)[0].reason or "")


def test_a_hang_is_reported_with_stacks_and_ended(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.trains()
    for rank in range(4):
        cluster.stand(rank, still=9.0, busy=rank == 3)
    cluster.tick(2)
    assert cluster.took(Dump) == []
    for rank in range(4):
        cluster.stand(rank, still=10.5, busy=rank == 3)
    cluster.tick(3)
    assert [agent for agent, _ in cluster.took(Dump)] == [0, 2]
    from launch.ranks.failure_report import RankStack

    stacks = [RankStack(rank, "model.py:1 in forward" if rank == 3 else "loop.py:2 in run") for rank in range(4)]
    cluster.lead.hear(0, Stacks(generation=0, stacks=tuple(stacks[:2])))
    cluster.tick()
    assert cluster.took(End) == []
    cluster.lead.hear(2, Stacks(generation=0, stacks=tuple(stacks[2:])))
    cluster.tick()
    assert len(cluster.took(End)) == 2
    err = capsys.readouterr().err
    assert "stack of rank 3:\n    model.py:1 in forward\nstack of ranks 0-2:\n    loop.py:2 in run" in err
    assert "rank 3 hangs for 10 s (on node1, in step 6: forward and backward); ranks 0-2 wait" in err
    assert read_attempts(cluster.run_dir)[0].culprits == ("node1",)


def test_a_hang_is_ended_also_where_no_stack_comes(cluster: Cluster) -> None:
    cluster.trains()
    for rank in range(4):
        cluster.stand(rank, still=10.5)
    cluster.tick(50)
    assert len(cluster.took(End)) == 2


def test_a_lost_node_is_requeued_without_it(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", slurm=True).joined().trains()
    cluster.lead.lose(2, "its connection was closed")
    for rank in (0, 1):
        cluster.end(rank, None, signal.SIGTERM)
    cluster.tick(2)
    verdict = cluster.lead.verdict
    assert verdict is not None and verdict.exit_code == 75
    assert verdict.message.startswith("lost node1 with ranks 2-3: its connection was closed.")
    attempt = read_attempts(cluster.run_dir)[-1]
    assert (attempt.action, attempt.culprits, attempt.exit_code) == ("requeue", ("node1",), 75)
    assert [agent for agent, _ in cluster.took(Exit)] == [0]


def test_a_node_lost_while_ranks_make_room(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", slurm=True).joined().trains()
    cluster.end(0, None, signal.SIGKILL)
    cluster.tick(4)
    cluster.took(Start)
    cluster.lead.lose(2, "it said nothing for 5 s")
    cluster.end(1, None, signal.SIGTERM)
    cluster.tick(3)
    assert cluster.took(Start) == []
    assert cluster.lead.verdict is not None and cluster.lead.verdict.exit_code == 75
    assert [attempt.action for attempt in read_attempts(cluster.run_dir)] == ["requeue"]


def test_ranks_that_nobody_can_end(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", slurm=True).joined().trains()
    cluster.end(0, None, signal.SIGKILL)
    cluster.tick(4)
    for rank in (1, 2):
        cluster.end(rank, None, signal.SIGKILL)
    cluster.tick(350)
    cluster.tick(3)
    verdict = cluster.lead.verdict
    assert verdict is not None and verdict.exit_code == 75 and "cannot be ended" in verdict.message
    assert read_attempts(cluster.run_dir)[-1].culprits == ("node1",)


def test_agents_that_never_come(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", slurm=True)
    cluster.lead.welcome(Hello(first_rank=0, ranks=2, host="node0", pid=1))
    cluster.tick(2, 31.0)
    cluster.tick()
    verdict = cluster.lead.verdict
    assert verdict is not None and verdict.exit_code == 75 and "2 did not come in time: ranks 2-3" in verdict.message


def test_a_signal_is_passed_on_once_and_ends_restarts(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", slurm=True).joined().trains()
    for agent in (0, 2, 0):
        cluster.lead.hear(agent, Signalled(number=signal.SIGUSR1))
    assert cluster.took(PassOn) == [(agent, PassOn(number=signal.SIGUSR1)) for agent in (0, 2)]
    for rank in range(4):
        cluster.end(rank, 75)
    cluster.tick(2)
    assert cluster.lead.verdict is not None and cluster.lead.verdict.exit_code == 75
    attempt = read_attempts(cluster.run_dir)[-1]
    assert (attempt.action, attempt.reason, attempt.failed) == ("requeue", "stopped by SIGUSR1", False)


def test_a_failure_while_stopping_starts_nothing_again(cluster: Cluster) -> None:
    cluster.trains()
    cluster.lead.hear(0, Signalled(number=signal.SIGTERM))
    cluster.end(1, None, signal.SIGKILL)
    cluster.tick(4)
    cluster.end_all(signal.SIGKILL)
    assert cluster.lead.verdict is not None and cluster.lead.verdict.exit_code == 1


def test_a_signal_while_ranks_make_room(cluster: Cluster) -> None:
    cluster.trains().end(1, None, signal.SIGKILL)
    cluster.tick(4)
    cluster.took(Start)
    cluster.lead.hear(2, Signalled(number=signal.SIGTERM))
    cluster.end_all()
    cluster.tick(2)
    assert cluster.took(Start) == [] and cluster.lead.verdict is not None


def test_ctrl_c_once_saves_and_twice_kills(cluster: Cluster) -> None:
    cluster.trains()
    for agent in (0, 2):  # srun gives it to all its tasks
        cluster.lead.hear(agent, Signalled(number=signal.SIGINT))
    assert [order for _, order in cluster.took(PassOn)] == [PassOn(number=signal.SIGTERM)] * 2
    cluster.lead.hear(2, Signalled(number=signal.SIGINT))
    assert [order for _, order in cluster.took(End)] == [End(grace_seconds=0.0)] * 2
    cluster.end_all(signal.SIGKILL)
    assert cluster.lead.verdict is not None and cluster.lead.verdict.exit_code == 130
    attempt = read_attempts(cluster.run_dir)[-1]
    assert (attempt.action, attempt.exit_code, attempt.reason) == ("stop", 130, "stopped by SIGINT")


def test_what_an_agent_has_no_say_in_is_passed_over(cluster: Cluster) -> None:
    cluster.trains()
    cluster.lead.hear(0, Signalled(number=signal.SIGKILL))
    cluster.lead.hear(0, Signalled(number=9999))
    now = int(cluster.now * 1e9)
    killed = RankEnd(3, None, 9, None, now)
    cluster.lead.hear(0, Ended(generation=0, end=killed, now_nanoseconds=now))  # of a rank of the other agent
    cluster.lead.hear(0, Beats(generation=0, standings=(Standing(3, True, 9, "saving", None, 1e9),)))
    cluster.tick(5)
    assert cluster.took(PassOn) == cluster.took(End) == cluster.took(Dump) == []


def test_a_slow_rank_is_named(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.trains()
    for step in range(6, 30):
        for rank in range(4):
            own = 0.5 if rank == 2 else 0.1
            times = (StepTimes(step, 0.5, 0, own, 0.5 - own),)
            standing = Standing(rank, False, step, "reducing gradients", "all_reduce", 0.0, 3, times)
            cluster.lead.hear(rank // 2 * 2, Beats(generation=0, standings=(standing,)))
        cluster.tick(1, 0.5)
    err = capsys.readouterr().err
    assert err.count("warning: rank 2 is ") == 1 and "it is on node1" in err


def test_ranks_that_are_only_started(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", nodes=1, supervised=False).joined().trains()
    cluster.stand(0, still=1e6)
    cluster.stand(1, still=1e6)
    cluster.tick(50)
    assert cluster.took(Dump) == []
    cluster.end(1, None, signal.SIGKILL)
    cluster.tick(4)
    cluster.end_all()
    verdict = cluster.lead.verdict
    assert verdict is not None and verdict.message == "rank 1 was killed by signal 9 (SIGKILL): out of memory?"
    assert list(cluster.run_dir.iterdir()) == []


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    def taken() -> tuple[str, int]:
        raise LaunchError("the port is taken")

    lead = Lead(1, taken, lambda agent, order: None)
    lead.welcome(Hello(first_rank=0, ranks=1, host="node0", pid=1))
    with pytest.raises(LaunchError):
        lead.tick()


def test_ranks_save_before_the_time_is_over_the_earlier_the_longer_a_save_takes(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", slurm=True, limit=1000.0).joined().trains()
    cluster.stand(1, save_seconds=50.0)
    cluster.tick(seconds=868.0)  # margin 30, twice a save and a step
    assert cluster.took(PassOn) == []
    cluster.tick(2, seconds=1.0)
    passed = [order for _, order in cluster.took(PassOn)]
    assert passed == 2 * [PassOn(number=signal.SIGUSR1)]
    cluster.lead.hear(0, Signalled(number=signal.SIGUSR1))  # the warning of the scheduler, later
    cluster.tick()
    assert cluster.took(PassOn) == []
    for rank in range(4):
        cluster.end(rank, 75)
    cluster.tick(2)
    (attempt,) = read_attempts(cluster.run_dir)
    assert (attempt.action, attempt.exit_code, attempt.reason) == ("requeue", 75, "stopped by its time limit")
    assert not attempt.failed


def test_nobody_is_asked_to_save_before_training_has_begun(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "run", slurm=True, limit=1000.0).joined()
    cluster.tick(seconds=995.0)
    assert cluster.took(PassOn) == []
