"""The layouts of the reshard matrix, what is saved under one, and what another finds. Runs inside ranks.

A source trains, is saved, and goes on; a target loads and goes on likewise. State is compared as bytes, of everything
that a rank holds, copies included, and not only of what it would write. Knows the engine and no pool.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gptdist.checkpoint.logical import Box, overlap_or_gap
from gptdist.checkpoint.read import Checkpoint
from gptdist.checkpoint.snapshot import to_host
from gptdist.checkpoint.write import save_checkpoint
from gptdist.comms import Comms
from gptdist.config.sections import ModelConfig
from gptdist.engine.engine import StepReport, TrainEngine
from gptdist.engine.partition import TensorSource
from gptdist.world import World
from tests.dist.cases import MODELS, Case, engine_of, train_steps

GLOBAL_BATCH = 24  # micro-batches come out whole on 1, 2, 3, 4 and 8 data ranks, and even in number where interleaved
STEPS_BEFORE = 3
STEPS_AFTER = 10


@dataclass(frozen=True)
class Place:
    """A layout with its ZeRO stage, offload and micro-batch."""

    world_size: int
    parallel: dict[str, Any] = field(default_factory=dict)
    micro_batch_size: int = 4


_SP = {"tensor": 2, "sequence": True}
_VPP = {"pipeline": 2, "virtual_pipeline": 2}
PLACES = {
    "1 rank": Place(1, {"zero_stage": 0}, 12),
    "1 rank, offload": Place(1, {"zero_stage": 1, "offload_optimizer": True}, 24),
    "DP2 ZeRO 0": Place(2, {"zero_stage": 0}, 6),
    "DP2 ZeRO 1": Place(2, {"zero_stage": 1}, 12),
    "DP2 ZeRO 2 offload": Place(2, {"zero_stage": 2, "offload_optimizer": True}, 12),
    "DP3 ZeRO 1": Place(3, {"zero_stage": 1}),
    "DP3 ZeRO 3": Place(3, {"zero_stage": 3}, 8),
    "DP4 ZeRO 2": Place(4, {"zero_stage": 2}, 6),
    "DP2 ZeRO 3 offload": Place(2, {"zero_stage": 3, "offload_optimizer": True}, 12),
    "TP2": Place(2, {"tensor": 2, "zero_stage": 1}, 12),
    "TP2+SP ZeRO 3": Place(2, {**_SP, "zero_stage": 3}, 12),
    "DP2 x TP2+SP ZeRO 2": Place(4, {**_SP, "zero_stage": 2}, 12),
    "TP4+SP": Place(4, {"tensor": 4, "sequence": True, "zero_stage": 1}, 24),
    "PP2": Place(2, {"pipeline": 2, "zero_stage": 1}, 12),
    "PP2x2 ZeRO 0": Place(2, {**_VPP, "zero_stage": 0}, 12),
    "DP2 x PP2 ZeRO 3": Place(4, {"pipeline": 2, "zero_stage": 3}, 6),
    "DP2 x PP2x2 ZeRO 1 offload": Place(4, {**_VPP, "zero_stage": 1, "offload_optimizer": True}, 6),
    "TP2+SP x PP2 ZeRO 2": Place(4, {**_SP, "pipeline": 2, "zero_stage": 2}, 12),
}
EIGHT_RANKS = {
    "DP8 ZeRO 3": Place(8, {"zero_stage": 3}, 3),
    "DP2 x TP2+SP x PP2 ZeRO 1": Place(8, {**_SP, "pipeline": 2, "zero_stage": 1}, 6),
    "DP2 x TP2 x PP2x2 ZeRO 3": Place(8, {"tensor": 2, **_VPP, "zero_stage": 3}, 6),
}
ALL_PLACES = {**PLACES, **EIGHT_RANKS}
WITH_EIGHT_RANKS = ("1 rank", "DP3 ZeRO 3", "PP2x2 ZeRO 0")  # the few that those exchange checkpoints with


def small(model: str) -> ModelConfig:
    """Four layers for two stages of two chunks, four key/value heads for four tensor ranks."""
    sizes = {"hidden_size": 32, "num_heads": 8, "sequence_length": 16}
    grouped = {"num_kv_heads": 4, "ffn_hidden_size": 88} if model.startswith("modern") else {}
    return MODELS[model].model_copy(update=sizes | grouped)


def case_at(place: Place, model: ModelConfig, **train: Any) -> Case:
    """The matrix's training under one layout."""
    sizes = {"global_batch_size": GLOBAL_BATCH, "micro_batch_size": place.micro_batch_size}
    return Case(model, place.world_size, place.parallel, {**sizes, **train})


