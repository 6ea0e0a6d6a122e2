"""How model and batch are split over ranks."""

import math
from collections.abc import Iterator

from gptdist.config.rules.rule import Broken, Rule, divisors, nearest
from gptdist.config.sections import RunConfig


def rule_world_size(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """tensor x pipeline divides the world size."""
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    ranks = tensor * pipeline
    if world_size % ranks:
        text = (
            f"parallel.tensor ({tensor}) x parallel.pipeline ({pipeline}) = {ranks} does not divide the world size "
            f"{world_size}. Use {nearest(world_size, ranks)} ranks, or change parallel.tensor or parallel.pipeline."
        )
        yield Broken(text, ("parallel.tensor", "parallel.pipeline"))


def rule_attention_heads(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Heads split the width; key/value heads split the heads; rotary pairs the features of a head."""
    model = config.model
    heads, hidden = model.num_heads, model.hidden_size
    if heads % model.kv_heads:
        text = (
            f"model.num_kv_heads ({model.kv_heads}) does not divide model.num_heads ({heads}). "
            f"It can be {divisors(heads)}."
        )
        yield Broken(text, ("model.num_kv_heads", "model.num_heads"))
    if hidden % heads:
        text = (
            f"model.hidden_size ({hidden}) is not a multiple of model.num_heads ({heads}). "
            f"Use model.hidden_size {nearest(hidden, heads)}."
        )
        yield Broken(text, ("model.hidden_size", "model.num_heads"))
    elif model.position == "rotary" and model.head_size % 2:
        text = (
            f"model.position rotary needs an even head size; model.hidden_size ({hidden}) / model.num_heads ({heads}) "
            f"is {model.head_size}. Use model.hidden_size {nearest(hidden, 2 * heads)}."
        )
        yield Broken(text, ("model.position", "model.hidden_size", "model.num_heads"))


def rule_tensor_divides(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Heads, key/value heads and the MLP are split evenly over tensor-parallel ranks."""
    model, tensor = config.model, config.parallel.tensor
    parts = {"num_heads": model.num_heads, "num_kv_heads": model.kv_heads, "ffn_hidden_size": model.ffn_size}
    valid = divisors(math.gcd(*parts.values()))
    for key, size in parts.items():
        if size % tensor and not (key == "num_kv_heads" and model.num_kv_heads is None):
            text = (
                f"parallel.tensor ({tensor}) does not divide model.{key} ({size}). With this model it can be {valid}."
            )
            yield Broken(text, ("parallel.tensor", f"model.{key}"))


def rule_pipeline_layers(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Every model chunk of every pipeline stage holds as many layers."""
    layers, parallel = config.model.num_layers, config.parallel
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if layers % chunks:
        text = (
            f"model.num_layers ({layers}) is not a multiple of parallel.pipeline ({parallel.pipeline}) x "
            f"parallel.virtual_pipeline ({parallel.virtual_pipeline}) = {chunks}. Use {nearest(layers, chunks)} "
            f"layers, or a product among {divisors(layers)}."
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
            f"does not divide it. Use model.sequence_length {nearest(length, tensor)}, or parallel.sequence: false."
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
            text = f"{key} ({size}) is not a multiple of {product} = {unit}. Use {nearest(size, unit)}{smaller}."
            yield Broken(text, (key, *keys))


def rule_zero_options(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """Offload moves ZeRO's partitions, so there must be some."""
    parallel = config.parallel
    if parallel.offload_optimizer and parallel.zero_stage == 0:
        text = "parallel.offload_optimizer (true) needs parallel.zero_stage 1, 2 or 3; it is 0. Set it to 1."
        yield Broken(text, ("parallel.offload_optimizer", "parallel.zero_stage"))


RULES: tuple[Rule, ...] = (
    rule_world_size,
    rule_attention_heads,
    rule_tensor_divides,
    rule_pipeline_layers,
    rule_virtual_pipeline,
    rule_sequence_parallel,
    rule_batch_divides,
    rule_zero_options,
)
