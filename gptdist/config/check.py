"""The rules that join settings, sections and the world size; each is a function named `rule_*`.

Pure: knows values and where they were written, no file and no process. What one setting keeps by itself is in
`sections.py`.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

from gptdist.config.problems import Problem, places_of, raise_problems
from gptdist.config.sections import BlendPart, CheckpointConfig, DataConfig, RunConfig, ScheduleConfig, TrainConfig
from gptdist.config.weights import LARGEST_PERIOD, rounded_weights, whole_weights
from gptdist.layout import Layout


@dataclass(frozen=True)
class Broken:
    """A broken rule: what to tell, and the settings it is about (for their file and line)."""

    text: str
    keys: tuple[str, ...]


Rule = Callable[[RunConfig, int], Iterator[Broken]]


def check_run(config: RunConfig, world_size: int, origins: Mapping[str, str] | None = None) -> Layout:
    """The layout of `config` on `world_size` ranks. Raises ConfigError listing every broken rule with its origins."""
    problems = [
        Problem(broken.text, places_of(broken.keys, origins or {}))
        for rule in RULES
        for broken in rule(config, world_size)
    ]
    raise_problems(problems, f"this run on {world_size} ranks")
    parallel = config.parallel
    return Layout(
        world_size=world_size,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        sequence_parallel=parallel.sequence,
        zero_stage=parallel.zero_stage,
    )


def batch_ramp_levels(train: TrainConfig, schedule: ScheduleConfig) -> list[int]:
    """The global batch sizes of a run in order; the last is train.global_batch_size."""
    ramp = schedule.batch_ramp
    if ramp is None:
        return [train.global_batch_size]
    return list(range(ramp.start, train.global_batch_size + 1, ramp.increment))


def rule_corpus_or_blend(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """A run reads one corpus or a blend of several."""
    data = config.data
    if data.corpus is not None and data.blend is not None:
        text = (
            f"data.corpus ({data.corpus}) and data.blend are both set; a run reads one corpus or a blend. Leave one "
            "out (a file's is undone by data.blend=null or data.corpus=null)."
        )
        yield Broken(text, ("data.corpus", "data.blend"))
    elif data.corpus is None and data.blend is None:
        text = "data.corpus is not set. Set it to a corpus, or data.blend to several: [{corpus: DIR, weight: 1}, ...]."
        yield Broken(text, ("data.corpus", "data.blend"))


def rule_blend(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Each blend has corpora, each once, and weights whose turns repeat before long."""
    for key, blend in _blends(config.data):
        if not blend:
            yield Broken(f"{key} is empty. Name at least one corpus: [{{corpus: DIR, weight: 1}}].", (key,))
            continue
        names = [part.corpus for part in blend]
        for number, name in enumerate(names):
            if name in names[:number]:
                first = f"{key}[{names.index(name)}].corpus"
                again = f"{key}[{number}].corpus"
                text = f"{again} names {name} a second time; the first is {first}. Add their weights up in one."
                yield Broken(text, (again, first))
        weights = [part.weight for part in blend]
        period = sum(whole_weights(weights))
        if period > LARGEST_PERIOD:
            near = ", ".join(map(str, rounded_weights(weights)))
            text = (
                f"The weights of {key} ({', '.join(f'{weight:g}' for weight in weights)}) repeat only after {period:,} "
                f"samples, the sum of the smallest whole numbers in their proportions; it can be at most "
                f"{LARGEST_PERIOD:,}. Use rounder ones: {near}."
            )
            yield Broken(text, (key, *(f"{key}[{number}].weight" for number in range(len(blend)))))


