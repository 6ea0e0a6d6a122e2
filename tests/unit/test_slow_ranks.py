"""Slow ranks are named within twenty steps, and none in clean runs, however uneven the machine is."""

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.config.sections import ModelConfig
from gptdist.layout import Layout
from gptdist.monitor.heartbeat import StepTimes
from launch.ranks.slow_ranks import OFTEN, WINDOW, SlowRanks, find_slow_ranks, rank_loads

FACTOR = 2.0
_KEPT = 63  # steps that a rank's memory holds


@dataclass(frozen=True)
class Machine:
    """How steps come about: ranks that each compute, then wait for the slowest in a collective."""

    ranks: int
    base: float  # seconds of compute
    noise: float  # sigma of its logarithm
    seed: int
    slow: dict[int, float]  # rank -> factor of its compute, from step `since` on
    since: int = 1
    eval_interval: int = 10
    save_interval: int = 15
    slow_data: bool = False

    def own_times(self, generator: random.Random, rank: int, step: int) -> tuple[float, float]:
        """(data wait, compute)."""
        compute = self.base * generator.lognormvariate(0.0, self.noise)
        wait = self.base * 0.001
        if step == 1:
            compute *= generator.uniform(10, 50)  # everything is done for the first time
        if generator.random() < 0.05:
            compute += generator.uniform(0.05, 0.3)  # garbage collection, the scheduler
        if step % self.eval_interval == 1:
            compute *= generator.uniform(1, 2)  # cold caches after an evaluation
        if step % self.save_interval < 3 and step > self.save_interval:
            compute *= 2.5 if rank == 0 else generator.uniform(1, 1.5)  # a checkpoint is being written beside it
        if generator.random() < 0.02:
            wait += generator.uniform(0.1, 1.0)  # a shard that is read for the first time
        if step >= self.since and rank in self.slow:
            if self.slow_data:
                wait += self.base * (self.slow[rank] - 1)
            else:
                compute *= self.slow[rank]
        return wait, compute

    def run(self, steps: int) -> Iterator[dict[int, list[StepTimes]]]:
        """What a reader sees after each step."""
        generator = random.Random(self.seed)
        recent: dict[int, list[StepTimes]] = {rank: [] for rank in range(self.ranks)}
        for step in range(1, steps + 1):
            times = [self.own_times(generator, rank, step) for rank in range(self.ranks)]
            slowest = max(wait + compute for wait, compute in times) * 1.05
            for rank, (wait, compute) in enumerate(times):
                row = StepTimes(step, slowest, wait, compute, slowest - wait - compute, compute * 0.3, compute * 0.6)
                recent[rank] = [*recent[rank][1 - _KEPT :], row]
            yield recent


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 9),
    st.floats(0.003, 5),
    st.floats(0, 0.3),
    st.integers(0, 2**32),
)
def test_no_rank_is_named_in_a_clean_run(ranks: int, base: float, noise: float, seed: int) -> None:
    for recent in Machine(ranks, base, noise, seed, {}).run(90):
        assert find_slow_ranks(recent, FACTOR) == []


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 9),
    st.floats(0.03, 5),
    st.floats(0, 0.25),
    st.integers(0, 2**32),
    st.floats(4, 20),
    st.integers(1, 60),
    st.booleans(),
    st.data(),
)
def test_a_slow_rank_is_named_within_twenty_steps_and_no_other(
    ranks: int, base: float, noise: float, seed: int, slowness: float, since: int, slow_data: bool, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, ranks - 1))
    machine = Machine(ranks, base, noise, seed, {rank: slowness}, since, slow_data=slow_data)
    judge = SlowRanks(FACTOR)
    named = []
    for step, recent in enumerate(machine.run(since + 30), start=1):
        for found in judge.look(recent):
            named.append((found.global_rank, step))
            assert found.factor > FACTOR and found.seconds > found.peers_seconds
            assert (found.part == "waiting for data") == slow_data
    assert [found for found, _ in named] == [rank]
    assert since < named[0][1] < since + 20


def test_of_many_slow_ranks_the_slowest_comes_first() -> None:
    *_, recent = Machine(8, 0.5, 0.1, 7, {3: 3.0, 6: 6.0, 7: 4.0}).run(40)
    found = find_slow_ranks(recent, FACTOR)
    assert [rank.global_rank for rank in found] == [6, 7, 3]
    assert 5 < found[0].factor < 7


def test_a_rank_is_named_once_and_again_after_it_had_recovered() -> None:
    ill = list(Machine(4, 0.5, 0.1, 1, {2: 5.0}).run(40))
    well = list(Machine(4, 0.5, 0.1, 2, {}).run(40))
    judge = SlowRanks(FACTOR)
    named = [len(judge.look(recent)) for recent in (*ill[-5:], *well[-5:], *ill[-5:])]
    assert named == [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0]


def even(own: dict[int, float], steps: int = WINDOW) -> dict[int, list[StepTimes]]:
    longest = max(own.values())
    return {
        rank: [StepTimes(step, longest, 0.0, seconds, longest - seconds) for step in range(1, steps + 1)]
        for rank, seconds in own.items()
    }


@pytest.mark.parametrize(("slowness", "named"), [(1.9, []), (2.1, [1])])
def test_the_factor_is_the_bar(slowness: float, named: list[int]) -> None:
    found = find_slow_ranks(even({0: 1.0, 1: slowness, 2: 1.0}), FACTOR)
    assert [rank.global_rank for rank in found] == named


