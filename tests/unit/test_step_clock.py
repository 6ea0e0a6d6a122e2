"""The clock of a step with one rank: which collectives it notices, and how it splits the time."""

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist

from gptdist.engine.clock import StepClock, collective_name
from gptdist.monitor.heartbeat import COLLECTIVES
from tests.noted_heartbeat import NotedHeartbeat


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def one() -> torch.Tensor:
    return torch.ones(1)


CALLS: dict[str, list[Callable[[], object]]] = {
    "all_reduce": [lambda: dist.all_reduce(one()), lambda: dist.all_reduce(one(), async_op=True).wait()],
    "all_gather": [lambda: dist.all_gather([one()], one()), lambda: dist.all_gather_into_tensor(one(), one())],
    "reduce_scatter": [lambda: dist.reduce_scatter_tensor(one(), one())],
    "all_to_all": [lambda: dist.all_to_all_single(one(), one())],
    "broadcast": [lambda: dist.broadcast(one(), src=0)],
    "reduce": [lambda: dist.reduce(one(), dst=0)],
    "gather": [lambda: dist.gather(one(), [one()], dst=0)],
    "scatter": [lambda: dist.scatter(one(), [one()], src=0)],
    "barrier": [dist.barrier],
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_collective_is_known_by_its_name(name: str, device: str, group: None) -> None:
    heartbeat = NotedHeartbeat()
    clock = StepClock(heartbeat)
    for call in CALLS[name]:
        heartbeat.collectives.clear()
        with clock.watching_collectives(device):
            call()
        # On a GPU it is still the last one launched; on a CPU it is over.
        assert heartbeat.collectives == ([name, None] if device == "cpu" else [name])
        assert (clock.waited > 0) == (device == "cpu")


def test_nothing_is_noticed_before_or_after(group: None) -> None:
    plain = dist.Work.wait, dist.ProcessGroup.allreduce
    heartbeat = NotedHeartbeat()
    clock = StepClock(heartbeat)
    for device in ("cpu", "cuda"):
        with pytest.raises(KeyboardInterrupt), clock.watching_collectives(device):
            raise KeyboardInterrupt
        assert (dist.Work.wait, dist.ProcessGroup.allreduce) == plain
        dist.all_reduce(one())
    assert heartbeat.collectives == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_messages_of_other_threads_are_not_trainings(device: str, group: None) -> None:
    heartbeat = NotedHeartbeat()
    clock = StepClock(heartbeat)
    with clock.watching_collectives(device):
        thread = threading.Thread(target=dist.barrier)
        thread.start()
        thread.join()
    assert heartbeat.collectives == [] and clock.waited == 0


def test_a_collective_that_fails_is_over(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(work: dist.Work) -> None:
        raise RuntimeError("connection closed by peer")

    monkeypatch.setattr(dist.Work, "wait", fail)
    heartbeat = NotedHeartbeat()
    with StepClock(heartbeat).watching_collectives("cpu"), pytest.raises(RuntimeError, match="closed by peer"):
        dist.all_reduce(one())
    assert heartbeat.collectives == ["all_reduce", None]


@pytest.mark.parametrize(
    ("native", "name"),
    [
        ("_allgather_base", "all_gather"),
        ("_reduce_scatter_base", "reduce_scatter"),
        ("ALLREDUCE_COALESCED", "all_reduce"),
        ("RECVANYSOURCE", "recv"),
        ("alltoall_base", "all_to_all"),
        ("monitored_barrier", "barrier"),
        ("COALESCED", "another collective"),
    ],
)
def test_names_that_torch_has_for_collectives(native: str, name: str) -> None:
    assert collective_name(native) == name


def test_every_name_is_its_own() -> None:
    assert [collective_name(name) for name in COLLECTIVES] == list(COLLECTIVES)


def test_a_steps_time_is_split_without_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    def pass_time(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    heartbeat = NotedHeartbeat()
    clock = StepClock(heartbeat)
    clock.waited = 7.0  # before this step
    clock.begin_step()
    pass_time(1.0)
    clock.phase("forward and backward")
    with clock.forward():
        pass_time(2.0)
        pass_time(0.25)
        clock.waited += 0.25
    pass_time(4.0)
    clock.phase("reducing gradients")
    pass_time(0.5)
    clock.waited += 0.5
    clock.phase("optimizer step")
    pass_time(0.125)
    times = clock.end_step(3, data_wait=1.0)
    assert (times.step, times.seconds, times.data_wait, times.collective_wait) == (3, 7.875, 1.0, 0.75)
    assert (times.compute, times.forward, times.backward) == (6.125, 2.0, 4.0)
    assert heartbeat.phases[1:] == [
        "waiting for data",
        "forward and backward",
        "reducing gradients",
        "optimizer step",
        "logging",
    ]
    clock.begin_step()
    assert clock.end_step(4, 0.0).forward == 0.0
