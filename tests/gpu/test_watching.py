"""What watches a run sees GPUs as well: preflight's products and links, and the names of collectives."""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from gptdist.comms import Comms
from gptdist.config.sections import DataConfig, LaunchConfig, RunConfig
from gptdist.engine.clock import StepClock
from gptdist.layout import Layout
from gptdist.monitor.heartbeat import Heartbeat, Pulse, create_memory
from gptdist.world import World
from launch.preflight.check import run_preflight
from launch.preflight.measure import DEVICE_SECONDS, check_device, effort_of
from tests.gpu.ranks import run

PREFLIGHT_SECONDS = 20.0
SLOW_SECONDS = 1.0


def test_a_gpu_gives_the_known_product_in_time() -> None:
    ((seconds, complaint, took),) = run(multiply, 1)
    assert complaint is None and 0 < seconds < took < DEVICE_SECONDS


@pytest.mark.parametrize("gpus", [pytest.param(count, marks=pytest.mark.gpu(count)) for count in (1, 2, 4)])
def test_preflight_passes_healthy_gpus_in_time(gpus: int, tmp_path: Path) -> None:
    assert max(run(preflight, gpus, str(tmp_path))) < PREFLIGHT_SECONDS


def test_the_collective_that_was_launched_last_has_its_name() -> None:
    assert run(launch, 1) == [["all_reduce", "broadcast"]]


@pytest.mark.gpu(2)
def test_a_gpu_that_waits_for_a_slow_one_is_not_the_slow_one() -> None:
    first, second = run(step_with_a_slow_peer, 2)
    assert second < 0.2 * SLOW_SECONDS < 0.8 * SLOW_SECONDS < first


def step_with_a_slow_peer(world: World) -> float:
    """Seconds that this rank's stream waited in an all-reduce to which rank 1 comes late."""
    value = torch.ones(4, device="cuda")
    dist.all_reduce(value)
    torch.cuda.synchronize()
    clock = StepClock(Heartbeat.open(-1))
    with clock.watching_collectives("cuda"):
        clock.begin_step()
        if world.global_rank == 1:
            end = time.monotonic() + SLOW_SECONDS
            work = torch.ones(2048, 2048, device="cuda")
            while time.monotonic() < end:
                work = work @ work
                torch.cuda.synchronize()
        dist.all_reduce(value)
        value.sum().item()
        return clock.end_step(1, data_wait=0.0).collective_wait


def multiply(world: World) -> tuple[float | None, str | None, float]:
    """The product that preflight asks for: its seconds, what is wrong, and how long that took in all."""
    began = time.monotonic()
    seconds, complaint = check_device("cuda", effort_of("cuda", nodes=2))
    return seconds, None if complaint is None else complaint.text, time.monotonic() - began


def preflight(world: World, run_dir: str) -> float:
    """Seconds of a whole preflight with NCCL."""
    config = RunConfig(data=DataConfig(corpus="none"), launch=LaunchConfig(run_dir=run_dir))
    comms = Comms(world, dist.new_group(backend="gloo"))
    began = time.monotonic()
    run_preflight(config, Layout(world.world_size), comms, "cuda")
    return time.monotonic() - began


def launch(world: World) -> list[str | None]:
    """What the heartbeat says after each of two collectives."""
    memory = create_memory()
    heartbeat, pulse = Heartbeat.open(memory), Pulse(memory)
    found = []
    with StepClock(heartbeat).watching_collectives("cuda"):
        for collective in (dist.all_reduce, lambda tensor: dist.broadcast(tensor, 0)):
            collective(torch.ones(4, device="cuda"))
            found.append(pulse.read().collective)
    return found