def test_a_loss_too_small_to_matter_is_not_named() -> None:
    assert find_slow_ranks(even({0: 0.002, 1: 0.02}), FACTOR) == []
    assert find_slow_ranks(even({0: 0.02, 1: 0.2}), FACTOR)


def test_too_few_steps_or_ranks_say_nothing() -> None:
    assert find_slow_ranks(even({0: 1.0, 1: 9.0}, WINDOW - 1), FACTOR) == []
    assert find_slow_ranks(even({0: 1.0}), FACTOR) == []
    assert find_slow_ranks({0: [], 1: []}, FACTOR) == []
    assert find_slow_ranks({}, FACTOR) == []


def test_steps_are_compared_with_the_same_steps() -> None:
    """One rank was read later than the other; both have steps the other has not."""
    recent = even({0: 1.0, 1: 5.0}, WINDOW + 4)
    recent = {0: recent[0][:-3], 1: recent[1][1:]}
    assert [rank.global_rank for rank in find_slow_ranks(recent, FACTOR)] == [1]
    recent[1] = [replace(times, step=times.step + 1000) for times in recent[1]]
    assert find_slow_ranks(recent, FACTOR) == []


def test_after_a_rollback_the_later_times_of_a_step_count() -> None:
    slow, fast = even({0: 1.0, 1: 9.0}), even({0: 1.0, 1: 1.0})
    assert find_slow_ranks({rank: [*slow[rank], *fast[rank]] for rank in slow}, FACTOR) == []


def test_single_slow_steps_are_passed_over() -> None:
    recent = even({0: 1.0, 1: 1.0})
    slow = [replace(times, seconds=9.0, compute=9.0) for times in recent[1]]
    assert find_slow_ranks({0: recent[0], 1: [*slow[: OFTEN - 1], *recent[1][OFTEN - 1 :]]}, FACTOR) == []
    assert find_slow_ranks({0: recent[0], 1: [*slow[:OFTEN], *recent[1][OFTEN:]]}, FACTOR)


def test_the_part_where_the_time_goes_is_named() -> None:
    fast = StepTimes(1, 1.0, 0.1, 0.9, 0.0, 0.3, 0.5)
    for part, slow in {
        "waiting for data": replace(fast, data_wait=5.0),
        "forward": replace(fast, forward=5.0, compute=5.6),
        "backward": replace(fast, backward=5.0, compute=5.4),
        "the rest of the step": replace(fast, compute=5.0),
    }.items():
        slow = replace(slow, seconds=slow.data_wait + slow.compute)
        recent = {
            rank: [replace(times, step=step) for step in range(WINDOW)] for rank, times in enumerate((fast, fast, slow))
        }
        (found,) = find_slow_ranks(recent, FACTOR)
        assert found.global_rank == 2 and found.part == part
        assert part in found.describe() and "rank 2 is 5." in found.describe()


# -- layouts whose ranks have different work ---------------------------------------------------------------------------

MODEL = ModelConfig(num_layers=8, hidden_size=256, num_heads=4, vocab_size=50257, sequence_length=512)


def test_ranks_are_compared_with_those_of_their_own_stage() -> None:
    layout = Layout(world_size=8, tensor=2, pipeline=2)
    loads = rank_loads(MODEL, layout)
    last = [rank for rank in range(8) if layout.pipeline_stage(rank) == 1]
    own = {rank: 3.0 if rank in last else 1.0 for rank in range(8)}  # the output head makes it so
    assert find_slow_ranks(even(own), FACTOR, loads) == []
    own[last[1]] *= 2.5
    assert [rank.global_rank for rank in find_slow_ranks(even(own), FACTOR, loads)] == [last[1]]
    first = min(rank for rank in range(8) if rank not in last)
    own = {**own, last[1]: 3.0, first: 2.5}  # though others have more to do
    assert [rank.global_rank for rank in find_slow_ranks(even(own), FACTOR, loads)] == [first]


@pytest.mark.parametrize("pipeline", [2, 4])
def test_a_stage_of_one_rank_may_take_what_its_work_takes(pipeline: int) -> None:
    loads = rank_loads(MODEL, Layout(world_size=pipeline, pipeline=pipeline))
    own = {rank: load / loads[0] for rank, load in loads.items()}
    assert find_slow_ranks(even(own), FACTOR, loads) == []
    assert find_slow_ranks(even({**own, pipeline - 1: 2 * own[pipeline - 1]}), FACTOR, loads) == []
    slow = find_slow_ranks(even({**own, pipeline - 1: 5 * own[pipeline - 1]}), FACTOR, loads)
    assert [rank.global_rank for rank in slow] == [pipeline - 1]


def test_a_light_stage_is_not_slow_for_taking_as_long_as_a_heavy_one() -> None:
    loads = rank_loads(MODEL, Layout(world_size=2, pipeline=2))
    assert loads[1] > 4 * loads[0]
    assert find_slow_ranks(even({0: 1.0, 1: 1.0}), FACTOR, loads) == []


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([1, 2]))
def test_loads_add_up_to_the_models_work(tensor: int, pipeline: int, data: int, chunks: int) -> None:
    virtual = chunks if pipeline > 1 else 1
    layout = Layout(tensor * pipeline * data, tensor, pipeline, virtual)
    loads = rank_loads(MODEL, layout)
    assert set(loads) == set(range(layout.world_size))
    by_stage = {layout.pipeline_stage(rank): load for rank, load in loads.items()}
    whole = rank_loads(MODEL, Layout())[0]
    assert sum(by_stage.values()) == pytest.approx(whole)
    for rank, load in loads.items():
        assert load == by_stage[layout.pipeline_stage(rank)]
