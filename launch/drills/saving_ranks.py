"""Ranks that do nothing but save: the saver that training uses, over a state that is a pure function of the step.

So what any checkpoint must hold is known without having trained, and a whole world of ranks costs a fraction of a
second. A plan says what goes wrong, on which rank and in which phase of a save.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from gptdist.checkpoint.logical import Box, Shape, boxes_of_flat_range
from gptdist.checkpoint.read import Checkpoint
from gptdist.world import World
from launch.drills.small_disk import fill

# Sizes that no number of ranks divides, a scalar, and one tensor that is most of the file.
SHAPES: dict[str, Shape] = {
    "weight/embedding.word.weight": (509, 131),
    **{f"weight/layers.{layer}.attention.qkv.weight": (97, 61) for layer in range(3)},
    **{f"exp_avg/layers.{layer}.attention.qkv.weight": (97, 61) for layer in range(3)},
    "weight/final_norm.bias": (61,),
    "scale": (),
}
JOIN_SECONDS = 60.0


@dataclass(frozen=True)
class SavePlan:
    """What the ranks of one world do. `steps` are saved in order; the fault strikes in the last of them.

    `rank` is struck in `phase`: it is killed, or fills the disk with the file `fill`, or sleeps for `sleep_seconds`.
    `kill_after_seconds`: it is killed instead, so long after all ranks have met.
    """

    checkpoints_dir: Path
    report_dir: Path
    steps: tuple[int, ...]
    rank: int = -1
    phase: str = ""
    kill: bool = False
    sleep_seconds: float = 0.0
    fill: Path | None = None
    kill_after_seconds: float | None = None
    staging_dir: Path | None = None


def save_steps(world: World, plan: SavePlan) -> int:
    """One rank; the target of a local launch. Leaves a line of JSON for each save in the report folder."""
    from gptdist.checkpoint.retention import Retention
    from gptdist.checkpoint.saver import CheckpointSaver
    from gptdist.checkpoint.write import SaveOptions
    from launch.rendezvous import join, leave

    _write_to(plan.report_dir / f"rank-{world.global_rank}.log")
    comms = join(world, JOIN_SECONDS, "cpu")
    comms.barrier()
    if plan.kill_after_seconds is not None and world.global_rank == plan.rank:
        _kill_later(plan.kill_after_seconds)
    now = 0

    def on_phase(phase: str) -> None:
        if now == plan.steps[-1] and world.global_rank == plan.rank and phase == plan.phase:
            _strike(plan)

    options = SaveOptions(retention=Retention(keep=2), read_back=True, staging_dir=plan.staging_dir)
    with CheckpointSaver(plan.checkpoints_dir, comms, options, on_phase=on_phase) as saver:
        for now in plan.steps:
            saver.save(now, list(fragments(now, world)), {"samples": now, "loss": 1.0 / now})
            outcome = saver.wait()
            assert outcome is not None
            error = None if outcome.error is None else f"{type(outcome.error).__name__}: {outcome.error}"
            record = {"step": now, "error": error, "seconds": outcome.seconds}
            with (plan.report_dir / f"rank-{world.global_rank}.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
    leave()
    return 0


def fragments(step: int, world: World) -> Iterator[Any]:
    """This rank's share of the state at `step`: a flat range of each tensor, as ZeRO cuts it."""
    import torch

    from gptdist.checkpoint.snapshot import Fragment

    for name, shape in SHAPES.items():
        whole = torch.from_numpy(expected(step, name))
        size = prod(shape)
        first, last = (size * (world.global_rank + more) // world.world_size for more in (0, 1))
        for box in boxes_of_flat_range(shape, first, last):
            yield Fragment(name, shape, box, whole[box.slices()] if shape else whole)


def expected(step: int, name: str) -> np.ndarray:
    """What the logical tensor holds at `step`."""
    key = [step, *name.encode()]
    return np.random.default_rng(key).standard_normal(SHAPES[name], dtype=np.float32).reshape(SHAPES[name])


def content_problem(checkpoint: Checkpoint) -> str | None:
    """None where a checkpoint holds just what was saved; else the first thing that differs."""
    step = checkpoint.step
    if checkpoint.state.get("samples") != step:
        return f"step {step} has the state of samples {checkpoint.state.get('samples')}"
    if checkpoint.names() != sorted(SHAPES):
        return f"step {step} has other tensors"
    for name in SHAPES:
        read = checkpoint.read(name, Box.whole(SHAPES[name]))
        if np.asarray(read).tobytes() != expected(step, name).tobytes():
            return f"step {step}: {name} is not what was saved"
    return None


def read_records(report_dir: Path, rank: int) -> list[dict[str, Any]]:
    """What a rank reported, one record a save."""
    path = report_dir / f"rank-{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _strike(plan: SavePlan) -> None:
    if plan.kill:
        os.kill(os.getpid(), signal.SIGKILL)
    if plan.fill is not None:
        fill(plan.fill)
    time.sleep(plan.sleep_seconds)


def _kill_later(seconds: float) -> None:
    """A process of its own, so that no thread of this one has to be at a good place."""
    victim = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        if os.getppid() == victim:
            os.kill(victim, signal.SIGKILL)
        os._exit(0)


def _write_to(path: Path) -> None:
    """A world that is killed says a lot; it goes into a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
