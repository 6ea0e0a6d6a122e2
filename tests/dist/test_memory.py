"""What each ZeRO stage saves: live bytes of a rank, counted over all tensors, during accumulation and between steps.

Theory (Rajbhandari et al. 2020, section 3): of weights, gradients, and master weights with two moments, stage 1 divides
the last by the data ranks, stage 2 the gradients too, stage 3 the weights too.
"""

import gc
from typing import Any

import pytest
from torch import Tensor

from gptdist.model.parameters import parameter_count
from gptdist.world import World
from tests.dist.cases import MODELS, Case, batch_of, engine_of
from tests.dist.ranks import RankPool

DATA_RANKS = 4
MICRO_BATCHES = 4
# Wide enough that weights are nearly all there is: a micro-batch's activations are 2 % of them.
MODEL = MODELS["modern tied"].model_copy(update={"hidden_size": 256, "ffn_hidden_size": 768, "vocab_size": 1024})


WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
SLACK = 0.3  # activations, data, buckets under way


def theory(precision: str, zero_stage: int) -> tuple[float, float]:
    """Bytes a parameter (before the last micro-batch, between steps).

    Weights; fp32 gradients, which only stage 2 gives back between steps (stages 0 and 1 keep their flat buffer, stage 3
    its partition); fp32 master weights, in fp32 training too, and two moments.
    """
    share = [1 / DATA_RANKS if zero_stage >= stage else 1.0 for stage in (1, 2, 3)]
    state, gradients, weights = 12 * share[0], 4 * share[1], WEIGHT_BYTES[precision] * share[2]
    kept_gradients = 0.0 if zero_stage == 2 else gradients
    return weights + gradients + state, weights + kept_gradients + state


def measure(world: World, case: Case) -> tuple[int, int]:
    """Live bytes on this rank: before the last micro-batch of the third step, and after that step."""
    batch_of(case, world, 1)  # the text stays in memory
    empty = live_bytes()
    counts: list[int] = []
    with engine_of(case, world) as engine:
        for step in (1, 2):
            engine.train_step(batch_of(case, world, step), 1e-3, step)
        batch = batch_of(case, world, 3)
        before = live_bytes()

        def count(*_: Any) -> None:
            # Looking at every tensor takes a while, so only once it tells something.
            counts.append(live_bytes() if len(counts) == MICRO_BATCHES - 1 else 0)

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


@pytest.mark.parametrize("precision", WEIGHT_BYTES)
def test_each_stage_saves_what_theory_says(pool: RankPool, precision: str) -> None:
    numbers = parameter_count(MODEL)
    fullest: dict[int, tuple[float, float]] = {}
    lines = [f"{precision}, {DATA_RANKS} data ranks: bytes a parameter, seen (theory)"]
    for zero_stage in range(4):
        fields = {"global_batch_size": DATA_RANKS * MICRO_BATCHES, "precision": precision}
        by_rank = pool.run(measure, DATA_RANKS, Case(MODEL, DATA_RANKS, {"zero_stage": zero_stage}, fields))
        seen = tuple(max(moment) / numbers for moment in zip(*by_rank, strict=True))
        fullest[zero_stage] = (seen[0], seen[1])
        expected = theory(precision, zero_stage)
        cells = [f"{mine:5.2f} ({theirs:5.2f})" for mine, theirs in zip(seen, expected, strict=True)]
        lines.append(f"ZeRO {zero_stage}: accumulating {cells[0]}, between steps {cells[1]}")
    print("\n" + "\n".join(lines))
    for zero_stage, seen in fullest.items():
        for mine, theirs in zip(seen, theory(precision, zero_stage), strict=True):
            assert abs(mine - theirs) <= SLACK, (zero_stage, mine, theirs)
    for lower in range(3):
        assert all(more < less for more, less in zip(fullest[lower + 1], fullest[lower], strict=True))


def test_a_closed_engine_leaves_nothing(pool: RankPool) -> None:
    """Ranks are reused for hundreds of engines; so might a process that evaluates between two trainings."""
    case = Case(MODEL, 2, {"zero_stage": 3})
    for lost in pool.run(left_behind, 2, case):
        assert lost < 0.05 * 4 * parameter_count(MODEL)


def left_behind(world: World, case: Case) -> int:
    """Live bytes that two engines, made and closed one after the other, add to those of one."""

    def live_after_an_engine() -> int:
        with engine_of(case, world) as engine:
            engine.train_step(batch_of(case, world, 1), 1e-3, 1)
        del engine
        return live_bytes()

    first = live_after_an_engine()
    live_after_an_engine()
    return live_after_an_engine() - first
