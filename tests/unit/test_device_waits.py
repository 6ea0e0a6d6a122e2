"""Waits of a GPU's stream, measured by events: on a pretended stream whose clock the test moves."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gptdist.engine.clock import StepClock
from gptdist.engine.device_waits import DeviceWaits
from tests.noted_heartbeat import NotedHeartbeat


class Device:
    """`now`: ms on its clock. `done`: up to which of its moments the host could ask."""

    def __init__(self) -> None:
        self.now, self.done, self.events = 0.0, float("inf"), 0
        self.stream = "the one that trains"

    def waits(self) -> DeviceWaits:
        return DeviceWaits(lambda: self.stream, self.event)

    def event(self) -> "Event":
        self.events += 1
        return Event(self)


class Event:
    """As torch.cuda.Event."""

    def __init__(self, device: Device) -> None:
        self.device, self.at = device, -1.0

    def record(self) -> None:
        self.at = self.device.now

    def query(self) -> bool:
        return self.at <= self.device.done

    def elapsed_time(self, end: "Event") -> float:
        assert self.at >= 0
        return end.at - self.at


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_seconds_between_events_add_up_and_events_are_used_again() -> None:
    device = Device()
    waits = device.waits()
    for _ in range(3):
        for milliseconds in (500.0, 250.0):
            with waits.waiting():
                device.now += milliseconds
            device.now += 1000.0
        assert waits.take_seconds() == 0.75
        assert waits.take_seconds() == 0.0
    assert device.events == 4


def test_what_is_still_under_way_counts_the_next_time() -> None:
    device = Device()
    waits = device.waits()
    for _ in range(2):
        with waits.waiting():
            device.now += 1000.0
    device.done = 1500.0
    assert waits.take_seconds() == 1.0
    device.done = 2500.0
    assert waits.take_seconds() == 1.0


def test_what_runs_beside_training_is_no_wait() -> None:
    device = Device()
    waits = device.waits()
    device.stream = "another"
    with waits.waiting():
        device.now += 1000.0
    assert waits.take_seconds() == 0.0 and device.events == 0


def test_a_collective_that_fails_leaves_whole_pairs() -> None:
    device = Device()
    waits = device.waits()
    with pytest.raises(RuntimeError), waits.waiting():
        device.now += 1000.0
        raise RuntimeError("NCCL error")
    assert waits.take_seconds() == 1.0


def test_the_clock_takes_the_devices_waits_out_of_a_step(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(DeviceWaits, "of_this_device", classmethod(lambda cls: device.waits()))
    plain = dist.ProcessGroup.allreduce

    def slow(*args: Any, **kwargs: Any) -> Any:
        device.now += 40.0
        return plain(*args, **kwargs)

    monkeypatch.setattr(dist.ProcessGroup, "allreduce", slow)
    monkeypatch.setattr("time.perf_counter", lambda: device.now / 1000)
    heartbeat = NotedHeartbeat()
    clock = StepClock(heartbeat)
    before = dist.Work.wait
    with clock.watching_collectives("cuda"):
        for step in (1, 2):
            clock.begin_step()
            device.now += 60.0
            dist.all_reduce(torch.ones(1))
            beside = threading.Thread(target=dist.all_reduce, args=(torch.ones(1),))  # such as a checkpoint's
            beside.start()
            beside.join()
            times = clock.end_step(step, data_wait=0.0)
            assert times.seconds == pytest.approx(0.14)
            assert times.collective_wait == pytest.approx(0.04)
            assert times.compute == pytest.approx(0.1)
    assert (dist.Work.wait, dist.ProcessGroup.allreduce) == (before, slow)
    assert heartbeat.collectives == ["all_reduce"] * 2


def test_backwards_own_threads_belong_to_training(group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(DeviceWaits, "of_this_device", classmethod(lambda cls: device.waits()))
    clock = StepClock(NotedHeartbeat())
    found = []

    class Reduce(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            before = device.events
            dist.all_reduce(gradient)
            found.append(device.events - before)
            return gradient

    with clock.watching_collectives("cuda"):
        loss = Reduce.apply(torch.ones(1, requires_grad=True)).sum()  # type: ignore[no-untyped-call]
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    assert found and found[0] > 0
