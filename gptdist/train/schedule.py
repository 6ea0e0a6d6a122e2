"""Learning rate by step, global batch size by sample, and how many samples some steps consume.

Pure functions of the config's sections: no torch, no state, so that a resumed run has the same schedule as one that was
never stopped. Which configs make sense is in `gptdist/config/rules/`.
"""

import math

from gptdist.config.sections import OptimizerConfig, ScheduleConfig, TrainConfig


def learning_rate(step: int, optimizer: OptimizerConfig, schedule: ScheduleConfig, steps: int) -> float:
    """The rate of optimizer step `step`; the first step is 1. `steps` is `train.steps`.

    Linear warm-up that reaches the peak at step `warmup_steps`, then `schedule.kind`, which reaches `min_learning_rate`
    at `decay_steps` and stays there; `constant` stays at the peak.
    """
    if step < 1:
        raise ValueError(f"steps count from 1, got {step}")
    peak, floor = optimizer.learning_rate, schedule.min_learning_rate
    if step <= schedule.warmup_steps:
        return peak * step / schedule.warmup_steps
    if schedule.kind == "constant":
        return peak
    last = schedule.decay_steps or steps
    if step >= last:
        return floor
    return floor + (peak - floor) * _remaining(step, last, schedule)


def batch_ramp_levels(train: TrainConfig, schedule: ScheduleConfig) -> list[int]:
    """The global batch sizes of a run in order; the last is train.global_batch_size."""
    ramp = schedule.batch_ramp
    if ramp is None:
        return [train.global_batch_size]
    return list(range(ramp.start, train.global_batch_size + 1, ramp.increment))


def batch_size_at(sample: int, train: TrainConfig, schedule: ScheduleConfig) -> int:
    """Global batch size of the step whose first sample is `sample`, that is after `sample` samples were consumed.

    A ramp with levels 0..K spends an equal share of `batch_ramp.samples` at each: level k holds while
    sample < samples * (k + 1) / (K + 1), and the last level for ever. A growing batch is from Brown et al. 2020 (the
    GPT-3 paper), appendix B; counting it in samples keeps it independent of where a run was stopped.
    """
    ramp = schedule.batch_ramp
    if ramp is None:
        return train.global_batch_size
    levels = batch_ramp_levels(train, schedule)
    return levels[min(sample * len(levels) // ramp.samples, len(levels) - 1)]


def samples_at_step(step: int, train: TrainConfig, schedule: ScheduleConfig) -> int:
    """Samples consumed once `step` optimizer steps are done. Takes time in the number of ramp levels, not in steps."""
    ramp = schedule.batch_ramp
    if ramp is None:
        return step * train.global_batch_size
    levels = batch_ramp_levels(train, schedule)
    consumed = 0
    for level, batch_size in enumerate(levels[:-1]):
        level_end = _ceil_div(ramp.samples * (level + 1), len(levels))
        # A step can be larger than a level: then the level after it gets no step at all.
        steps_here = min(step, max(0, _ceil_div(level_end - consumed, batch_size)))
        consumed += steps_here * batch_size
        step -= steps_here
    return consumed + step * levels[-1]


def total_samples(train: TrainConfig, schedule: ScheduleConfig) -> int:
    """Samples a complete run of `train.steps` steps consumes."""
    return samples_at_step(train.steps, train, schedule)


def _remaining(step: int, last: int, schedule: ScheduleConfig) -> float:
    """What is left of the way from peak to floor, 1 to 0, for warmup_steps < step < last."""
    if schedule.kind == "wsd":
        # Warm-up, stable, decay: Hu et al. 2024 (MiniCPM, arXiv 2404.06395), section 4. The shape of the decay, 1 minus
        # the root, is Haegele et al. 2024 (arXiv 2405.18392), who found it better than a linear one.
        start = max(schedule.warmup_steps, last - round(schedule.wsd_decay_fraction * last))
        return 1.0 if step <= start else 1.0 - math.sqrt((step - start) / (last - start))
    progress = (step - schedule.warmup_steps) / (last - schedule.warmup_steps)
    if schedule.kind == "linear":
        return 1.0 - progress
    return 0.5 * (1.0 + math.cos(math.pi * progress))  # Loshchilov & Hutter 2017 (SGDR), equation 5, without restarts


def _ceil_div(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)
