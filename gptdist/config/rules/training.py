"""Steps, batches and rates from the first step to the last."""

from collections.abc import Iterator

from gptdist.config.rules.rule import Broken, Rule, nearest_divisor
from gptdist.config.sections import RunConfig


def rule_batch_ramp(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """A batch ramp climbs to the global batch size in whole increments."""
    ramp, full = config.schedule.batch_ramp, config.train.global_batch_size
    if ramp is None:
        return
    if ramp.start > full:
        text = (
            f"schedule.batch_ramp.start ({ramp.start}) is above train.global_batch_size ({full}), where the ramp ends. "
            f"Use a start of at most {full}."
        )
        yield Broken(text, ("schedule.batch_ramp.start", "train.global_batch_size"))
    elif (full - ramp.start) % ramp.increment:
        text = (
            f"schedule.batch_ramp.increment ({ramp.increment}) does not divide the climb from "
            f"schedule.batch_ramp.start ({ramp.start}) to train.global_batch_size ({full}), {full - ramp.start}. "
            f"Use {nearest_divisor(full - ramp.start, ramp.increment)}."
        )
        yield Broken(text, ("schedule.batch_ramp.increment", "schedule.batch_ramp.start", "train.global_batch_size"))


def rule_loss_scale(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """The fp16 loss scale is doubled and halved: only powers of two leave the bits of a gradient as they are."""
    scale = config.train.loss_scale
    if scale & (scale - 1):
        lower = 1 << scale.bit_length() - 1
        text = f"train.loss_scale ({scale}) is not a power of two. Use {lower} or {2 * lower}."
        yield Broken(text, ("train.loss_scale",))


def rule_schedule_order(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Warm-up, then decay, then the end: in this order and within the run."""
    schedule, steps = config.schedule, config.train.steps
    decay = schedule.decay_steps or steps
    decay_key = "schedule.decay_steps" if schedule.decay_steps else "train.steps"
    if decay > steps:
        text = f"schedule.decay_steps ({decay}) is above train.steps ({steps}). Use at most {steps}, or leave it out."
        yield Broken(text, ("schedule.decay_steps", "train.steps"))
    if schedule.warmup_steps >= decay:
        text = (
            f"schedule.warmup_steps ({schedule.warmup_steps}) must be less than {decay_key} ({decay}), where the "
            f"schedule ends. Use at most {decay - 1}, or raise {decay_key}."
        )
        yield Broken(text, ("schedule.warmup_steps", decay_key))
    elif schedule.kind == "wsd" and schedule.warmup_steps > decay - round(schedule.wsd_decay_fraction * decay):
        latest = decay - round(schedule.wsd_decay_fraction * decay)
        text = (
            f"schedule.warmup_steps ({schedule.warmup_steps}) reaches into the decay, the last "
            f"schedule.wsd_decay_fraction ({schedule.wsd_decay_fraction}) of {decay_key} ({decay}). "
            f"Use at most {latest}, or a smaller fraction."
        )
        yield Broken(text, ("schedule.warmup_steps", "schedule.wsd_decay_fraction", decay_key))


def rule_learning_rates(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """The floor of the learning rate is not above its peak."""
    floor, peak = config.schedule.min_learning_rate, config.optimizer.learning_rate
    if floor > peak:
        text = (
            f"schedule.min_learning_rate ({floor}) is above optimizer.learning_rate ({peak}), the peak. "
            f"Use at most {peak}; a tenth of the peak, {peak / 10:g}, is usual."
        )
        yield Broken(text, ("schedule.min_learning_rate", "optimizer.learning_rate"))


def rule_stop_after(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """A run cannot stop after its end."""
    stop, steps = config.train.stop_after, config.train.steps
    if stop is not None and stop > steps:
        text = f"train.stop_after ({stop}) is above train.steps ({steps}). Use at most {steps}, or leave it out."
        yield Broken(text, ("train.stop_after", "train.steps"))


def rule_rollback(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Who goes back needs a checkpoint to go back to."""
    checkpoint = config.checkpoint
    if config.train.spike_action == "rollback" and not checkpoint.interval and checkpoint.interval_minutes is None:
        text = (
            "train.spike_action rollback goes back to a checkpoint, and with checkpoint.interval (0) the run saves "
            "only at its end. Set checkpoint.interval to a number of steps or auto, or train.spike_action: note."
        )
        yield Broken(text, ("train.spike_action", "checkpoint.interval"))


RULES: tuple[Rule, ...] = (
    rule_batch_ramp,
    rule_loss_scale,
    rule_schedule_order,
    rule_learning_rates,
    rule_stop_after,
    rule_rollback,
)
