"""What each ZeRO stage saves: live bytes of a rank, counted over all tensors, during accumulation and between steps.

Theory (Rajbhandari et al. 2020, section 3): of weights, gradients, and master weights with two moments, stage 1 divides
the last by the data ranks, stage 2 the gradients too, stage 3 the weights too.
"""

import gc
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gptdist.engine.engine import TrainEngine
from gptdist.model.parameters import parameter_count
from gptdist.world import World
from tests.dist.cases import MODELS, Case, batch_of, engine_of
from tests.dist.ranks import RankPool

DATA_RANKS = 4
MICRO_BATCHES = 4
# Wide enough that weights are nearly all there is: a micro-batch's activations are 2 % of them.
MODEL = MODELS["modern tied"].model_copy(update={"hidden_size": 256, "ffn_hidden_size": 768, "vocab_size": 1024})


@dataclass(frozen=True)
class Live:
    """Bytes a parameter, on the fullest rank."""

    accumulating: float  # before the last micro-batch's forward
    between_steps: float


def measure(world: World, case: Case) -> tuple[int, int]:
    """Live bytes on this rank: before the last micro-batch of the third step, and after that step."""
    empty = live_bytes()
    counts: list[int] = []
    with engine_of(case, world) as engine:
        for step in (1, 2):
            engine.train_step(batch_of(case, world, step), 1e-3, step)
        batch = batch_of(case, world, 3)
        before = live_bytes()

        def count(*_: Any) -> None:
            counts.append(live_bytes())

        hook = engine.network.chunks[0].register_forward_pre_hook(count)
        engine.train_step(batch, 1e-3, 3)
        hook.remove()
        after = live_bytes()
        assert abs(after - before) < 0.02 * before, "a step leaves nothing behind"
        assert len(counts) == MICRO_BATCHES
        return counts[-1] - empty, after - empty


def live_bytes() -> int:
    """Bytes of all storages that a living tensor has, each once."""
    gc.collect()
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = max(storages.get(storage.data_ptr(), 0), storage.nbytes())
    return sum(storages.values())
