"""Learning rates and batch sizes as pure functions of step and sample."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.config.sections import BatchRamp, OptimizerConfig, ScheduleConfig, TrainConfig
from gptdist.train.schedule import batch_ramp_levels, batch_size_at, learning_rate, samples_at_step, total_samples

OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


def schedule_of(kind: str, **fields: object) -> ScheduleConfig:
    return ScheduleConfig.model_validate({"kind": kind, "warmup_steps": 10, "min_learning_rate": 1e-4, **fields})


def rates(schedule: ScheduleConfig, steps: int) -> list[float]:
    return [learning_rate(step, OPTIMIZER, schedule, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_from_the_first_step_to_the_peak(kind: str) -> None:
    got = rates(schedule_of(kind), 110)[:10]
    assert got == pytest.approx([1e-4 * step for step in range(1, 11)])
    assert got[-1] == 1e-3


def test_cosine_has_its_known_values() -> None:
    got = rates(schedule_of("cosine"), 110)
    assert got[59] == pytest.approx(5.5e-4)  # half-way between step 10 and 110: the mean of peak and floor
    assert got[34] == pytest.approx(1e-4 + 9e-4 * 0.5 * (1 + 2**-0.5))  # a quarter
    assert got[-1] == 1e-4


def test_linear_has_its_known_values() -> None:
    got = rates(schedule_of("linear"), 110)
    assert got[34] == pytest.approx(1e-4 + 9e-4 * 0.75)
    assert got[84] == pytest.approx(1e-4 + 9e-4 * 0.25)
    assert got[-1] == 1e-4


def test_wsd_is_flat_and_then_decays_as_one_minus_root() -> None:
    got = rates(schedule_of("wsd", wsd_decay_fraction=0.25), 400)
    assert got[9:300] == [1e-3] * 291
    assert got[324] == pytest.approx(1e-4 + 9e-4 * 0.5)  # a quarter of the decay: 1 - sqrt(1/4)
    assert got[-1] == 1e-4


def test_wsd_that_decays_all_along_starts_at_the_end_of_warm_up() -> None:
    got = rates(schedule_of("wsd", wsd_decay_fraction=1.0), 110)
    assert got[9] == 1e-3
    assert got[10] == pytest.approx(1e-4 + 9e-4 * (1 - 0.1))


def test_constant_stays_at_the_peak() -> None:
    assert set(rates(schedule_of("constant"), 50)[9:]) == {1e-3}


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd"])
def test_decay_steps_end_the_decay_early(kind: str) -> None:
    short, whole = schedule_of(kind, decay_steps=60), schedule_of(kind)
    assert rates(short, 100)[:60] == rates(whole, 60)
    assert rates(short, 100)[59:] == [1e-4] * 41


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("steps", [8, 9, 100])
def test_after_warm_up_the_rate_never_rises(kind: str, warmup: int, steps: int) -> None:
    got = rates(schedule_of(kind, warmup_steps=warmup), steps)[max(0, warmup - 1) :]
    assert all(1e-4 <= rate <= 1e-3 for rate in got)
    assert all(later <= earlier for earlier, later in itertools.pairwise(got))


def test_steps_count_from_one() -> None:
    with pytest.raises(ValueError, match="count from 1, got 0"):
        learning_rate(0, OPTIMIZER, schedule_of("cosine"), 100)


def ramp_of(start: int, increment: int, samples: int, levels: int, steps: int) -> tuple[TrainConfig, ScheduleConfig]:
    train = TrainConfig(steps=steps, global_batch_size=start + increment * (levels - 1))
    return train, ScheduleConfig(batch_ramp=BatchRamp(start=start, increment=increment, samples=samples))


def test_a_ramp_spends_an_equal_share_of_samples_at_each_level() -> None:
    train, schedule = ramp_of(start=2, increment=2, samples=40, levels=4, steps=100)
    assert batch_ramp_levels(train, schedule) == [2, 4, 6, 8]
    got = [batch_size_at(sample, train, schedule) for sample in (0, 9, 10, 19, 20, 29, 30, 39, 40, 10**15)]
    assert got == [2, 2, 4, 4, 6, 6, 8, 8, 8, 8]


def test_without_a_ramp_every_batch_is_the_global_batch() -> None:
    train = TrainConfig(steps=7, global_batch_size=12)
    assert {batch_size_at(sample, train, ScheduleConfig()) for sample in range(100)} == {12}
    assert total_samples(train, ScheduleConfig()) == 84


ramps = st.builds(
    ramp_of,
    start=st.integers(1, 20),
    increment=st.integers(1, 20),
    samples=st.integers(1, 600),
    levels=st.integers(1, 9),
    steps=st.integers(1, 80),
)


@given(ramps)
def test_samples_at_step_is_what_the_steps_consume(ramp: tuple[TrainConfig, ScheduleConfig]) -> None:
    train, schedule = ramp
    consumed = 0
    for step in range(1, train.steps + 1):
        consumed += batch_size_at(consumed, train, schedule)
        assert samples_at_step(step, train, schedule) == consumed
    assert total_samples(train, schedule) == consumed
    assert samples_at_step(0, train, schedule) == 0


@given(ramps, st.integers(0, 10**6))
def test_a_batch_is_a_level_and_never_shrinks(ramp: tuple[TrainConfig, ScheduleConfig], sample: int) -> None:
    train, schedule = ramp
    here, later = (batch_size_at(place, train, schedule) for place in (sample, sample + 1))
    assert here in batch_ramp_levels(train, schedule)
    assert here <= later <= train.global_batch_size


def test_a_ramp_of_a_large_run_is_exact_and_quick() -> None:
    train, schedule = ramp_of(start=16, increment=16, samples=6 * 10**9, levels=96, steps=10**9)
    assert train.global_batch_size == 1536
    assert batch_size_at(6 * 10**9 - 1, train, schedule) == 1536
    assert batch_size_at(62_499_999, train, schedule) == 16
    assert batch_size_at(62_500_000, train, schedule) == 32
    assert samples_at_step(62_500_000 // 16, train, schedule) == 62_500_000
