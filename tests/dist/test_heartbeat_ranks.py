"""What several ranks' heartbeats say: phases, collectives, who waits for whom; being watched changes nothing."""

import faulthandler
import itertools
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gptdist.config.load import load_run
from gptdist.engine.clock import StepClock
from gptdist.monitor.heartbeat import COLLECTIVES, Pulse, StepTimes
from gptdist.world import World
from launch import train as train_module
from launch.ranks.slow_ranks import find_slow_ranks, rank_loads
from launch.ranks.stacks import STACK_SIGNAL, answer_stacks, ask_stacks, create_pad
from tests.dist.cases import CLASSIC, Case, batch_of, engine_of, train
from tests.dist.commands import Commands
from tests.dist.fork_server import fork_server
from tests.dist.ranks import RankPool
from tests.noted_heartbeat import NotedHeartbeat

PHASES = {"waiting for data", "forward and backward", "reducing gradients", "optimizer step", "logging"}
CASES = {
    "DP2 zero1": Case(CLASSIC, 2, {"zero_stage": 1}),
    "DP2 zero2": Case(CLASSIC, 2, {"zero_stage": 2}),
    "DP2 zero3": Case(CLASSIC, 2, {"zero_stage": 3}),
    "TP2+SP": Case(CLASSIC, 2, {"tensor": 2, "sequence": True}),
    "PP2": Case(CLASSIC, 2, {"pipeline": 2}),
    "PP2xVPP2": Case(CLASSIC, 2, {"pipeline": 2, "virtual_pipeline": 2}),
    "TP2 x PP2": Case(CLASSIC, 4, {"tensor": 2, "pipeline": 2}),
}
# In which phase each layout is to be seen waiting in what.
WAITS = {
    "DP2 zero1": {("reducing gradients", "all_to_all"), ("optimizer step", "all_gather")},
    "DP2 zero2": {("optimizer step", "all_gather")},
    "DP2 zero3": {("forward and backward", "all_gather")},
    "TP2+SP": {("forward and backward", "reduce_scatter"), ("forward and backward", "all_gather")},
    "PP2": {("forward and backward", "recv"), ("forward and backward", "send"), ("reducing gradients", "all_reduce")},
    "PP2xVPP2": {("forward and backward", "recv")},
    "TP2 x PP2": {("forward and backward", "recv"), ("forward and backward", "all_reduce")},
}


@dataclass(frozen=True)
class Watched:
    """What one rank's clock saw of a few steps."""

    curve: list[tuple[float, float]]
    phases: set[str]
    inside: set[tuple[str, str]]
    recent: tuple[StepTimes, ...]


def watched(world: World, case: Case, steps: int, slow_rank: int = -1) -> Watched:
    """Train under a clock; `slow_rank` takes seven times as long for each forward pass."""
    heartbeat = NotedHeartbeat()
    clock = StepClock(heartbeat)
    with clock.watching_collectives("cpu"), engine_of(case, world, clock) as engine:
        if world.global_rank == slow_rank:
            for chunk in engine.network.chunks:
                slow_down(chunk)
        curve = []
        for step in range(1, steps + 1):
            clock.begin_step()
            report = engine.train_step(batch_of(case, world, step), 1e-3, step)
            clock.end_step(step, 0.0)
            curve.append((report.loss, report.grad_norm))
    beat = heartbeat.pulse.read()
    assert beat.collective is None and beat.step == steps
    return Watched(curve, set(heartbeat.phases), heartbeat.inside, beat.recent)


def slow_down(chunk: nn.Module) -> None:
    began = 0.0

    def begin(*_: object) -> None:
        nonlocal began
        began = time.perf_counter()

    def end(*_: object) -> None:
        time.sleep(max(0.06, 6 * (time.perf_counter() - began)))

    chunk.register_forward_pre_hook(begin)
    chunk.register_forward_hook(end)


def small(case: Case) -> Case:
    """Two micro-batches in all, for tests of many steps."""
    return replace(case, train={"global_batch_size": 2})


@pytest.mark.parametrize("name", CASES)
def test_being_watched_changes_no_loss_and_every_wait_has_its_phase_and_name(pool: RankPool, name: str) -> None:
    case = CASES[name]
    found = pool.run(watched, case.world_size, case, 3)
    plain = pool.run(train, case.world_size, case, 3)
    assert [rank.curve for rank in found] == plain  # bitwise
    for rank in found:
        assert rank.phases >= PHASES - ({"reducing gradients"} if name in ("DP2 zero2", "DP2 zero3") else set())
        for times in rank.recent:
            parts = times.data_wait + times.compute + times.collective_wait
            assert parts == pytest.approx(times.seconds)
            assert 0 < times.forward < times.compute and 0 < times.backward < times.compute
            assert 0 < times.collective_wait < times.seconds
    assert set.union(*(rank.inside for rank in found)) >= WAITS[name]


@pytest.mark.parametrize(("name", "slow"), [("DP2 zero1", 1), ("DP2 zero3", 0), ("TP2 x PP2", 2)])
def test_peers_wait_for_a_slow_rank_and_it_for_nobody(pool: RankPool, name: str, slow: int) -> None:
    case = small(CASES[name])
    found = pool.run(watched, case.world_size, case, 19, slow)
    recent = {rank: watch.recent for rank, watch in enumerate(found)}
    (named,) = find_slow_ranks(recent, 2.0, rank_loads(case.model, case.layout))
    assert named.global_rank == slow and named.part == "forward" and named.seconds > 0.06
    waited = {rank: sum(times.collective_wait for times in rows) for rank, rows in recent.items()}
    assert min(waited, key=lambda rank: waited[rank]) == slow


