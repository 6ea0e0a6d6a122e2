"""The layout on the ranks there are: over grids of sizes, against a search through all of them."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.config.check import check_run
from gptdist.config.sections import (
    BatchRamp,
    DataConfig,
    LaunchConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from gptdist.errors import ConfigError, LayoutError
from gptdist.world import World
from launch.elastic import Fit, fit_layout, seat


def run(
    batch: int = 12, micro_batch: int = 1, ramp: BatchRamp | None = None, min_nodes: int | None = 1, **parallel: object
) -> RunConfig:
    return RunConfig(
        model=ModelConfig(num_layers=8, hidden_size=32, num_heads=8, sequence_length=32),
        data=DataConfig(corpus="x"),
        train=TrainConfig(global_batch_size=batch, micro_batch_size=micro_batch, steps=100),
        schedule=ScheduleConfig(batch_ramp=ramp),
        parallel=ParallelConfig(**parallel),
        launch=LaunchConfig(min_nodes=min_nodes),
    )


@st.composite
def configs(draw: st.DrawFn) -> tuple[RunConfig, int]:
    """A config and the ranks it was written for."""
    tensor, pipeline = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2, 4]))
    virtual = draw(st.sampled_from([1, 2])) if pipeline > 1 else 1
    data, micro = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    unit = data * micro * (pipeline if virtual > 1 else 1)
    batch = unit * draw(st.integers(1, 6))
    ramp = None
    if draw(st.booleans()) and batch > unit:
        ramp = BatchRamp(start=unit, increment=unit, samples=100)
    config = run(
        batch,
        micro,
        ramp,
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        sequence=tensor > 1 and draw(st.booleans()),
        zero_stage=draw(st.integers(0, 3)),
    )
    return config, data * tensor * pipeline


def is_valid(config: RunConfig, ranks: int) -> bool:
    try:
        check_run(config, ranks)
    except ConfigError:
        return False
    return True


@given(configs(), st.integers(1, 70))
@settings(max_examples=300)
def test_any_number_of_ranks_trains_the_same_batches(written: tuple[RunConfig, int], ranks: int) -> None:
    config, _ = written
    fit = fit_layout(config, ranks)
    layout = check_run(fit.config, fit.ranks)
    assert 1 <= fit.ranks <= ranks
    assert fit_layout(fit.config, fit.ranks) == Fit(fit.config, fit.ranks), "idempotent"
    assert fit_layout(config, fit.ranks) == replace(fit, idle=""), "ranks that know only of each other agree"
    changed = {
        f"{section}.{key}"
        for section in type(config).model_fields
        for key in type(getattr(config, section)).model_fields
        if getattr(getattr(config, section), key) != getattr(getattr(fit.config, section), key)
    }
    if layout.tensor * layout.pipeline == config.parallel.tensor * config.parallel.pipeline:
        assert changed <= {"train.micro_batch_size"}
    else:
        assert ranks < config.parallel.tensor * config.parallel.pipeline, "it could have been kept"
        kept = {"parallel.tensor", "parallel.pipeline", "parallel.virtual_pipeline", "parallel.sequence"}
        assert changed <= kept | {"train.micro_batch_size"}
        assert "times the weights" in fit.note
    assert bool(fit.note) == bool(changed) and bool(fit.idle) == (fit.ranks < ranks)
    assert all(name in fit.note for name in changed)
    assert fit.config.train.micro_batch_size <= config.train.micro_batch_size


@given(configs())
def test_on_the_ranks_it_was_written_for_a_config_stays_as_it_is(written: tuple[RunConfig, int]) -> None:
    config, ranks = written
    assert fit_layout(config, ranks) == Fit(config, ranks)


@pytest.mark.parametrize(("batch", "micro", "virtual"), list(itertools.product((6, 8, 12, 16), (1, 2, 4), (1, 2))))
def test_no_other_layout_uses_more_ranks_or_a_larger_micro_batch(batch: int, micro: int, virtual: int) -> None:
    pipeline = 2 if virtual > 1 else 1
    config = run(batch, micro, pipeline=pipeline, virtual_pipeline=virtual)
    for ranks in range(pipeline, 14):
        fit = fit_layout(config, ranks)
        best = max(
            (used, size)
            for used in range(1, ranks + 1)
            for size in range(1, micro + 1)
            if is_valid(run(batch, size, pipeline=pipeline, virtual_pipeline=virtual), used)
        )
        assert (fit.ranks, fit.config.train.micro_batch_size) == best


def test_what_is_said() -> None:
    assert fit_layout(run(12, 2), 3) == Fit(run(12, 2), 3)
    fit = fit_layout(run(12, 2), 5)
    assert (fit.ranks, fit.config.train.micro_batch_size) == (4, 1)
    assert fit.note == "to fit 4 ranks: train.micro_batch_size 2 -> 1"
    assert fit.idle == "rank 4 stays idle: of 5 ranks, 4 share the global batch evenly"
    fit = fit_layout(run(8, tensor=4, sequence=True, pipeline=2, virtual_pipeline=2), 7)
    assert fit.note == (
        "to fit 4 ranks: parallel.pipeline 2 -> 1, parallel.virtual_pipeline 2 -> 1, a rank holds 2 times the weights"
    )
    assert fit_layout(run(8, tensor=4, sequence=True), 1).config.parallel == ParallelConfig()


def test_only_where_it_is_wanted_and_on_nodes_enough() -> None:
    config = run(12, 2, min_nodes=None)
    assert fit_layout(config, 5, nodes=1) == Fit(config, 5)
    for nodes in (2, 3):
        assert fit_layout(run(min_nodes=2), 4, nodes).ranks == 4
    with pytest.raises(LayoutError, match=r"There is 1 node, and launch\.min_nodes is 2\. Start the run on 2 or more"):
        fit_layout(run(min_nodes=2), 4, nodes=1)


@given(st.integers(1, 5), st.integers(1, 4), st.data())
def test_every_rank_finds_its_seat_or_stays_idle(nodes: int, per_node: int, data: st.DataObject) -> None:
    used = data.draw(st.integers(1, nodes * per_node))
    seats = [
        seat(World(rank, nodes * per_node, rank % per_node, per_node, rank // per_node, "node1"), used)
        for rank in range(nodes * per_node)
    ]
    assert [place is not None for place in seats] == [rank < used for rank in range(len(seats))]
    for place in filter(None, seats):
        on_its_node = [other for other in seats if other and other.node_rank == place.node_rank]
        assert (place.world_size, place.local_world_size) == (used, len(on_its_node))
        assert (place.master_address == "127.0.0.1") == place.is_one_node