Held = tuple[str, tuple[int, ...], Box, bytes, bool]


@dataclass(frozen=True)
class Seen:
    """What one rank saw: its tensors, the other state, and the reports of the steps that followed."""

    held: list[Held]
    state: dict[str, Any]
    reports: list[StepReport]


def save_and_go_on(world: World, case: Case, folder: Path, before: int, after: int) -> Seen:
    """Train `before` steps, save into `folder`, train `after` more."""
    with engine_of(case, world) as engine:
        train_steps(engine, case, world, range(1, before + 1))
        held, state = everything_held(engine), engine.state()
        save(engine, folder, before, world)
        return Seen(held, state, train_steps(engine, case, world, range(before + 1, before + after + 1)))


def load_and_go_on(world: World, case: Case, paths: list[Path], after: int, again: Path | None = None) -> list[Seen]:
    """Load each of `paths` into an engine of its own and train `after` steps; `again`: also save what was loaded."""
    seen = []
    for path in paths:
        with engine_of(case, world) as engine:
            with Checkpoint.open(path, verify=False) as checkpoint:
                step = checkpoint.step
                engine.read(TensorSource(checkpoint), checkpoint.state["engine"])
            engine.refresh()
            held, state = everything_held(engine), engine.state()
            if again is not None:
                save(engine, again, step, world)
            seen.append(Seen(held, state, train_steps(engine, case, world, range(step + 1, step + after + 1))))
    return seen


def save(engine: TrainEngine, folder: Path, step: int, world: World) -> Path:
    """A checkpoint of the engine alone."""
    comms = Comms(world, dist.group.WORLD)
    return save_checkpoint(folder, step, to_host(engine.fragments()), {"engine": engine.state()}, comms)


def everything_held(engine: TrainEngine) -> list[Held]:
    """(kind/name, whole shape, box, bytes, whether this rank answers for it) of all that this rank's share holds.

    Fails where padding is not zero.
    """
    held: list[Held] = []
    for flat in engine.zero.states:
        covered = torch.zeros(flat.master.numel(), dtype=torch.bool)
        for part in flat.ranges:
            for fragment in part.fragments(0, part.count):
                place = slice(part.offset + fragment.start, part.offset + fragment.stop)
                covered[place] = True
                for kind in ("weight", "exp_avg", "exp_avg_sq"):
                    numbers = flat.tensor(kind)[place].numpy().tobytes()
                    held.append((f"{kind}/{fragment.name}", fragment.shape, fragment.box, numbers, part.owned))
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            assert not flat.tensor(kind)[~covered].any(), f"padding of {kind} is not zero"
    return held


def assembled(by_rank: list[list[Held]]) -> dict[str, Tensor]:
    """The logical tensors, as integers of their bits. Fails where ranks miss one, or hold different copies."""
    whole: dict[str, Tensor] = {}
    boxes: dict[str, list[Box]] = {}
    for name, shape, box, numbers, owned in _in_order(by_rank):
        part = torch.from_numpy(np.frombuffer(numbers, dtype=np.int32).copy()).view(box.shape)
        if owned:
            if name in whole and any(box == other for other in boxes[name]):  # ZeRO 0: replicas
                assert torch.equal(whole[name][box.slices()], part), f"replicas of {name} differ"
                continue
            whole.setdefault(name, torch.zeros(shape, dtype=torch.int32))[box.slices()] = part
            boxes.setdefault(name, []).append(box)
        else:
            assert torch.equal(whole[name][box.slices()], part), f"copies of {name} differ"
    for name, tensor in whole.items():
        wrong = overlap_or_gap(tuple(tensor.shape), boxes[name])
        assert wrong is None, f"{name}: {wrong}"
    return whole


def _in_order(by_rank: list[list[Held]]) -> Iterator[Held]:
    """What ranks answer for first, then the copies."""
    parts = [part for parts in by_rank for part in parts]
    yield from (part for part in parts if part[4])
    yield from (part for part in parts if not part[4])