@pytest.mark.parametrize("name", ["DP2 zero1", "TP2 x PP2"])
def test_no_rank_of_a_clean_run_is_named(pool: RankPool, name: str) -> None:
    case = small(CASES[name])
    recent = {rank: watch.recent for rank, watch in enumerate(pool.run(watched, case.world_size, case, 40))}
    loads = rank_loads(case.model, case.layout)
    for steps in range(1, 41):
        assert find_slow_ranks({rank: rows[:steps] for rank, rows in recent.items()}, 2.0, loads) == []


WAITED_FOR = {
    "all_reduce": lambda tensor, peer: dist.all_reduce(tensor),
    "barrier": lambda tensor, peer: dist.barrier(),
    "recv": lambda tensor, peer: dist.recv(tensor, peer) if peer else dist.send(tensor, peer),
    "the wait of wait_for_a_handle": lambda tensor, peer: wait_for_a_handle(tensor),
}


def wait_for_a_handle(tensor: torch.Tensor) -> None:
    handle = dist.all_reduce(tensor, async_op=True)
    handle.wait()


def asked_while_it_waits(world: World, name: str) -> tuple[str | None, str | None]:
    """(by its stack, by its heartbeat) what rank 0 waits in, asked by rank 1, which joins it only then."""
    heartbeat, pad = NotedHeartbeat(), create_pad()
    answer_stacks(pad)
    of_ranks = [torch.zeros(3, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(of_ranks, torch.tensor([os.getpid(), pad, heartbeat.fd]))
    found: tuple[str | None, str | None] = (None, None)
    with StepClock(heartbeat).watching_collectives("cpu"):
        if world.global_rank == 1:
            pid, its_pad, its_heartbeat = of_ranks[0].tolist()
            pulse = Pulse(os.open(f"/proc/{pid}/fd/{its_heartbeat}", os.O_RDWR))
            deadline = time.monotonic() + 20
            while pulse.read().collective is None and time.monotonic() < deadline:
                time.sleep(0.01)
            told = ask_stacks({pid: os.open(f"/proc/{pid}/fd/{its_pad}", os.O_RDWR)}, seconds=10.0)[pid]
            found = told.waits_in, pulse.read().collective
        WAITED_FOR[name](torch.ones(1), 1 - world.global_rank)
    faulthandler.unregister(STACK_SIGNAL)
    return found


@pytest.mark.parametrize("name", WAITED_FOR)
def test_what_a_rank_waits_in_is_in_its_stack_and_in_its_heartbeat(pool: RankPool, name: str) -> None:
    by_stack, by_heartbeat = pool.run(asked_while_it_waits, 2, name)[1]
    assert by_stack and by_stack.startswith(name)
    assert by_heartbeat == (name if name in COLLECTIVES else "all_reduce")


def train_and_tell(words: list[str], told: str) -> None:
    """In a process of its own: train on one rank, and write to the file `told` what its heartbeat was told."""
    torch.set_num_threads(1)
    heartbeat = NotedHeartbeat()
    train_module.Heartbeat = SimpleNamespace(open=lambda fd: heartbeat)  # type: ignore[attr-defined]
    _, config, _, _, *overrides = words
    code = train_module.run_rank(load_run(Path(config), overrides), World(), fresh=False)
    beat = heartbeat.pulse.read()
    phases = [name for name, _ in itertools.groupby(heartbeat.phases)]
    Path(told).write_text(json.dumps([code, phases, beat.step, beat.saved_step, [t.step for t in beat.recent]]))


@pytest.mark.parametrize("background", [True, False])
def test_a_run_says_where_it_is_from_its_start_to_its_end(commands: Commands, tmp_path: Path, background: bool) -> None:
    settings = {
        "train.steps": 5,
        "train.eval_interval": 4,
        "checkpoint.interval": 2,
        "monitor.sample_interval": 3,
        "launch.preflight": True,
    }
    named = {name.replace(".", "__"): value for name, value in settings.items()}
    words = commands.train_words(tmp_path / "run", **named, checkpoint__background=background)
    for steps, first in ((5, 1), (6, 6)):
        process = fork_server().Process(
            target=train_and_tell, args=([*words, f"train.steps={steps}"], str(tmp_path / "told"))
        )
        process.start()
        process.join(120)
        code, phases, step, saved, recent = json.loads((tmp_path / "told").read_text())
        assert (code, step, saved, recent) == (0, steps, steps, list(range(first, steps + 1)))
        expected = ["starting", "preflight", "loading", *(["evaluating"] if first == 1 else [])]
        for number in range(first, steps + 1):
            expected += ["waiting for data", "forward and backward", "reducing gradients", "optimizer step", "logging"]
            expected += ["evaluating"] if number % 4 == 0 or number == steps else []
            expected += ["sampling text"] if number % 3 == 0 else []
            expected += ["saving"] if number % 2 == 0 or number == steps else []
        assert phases == [*expected, "ending"]
