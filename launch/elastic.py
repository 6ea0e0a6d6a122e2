"""Which layout a run takes on the ranks there are, where `launch.min_nodes` lets it go on with fewer than it asked for.

Pure: a config and a number of ranks in, the same config with another layout out. The global batch, and with it the
order of the data and the schedule, never changes; tensor and pipeline sizes stay where they can.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from gptdist.config.sections import RunConfig
from gptdist.errors import LayoutError
from gptdist.world import World
from launch.outer import LOOPBACK


@dataclass(frozen=True)
class Fit:
    """`config` as it runs on the first `ranks` of those there are. For people, empty where there is nothing to say:
    `note`, what is otherwise than the user wrote, and `idle`, which ranks have nothing to do."""

    config: RunConfig
    ranks: int
    note: str = ""
    idle: str = ""


def fit_layout(config: RunConfig, ranks: int, nodes: int | None = None) -> Fit:
    """The layout that uses most of `ranks`, then the largest micro-batch. As configured where launch.min_nodes is null.

    The fit on `Fit.ranks` is the same, so that ranks find it by themselves. `nodes`: how many there are, where that is
    known. Raises LayoutError where there are fewer than launch.min_nodes.
    """
    least = config.launch.min_nodes
    if least is None:
        return Fit(config, ranks)
    if nodes is not None and nodes < least:
        raise LayoutError(
            f"There {'is' if nodes == 1 else 'are'} {nodes} node{'s' if nodes > 1 else ''}, and launch.min_nodes is "
            f"{least}. Start the run on {least} or more, or lower launch.min_nodes."
        )
    for tensor, pipeline in _model_splits(config):
        unit = pipeline if config.parallel.virtual_pipeline > 1 and pipeline > 1 else 1
        parts = max(1, _batch_unit(config) // unit)  # of which each data rank must have a whole number, in every batch
        data = _largest_divisor(parts, ranks // (tensor * pipeline))
        if data:
            micro_batch = _largest_divisor(parts // data, config.train.micro_batch_size)
            return _fit(config, ranks, tensor, pipeline, data, micro_batch)
    raise LayoutError(f"A run needs at least one rank; there are {ranks}.")


def seat(world: World, ranks: int) -> World | None:
    """The place of a rank among the first `ranks`; None for one that stays idle."""
    if world.global_rank >= ranks:
        return None
    here = min(world.local_world_size, ranks - (world.global_rank - world.local_rank))
    seated = replace(world, world_size=ranks, local_world_size=here)
    return replace(seated, master_address=LOOPBACK) if seated.is_one_node else seated


def _model_splits(config: RunConfig) -> Iterator[tuple[int, int]]:
    """(tensor, pipeline): the config's own, then smaller ones, those first that split the model most."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    yield tensor, pipeline
    smaller = [(t, p) for t in _divisors(tensor) for p in _divisors(pipeline)]
    yield from sorted(smaller, key=lambda split: (split[0] * split[1], split[0]), reverse=True)


def _fit(config: RunConfig, ranks: int, tensor: int, pipeline: int, data: int, micro_batch: int) -> Fit:
    before, used = config.parallel, tensor * pipeline * data
    parallel = before.model_copy(
        update={
            "tensor": tensor,
            "pipeline": pipeline,
            "virtual_pipeline": before.virtual_pipeline if pipeline > 1 else 1,
            "sequence": before.sequence and tensor > 1,
        }
    )
    train = config.train.model_copy(update={"micro_batch_size": micro_batch})
    fitted = config.model_copy(update={"parallel": parallel, "train": train})
    changes = [
        f"{section}.{name} {old} -> {new}"
        for section, one, other in (("parallel", before, parallel), ("train", config.train, train))
        for name in type(one).model_fields
        if (old := getattr(one, name)) != (new := getattr(other, name))
    ]
    heavier = before.tensor * before.pipeline // (tensor * pipeline)
    if heavier > 1:
        changes.append(f"a rank holds {heavier} times the weights")
    note = f"to fit {used} rank{'s' if used > 1 else ''}: {', '.join(changes)}" if changes else ""
    return Fit(fitted, used, note, _idle(used, ranks))


def _idle(used: int, ranks: int) -> str:
    if used == ranks:
        return ""
    which = f"rank {used} stays" if ranks == used + 1 else f"ranks {used} to {ranks - 1} stay"
    return f"{which} idle: of {ranks} ranks, {used} share the global batch evenly"


def _batch_unit(config: RunConfig) -> int:
    """What divides every global batch of the run, ramp included."""
    ramp = config.schedule.batch_ramp
    return math.gcd(config.train.global_batch_size, *((ramp.start, ramp.increment) if ramp else ()))


def _divisors(value: int) -> list[int]:
    return [candidate for candidate in range(1, value + 1) if value % candidate == 0]


def _largest_divisor(value: int, most: int) -> int:
    """Of `value`, at most `most`; 0 where most is 0."""
    return next((candidate for candidate in range(min(most, value), 0, -1) if value % candidate == 0), 0)
