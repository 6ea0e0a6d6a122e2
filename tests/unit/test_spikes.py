"""Loss spikes: none in the curves of real clean runs; injected ones found within the steps that are stated; resumes."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist.config.sections import TrainConfig
from gptdist.errors import EXIT_DO_NOT_REQUEUE, TooManySpikes
from gptdist.train.progress import Progress, restored_progress
from gptdist.train.rollback import Rollback, check_may_roll_back, gaps_of, plan_rollback
from gptdist.train.spikes import EXTREME, SUSTAINED, Spike, SpikeWatch, steps_to_look_back

Curve = list[list[float]]  # loss and gradient norm of each step
# Of real runs of small models on Python's sources, whole and as they were: what each was is in its name.
CURVES: dict[str, Curve] = json.loads((Path(__file__).with_name("clean_curves.json")).read_text())
BATCH = 8


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**{f"spike_{name}": value for name, value in settings.items()})


def spikes_of(curve: Curve, **settings: Any) -> list[Spike]:
    watch = SpikeWatch(config(**settings), 0, 0)
    judged = (watch.update(step, step * BATCH, *values) for step, values in enumerate(curve, 1))
    return [spike for spike in judged if spike]


def deviation(values: list[float]) -> float:
    """The robust one, of the values that a watch would compare with."""
    middle = sorted(values)[len(values) // 2]
    return 1.4826 * sorted(abs(value - middle) for value in values)[len(values) // 2]


@pytest.mark.parametrize("window", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("name", CURVES)
def test_no_false_alarm_on_clean_curves(name: str, window: int) -> None:
    assert len(CURVES[name]) >= 300
    assert spikes_of(CURVES[name], window=window) == []


@pytest.mark.parametrize("name", CURVES)
def test_no_false_alarm_at_two_thirds_of_the_default(name: str) -> None:
    """The default has room: these curves would stay silent at a third less."""
    assert spikes_of(CURVES[name], factor=config().spike_factor * 2 / 3) == []


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize(
    ("which", "height", "lasts", "within"),
    [
        # Heights above all of the 128 steps before, in times spike_factor deviations of these. A rise that lasts is
        # found after SUSTAINED steps, an extreme loss at once.
        (0, 1, SUSTAINED, SUSTAINED),
        (0, EXTREME, 1, 1),
        (1, 1, SUSTAINED, SUSTAINED),
    ],
)
def test_injected_spikes_are_found(name: str, which: int, height: float, lasts: int, within: int) -> None:
    factor, at = config().spike_factor, config().spike_window
    for start in range(0, len(CURVES[name]) - at - lasts, 17):
        curve = [list(values) for values in CURVES[name][start : start + at + lasts]]
        before = [values[which] for values in curve[:at]]
        if which == 0:
            high = max(before) + max(deviation(before), 0.005 * max(before)) * factor * height
        else:
            high = max(before) * math.exp(max(deviation([math.log(value) for value in before]), 0.05) * factor * height)
        for values in curve[at:]:
            values[which] = high
        found = spikes_of(curve)
        (spike,) = found
        assert at + 1 <= spike.step <= at + within, f"injected after step {start + at}"
        # A real step right before the injected ones may be suspect as well.
        assert at + 1 - 2 <= spike.first_step + config().spike_lead <= at + 1
        assert spike.first_sample == (spike.first_step - 1) * BATCH
        assert spike.text.startswith(f"step {spike.step}: loss {curve[spike.step - 1][0]:.4f}, ")


@pytest.mark.parametrize("name", CURVES)
def test_one_gradient_norm_alone_is_no_spike(name: str) -> None:
    curve = [[loss, norm * (1000 if step % 50 == 7 else 1)] for step, (loss, norm) in enumerate(CURVES[name])]
    assert spikes_of(curve) == []


def noise(seed: int, steps: int) -> Curve:
    """A curve that falls, with some noise."""
    wiggle = [math.sin(seed + 12.9898 * step) * 43758.5453 % 1 - 0.5 for step in range(steps)]
    return [[2 + 3 / (1 + step / 40) + 0.1 * w, math.exp(0.3 * w)] for step, w in enumerate(wiggle)]


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.integers(20, 90), st.floats(0.5, 30))
def test_units_do_not_matter(seed: int, scale: float, norm_scale: float, at: int, rise: float) -> None:
    curve = noise(seed, 100)
    for number in range(at, min(at + 6, 100)):
        curve[number][0] += rise
    scaled = [[loss * scale, norm * norm_scale] for loss, norm in curve]
    one, other = (spikes_of(values, window=16) for values in (curve, scaled))
    assert [(spike.step, spike.first_step) for spike in one] == [(spike.step, spike.first_step) for spike in other]


@settings(deadline=None)
@given(st.data(), st.integers(0, 1000), st.integers(0, 12))
def test_a_resumed_run_judges_as_the_unbroken_one(data: st.DataObject, seed: int, lead: int) -> None:
    """Stopped anywhere, also within a spike, with its state through JSON."""
    curve = noise(seed, 120)
    for at in data.draw(st.lists(st.integers(10, 115), max_size=4)):
        for number in range(at, min(at + data.draw(st.integers(1, 6)), 120)):
            curve[number][data.draw(st.integers(0, 1))] *= data.draw(st.floats(1.0, 20))
    levels = data.draw(st.integers(30, 200))
    skipped = data.draw(st.sets(st.integers(1, 120), max_size=5))
    stops = data.draw(st.sets(st.integers(1, 119), max_size=3))
    train = config(window=16, lead=lead)
    unbroken, resumed = SpikeWatch(train, 0, 0), SpikeWatch(train, 0, 0)
    for step, (loss, norm) in enumerate(curve, 1):
        told = [
            watch.update(step, step * BATCH, loss, norm, skipped=step in skipped, level=step // levels)
            for watch in (unbroken, resumed)
        ]
        assert told[0] == told[1]
        if step in stops:
            resumed = SpikeWatch(train, step, step * BATCH, json.loads(json.dumps(resumed.state())))
    assert unbroken.state() == resumed.state()


def test_a_spike_is_told_once_and_does_not_become_usual() -> None:
    curve = noise(1, 60) + [[50.0, 40.0]] * 10 + noise(1, 120)[60:] + [[50.0, 40.0]] * 2
    assert [spike.step for spike in spikes_of(curve, window=32)] == [61, 131]


def test_a_level_that_stays_is_learned() -> None:
    curve = noise(1, 60) + [[loss + 20, norm] for loss, norm in noise(2, 200)] + [[90.0, 1.0]]
    assert [spike.step for spike in spikes_of(curve, window=32)] == [61, 261]


def test_another_blend_is_no_spike() -> None:
    watch = SpikeWatch(config(window=16), 0, 0)
    told = [
        watch.update(step, step, *values, level=0 if step <= 50 else 51)
        for step, values in enumerate(noise(1, 50) + [[loss + 20, norm] for loss, norm in noise(2, 50)], 1)
    ]
    assert not any(told)


def test_what_is_not_finite_counts_for_nothing() -> None:
    curve = noise(3, 80)
    watch, plain = SpikeWatch(config(window=16, lead=2), 0, 0), SpikeWatch(config(window=16, lead=2), 0, 0)
    at = 0
    for step, (loss, norm) in enumerate(curve, 1):
        at += 1
        plain.update(step, step, loss, norm)
        watch.update(at, at, loss, norm)
        if step % 7 == 0:
            at += 1
            bad = [(math.nan, 1.0), (math.inf, math.inf), (2.0, math.inf)][step % 3]
            assert watch.update(at, at, *bad, skipped=step % 2 == 0) is None
    for key in ("losses", "log_norms", "suspects"):
        assert watch.state()[key] == plain.state()[key]
    assert watch.update(at + 1, at + 1, 99.0, 1.0) is not None


def test_nothing_is_judged_before_half_a_window_is_known() -> None:
    assert spikes_of([[5.0 - step / 10, 1.0] for step in range(15)] + [[80.0, 50.0]], window=32) == []
    assert len(spikes_of([[5.0 - step / 10, 1.0] for step in range(16)] + [[80.0, 50.0]], window=32)) == 1


@given(st.integers(0, 12), st.integers(1, SUSTAINED))
def test_the_suspect_window_is_within_what_is_looked_back_to(lead: int, lasts: int) -> None:
    """Also where steps between were skipped; so a checkpoint that is kept for it is from before it."""
    train = config(window=16, lead=lead)
    watch = SpikeWatch(train, 0, 0)
    for step, values in enumerate(noise(5, 40), 1):
        watch.update(step, step * BATCH, *values)
    for step in range(41, 40 + lasts):
        assert watch.update(step, step * BATCH, 2.0, 50.0) is None
        watch.update(step, step * BATCH, math.nan, math.inf, skipped=True)
    found = watch.update(40 + lasts, (40 + lasts) * BATCH, 99.0, 1.0)
    assert found is not None
    assert found.step - found.first_step < steps_to_look_back(train)
    assert found.first_sample == (found.first_step - 1) * BATCH


# -- rollbacks -----------------------------------------------------------------------------------------------------


def test_a_rollback_passes_over_the_window_and_is_recorded() -> None:
    first = plan_rollback(Spike(30, 21, 200, "step 30: loss"), 20, 300, ())
    assert (first.first_sample, first.stop_sample) == (200, 300)
    # After it sample number 300 is the 201st trained on. The next window, 20 samples further on, is of other numbers.
    second = plan_rollback(Spike(31, 23, 220, "step 31: loss"), 20, 310, (first,))
    assert (second.first_sample, second.stop_sample) == (320, 410)
    assert gaps_of((first, second)).ranges == ((200, 300), (320, 410))
    # A window that begins before an earlier gap takes that in.
    third = plan_rollback(Spike(31, 19, 180, "step 31: loss"), 18, 210, (first,))
    assert gaps_of((first, third)).ranges == ((180, 310),)

    progress = Progress(step=20, samples=200, rollbacks=(first, second))
    state = json.loads(json.dumps({**progress.__dict__, "rollbacks": [vars(rollback) for rollback in (first, second)]}))
    assert restored_progress(state) == progress
    del state["rollbacks"], state["spikes"]
    assert restored_progress(state).rollbacks == (), "a checkpoint of a version that knew none"


def test_the_cap() -> None:
    spike, earlier = Spike(40, 31, 0, "step 40: loss 9"), [Rollback(30, 20, 200, 299, "step 30: loss 8")]
    check_may_roll_back(spike, earlier, 2)
    with pytest.raises(TooManySpikes) as caught:
        check_may_roll_back(spike, earlier, 1)
    assert caught.value.exit_code == EXIT_DO_NOT_REQUEUE
    for part in ("train.max_rollbacks (1)", "step 40: loss 9", "back from step 30 to step 20", "samples 200 to 298"):
        assert part in str(caught.value)