def rule_phases(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Phases replace a blend, each later than the one before."""
    data = config.data
    if data.phases and data.blend is None:
        text = (
            "data.phases replace data.blend, which is not set. Write the corpus of the first phase as a blend: "
            f"data.blend: [{{corpus: {data.corpus or 'DIR'}, weight: 1}}]."
        )
        yield Broken(text, ("data.phases", "data.corpus"))
    for number, (earlier, later) in enumerate(pairwise(data.phases), 1):
        if later.from_sample <= earlier.from_sample:
            key = f"data.phases[{number}].from_sample"
            text = (
                f"{key} ({later.from_sample}) is not above that of the phase before it ({earlier.from_sample}). Put "
                f"the phases in their order; this one can begin at {earlier.from_sample + 1} or later."
            )
            yield Broken(text, (key, f"data.phases[{number - 1}].from_sample"))


def rule_local_shuffle(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Blocks belong to the local shuffle."""
    data, defaults = config.data, DataConfig()
    if data.shuffle == "local":
        return
    for key in ("shuffle_blocks", "shuffle_block_tokens"):
        value, default = getattr(data, key), getattr(defaults, key)
        if value != default:
            text = (
                f"data.{key} ({value}) is about blocks, and data.shuffle is {data.shuffle}, which has none. Set "
                f"data.shuffle: local, or leave data.{key} out."
            )
            yield Broken(text, (f"data.{key}", "data.shuffle"))


def rule_world_size(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """tensor x pipeline divides the world size."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    ranks = tensor * pipeline
    if world_size % ranks:
        text = (
            f"parallel.tensor ({tensor}) x parallel.pipeline ({pipeline}) = {ranks} does not divide the world size "
            f"{world_size}. Use {_nearest(world_size, ranks)} ranks, or change parallel.tensor or parallel.pipeline."
        )
        yield Broken(text, ("parallel.tensor", "parallel.pipeline"))


def rule_tensor_divides(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Heads, key/value heads and the MLP are split evenly over tensor-parallel ranks."""
    model, tensor = config.model, config.parallel.tensor
    parts = {"num_heads": model.num_heads, "num_kv_heads": model.kv_heads, "ffn_hidden_size": model.ffn_size}
    valid = _divisors(math.gcd(*parts.values()))
    for key, size in parts.items():
        if size % tensor and not (key == "num_kv_heads" and model.num_kv_heads is None):
            text = (
                f"parallel.tensor ({tensor}) does not divide model.{key} ({size}). With this model it can be {valid}."
            )
            yield Broken(text, ("parallel.tensor", f"model.{key}"))


def rule_attention_heads(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Heads split the width; key/value heads split the heads; rotary pairs the features of a head."""
    model = config.model
    heads, hidden = model.num_heads, model.hidden_size
    if heads % model.kv_heads:
        text = (
            f"model.num_kv_heads ({model.kv_heads}) does not divide model.num_heads ({heads}). "
            f"It can be {_divisors(heads)}."
        )
        yield Broken(text, ("model.num_kv_heads", "model.num_heads"))
    if hidden % heads:
        text = (
            f"model.hidden_size ({hidden}) is not a multiple of model.num_heads ({heads}). "
            f"Use model.hidden_size {_nearest(hidden, heads)}."
        )
        yield Broken(text, ("model.hidden_size", "model.num_heads"))
    elif model.position == "rotary" and model.head_size % 2:
        text = (
            f"model.position rotary needs an even head size; model.hidden_size ({hidden}) / model.num_heads ({heads}) "
            f"is {model.head_size}. Use model.hidden_size {_nearest(hidden, 2 * heads)}."
        )
        yield Broken(text, ("model.position", "model.hidden_size", "model.num_heads"))


def rule_pipeline_layers(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Every model chunk of every pipeline stage holds as many layers."""
    layers, parallel = config.model.num_layers, config.parallel
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if layers % chunks:
        text = (
            f"model.num_layers ({layers}) is not a multiple of parallel.pipeline ({parallel.pipeline}) x "
            f"parallel.virtual_pipeline ({parallel.virtual_pipeline}) = {chunks}. Use {_nearest(layers, chunks)} "
            f"layers, or a product among {_divisors(layers)}."
        )
        yield Broken(text, ("model.num_layers", "parallel.pipeline", "parallel.virtual_pipeline"))


def rule_virtual_pipeline(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Interleaving needs a pipeline to interleave."""
    parallel = config.parallel
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        text = (
            f"parallel.virtual_pipeline ({parallel.virtual_pipeline}) needs parallel.pipeline above 1; it is 1. "
            "Set parallel.virtual_pipeline: 1, or parallel.pipeline: 2 or more."
        )
        yield Broken(text, ("parallel.virtual_pipeline", "parallel.pipeline"))


def rule_sequence_parallel(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Sequence parallel splits the sequence over the tensor-parallel ranks."""
    tensor, length = config.parallel.tensor, config.model.sequence_length
    if not config.parallel.sequence:
        return
    if tensor == 1:
        text = (
            "parallel.sequence (true) needs parallel.tensor above 1; it is 1. "
            "Set parallel.sequence: false, or parallel.tensor: 2 or more."
        )
        yield Broken(text, ("parallel.sequence", "parallel.tensor"))
    elif length % tensor:
        text = (
            f"parallel.sequence splits model.sequence_length ({length}) over parallel.tensor ({tensor}) ranks, which "
            f"does not divide it. Use model.sequence_length {_nearest(length, tensor)}, or parallel.sequence: false."
        )
        yield Broken(text, ("model.sequence_length", "parallel.tensor", "parallel.sequence"))


def rule_batch_divides(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Every global batch of the run, ramp included, is whole micro-batches on every data rank.

    An interleaved pipeline moreover runs its micro-batches in rounds of one per stage (Narayanan et al. 2021, section
    2.2), so that their number must be a multiple of the pipeline size.
    """
    parallel, train = config.parallel, config.train
    data, left_over = divmod(world_size, parallel.tensor * parallel.pipeline)
    if left_over:
        return  # rule_world_size speaks; the data-parallel size is not known
    unit = train.micro_batch_size * data
    product = f"train.micro_batch_size ({train.micro_batch_size}) x data parallel ({data})"
    keys = ["train.micro_batch_size"]
    if parallel.virtual_pipeline > 1:
        unit *= parallel.pipeline
        product += f" x parallel.pipeline ({parallel.pipeline}; with parallel.virtual_pipeline above 1 it counts too)"
        keys += ["parallel.pipeline", "parallel.virtual_pipeline"]
    sizes = {"train.global_batch_size": train.global_batch_size}
    if config.schedule.batch_ramp:
        sizes["schedule.batch_ramp.start"] = config.schedule.batch_ramp.start
        sizes["schedule.batch_ramp.increment"] = config.schedule.batch_ramp.increment
    whole, uneven = divmod(math.gcd(*sizes.values()), unit // train.micro_batch_size)
    fitting = max(size for size in range(1, train.micro_batch_size + 1) if whole % size == 0)
    smaller = "" if uneven else f", or train.micro_batch_size {fitting}"
    for key, size in sizes.items():
        if size % unit:
            text = f"{key} ({size}) is not a multiple of {product} = {unit}. Use {_nearest(size, unit)}{smaller}."
            yield Broken(text, (key, *keys))


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
            f"Use {_nearest_divisor(full - ramp.start, ramp.increment)}."
        )
        yield Broken(text, ("schedule.batch_ramp.increment", "schedule.batch_ramp.start", "train.global_batch_size"))


def rule_zero_options(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Offload moves ZeRO's partitions, so there must be some."""
    parallel = config.parallel
    if parallel.offload_optimizer and parallel.zero_stage == 0:
        text = "parallel.offload_optimizer (true) needs parallel.zero_stage 1, 2 or 3; it is 0. Set it to 1."
        yield Broken(text, ("parallel.offload_optimizer", "parallel.zero_stage"))


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


def rule_start_from(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """A run resumes its own checkpoints by itself; weights to begin with are another's."""
    start, run_dir, own = config.checkpoint.start_from, config.launch.run_dir, config.checkpoint.dir
    if start is None:
        return
    keys = {"launch.run_dir": run_dir, "checkpoint.dir": own or os.path.join(run_dir, "checkpoints")}
    for key, folder in keys.items():
        if os.path.normpath(start) == os.path.normpath(folder):
            text = (
                f"checkpoint.start_from ({start}) is where this run keeps its own checkpoints, which it resumes by "
                "itself. Leave start_from out to go on with them, or begin a run elsewhere: set launch.run_dir."
            )
            yield Broken(text, ("checkpoint.start_from", key))
            return


def rule_save_interval(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """`auto` sets the time between saves by itself, and only it needs to know how often nodes fail."""
    checkpoint, defaults = config.checkpoint, CheckpointConfig()
    if checkpoint.interval == "auto":
        if checkpoint.interval_minutes is not None:
            text = (
                f"checkpoint.interval auto chooses the time between saves, and checkpoint.interval_minutes "
                f"({checkpoint.interval_minutes:g}) sets it. Leave one of them out."
            )
            yield Broken(text, ("checkpoint.interval", "checkpoint.interval_minutes"))
    elif checkpoint.node_mtbf != defaults.node_mtbf:
        text = (
            f"checkpoint.node_mtbf ({checkpoint.node_mtbf:g} s) is for checkpoint.interval: auto; the interval is "
            f"{checkpoint.interval}. Set checkpoint.interval: auto, or leave checkpoint.node_mtbf out."
        )
        yield Broken(text, ("checkpoint.node_mtbf", "checkpoint.interval"))


def rule_keep_best(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """The best are chosen by the evaluation of their own step, so each save needs one."""
    checkpoint, every = config.checkpoint, config.train.eval_interval
    if not checkpoint.keep_best:
        return
    interval = checkpoint.interval
    if interval == "auto" or checkpoint.interval_minutes is not None:
        key = "checkpoint.interval" if interval == "auto" else "checkpoint.interval_minutes"
        text = (
            f"checkpoint.keep_best ({checkpoint.keep_best}) needs an evaluation at each save, and {key} saves by the "
            "clock, at steps that have none. Set checkpoint.interval to a multiple of train.eval_interval, or "
            "checkpoint.keep_best: 0."
        )
        yield Broken(text, ("checkpoint.keep_best", key))
    elif interval and (not every or interval % every):
        near = f"checkpoint.interval {_nearest(interval, every)}" if every else f"train.eval_interval: {interval}"
        text = (
            f"checkpoint.keep_best ({checkpoint.keep_best}) needs an evaluation at each save: checkpoint.interval "
            f"({interval}) must be a multiple of train.eval_interval ({every}). Use {near}, or checkpoint.keep_best: 0."
        )
        yield Broken(text, ("checkpoint.keep_best", "checkpoint.interval", "train.eval_interval"))


def rule_staging_dir(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """What is staged in the folder of checkpoints itself would be written twice for nothing."""
    staging, folder = config.checkpoint.staging_dir, config.checkpoint.dir
    if staging is not None and folder is not None and os.path.normpath(staging) == os.path.normpath(folder):
        text = (
            f"checkpoint.staging_dir ({staging}) is checkpoint.dir. Set it to a folder on the node's own disk, or "
            "leave it out."
        )
        yield Broken(text, ("checkpoint.staging_dir", "checkpoint.dir"))


def rule_upload_url(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """checkpoint.upload is a URL; a folder is checkpoint.dir's."""
    upload = config.checkpoint.upload
    if upload is not None and "://" not in upload:
        text = (
            f"checkpoint.upload ({upload}) is no URL. Write s3://BUCKET/FOLDER, gs://..., or file:///FOLDER; the "
            "folder to save to is checkpoint.dir."
        )
        yield Broken(text, ("checkpoint.upload",))


RULES: tuple[Rule, ...] = (
    rule_corpus_or_blend,
    rule_blend,
    rule_phases,
    rule_local_shuffle,
    rule_world_size,
    rule_attention_heads,
    rule_tensor_divides,
    rule_pipeline_layers,
    rule_virtual_pipeline,
    rule_sequence_parallel,
    rule_batch_divides,
    rule_batch_ramp,
    rule_zero_options,
    rule_loss_scale,
    rule_schedule_order,
    rule_learning_rates,
    rule_stop_after,
    rule_rollback,
    rule_start_from,
    rule_save_interval,
    rule_keep_best,
    rule_staging_dir,
    rule_upload_url,
)


def _blends(data: DataConfig) -> Iterator[tuple[str, tuple[BlendPart, ...]]]:
    """Every blend and where it is set."""
    if data.blend is not None:
        yield "data.blend", data.blend
    for number, phase in enumerate(data.phases):
        yield f"data.phases[{number}].blend", phase.blend


def _nearest(value: int, unit: int) -> str:
    """The multiples of `unit` either side of `value`, for a sentence."""
    lower = value // unit * unit
    return f"{lower} or {lower + unit}" if lower else f"{unit}"


def _divisors(value: int) -> str:
    found = [candidate for candidate in range(1, min(value, 256) + 1) if value % candidate == 0]
    return str(found[0]) if len(found) == 1 else f"{', '.join(map(str, found[:-1]))} or {found[-1]}"


def _nearest_divisor(value: int, near: int) -> int:
    divisors = [candidate for candidate in range(1, math.isqrt(value) + 1) if value % candidate == 0]
    return min(
        divisors + [value // divisor for divisor in divisors], key=lambda divisor: (abs(divisor - near), divisor)
    )
