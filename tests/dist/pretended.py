"""Ranks that only pretend to train: they beat, and leave files that say what they are. Quick to import."""

import json
import os
import signal
import time
from pathlib import Path

from gptdist.monitor.heartbeat import Heartbeat, StepTimes
from gptdist.world import World


def announce(folder: str, name: str, text: str) -> None:
    """A file that is whole as soon as it is there."""
    unfinished = Path(folder, f".{name}")
    unfinished.write_text(text)
    unfinished.rename(Path(folder, name))


def train(world: World, folder: str) -> int:
    """Steps of 20 ms until `stop` is there, or a signal; `saved` every step. Announced once it has worked: a rank that
    fails before is not started again."""
    caught: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, frame: caught.append(number))
    heartbeat = Heartbeat.open(world.heartbeat_fd)
    heartbeat.resume(world.generation)
    step = world.generation
    while not caught and not Path(folder, "stop").exists():
        step += 1
        heartbeat.phase("forward and backward")
        time.sleep(0.02)
        heartbeat.phase("logging")
        heartbeat.step_done(StepTimes(step, 0.02, 0.0, 0.02, 0.0))
        heartbeat.saved(world.generation + 1)
        if step == world.generation + 1:
            announce(folder, f"pid-{world.generation}-{world.global_rank}", str(os.getpid()))
    time.sleep(0.3)  # a second signal would still be seen
    heartbeat.phase("ending")
    announce(folder, f"caught-{world.global_rank}", json.dumps(caught))
    return 75 if caught else 0


def end_at_once(world: World, folder: str) -> int:
    assert (world.local_rank, world.local_world_size, world.launcher) == (world.global_rank, 4, "srun")
    announce(folder, f"world-{world.global_rank}", f"{world.master_address}:{world.master_port}")
    return 0
