"""What DeepSpeed is told, derived from our config: stage, gradient flow, its dict, and what it cannot save.

Pure: no torch, no deepspeed. Our config is the truth; `zero.py` asks DeepSpeed back whether it understood.
"""

import enum
from typing import Any

from gptdist.config.sections import OptimizerConfig, ParallelConfig, TrainConfig

OPTIMIZER = "adamw"  # whose moments a checkpoint holds; another's would mean nothing to it


class GradientFlow(enum.Enum):
    """How gradients reach DeepSpeed; docs/engine.md says why each way exists.

    - FLAT: stages 0 and 1, and 2 under a pipeline. Whole fp32 gradients in one buffer, reduced once a step.
    - EACH_MICRO_BATCH: stages 2 and 3 without a pipeline. Reduced after each backward; no whole gradients stay.
    - COALESCED: stage 3 under a pipeline; offload under ZeRO 1, or under a pipeline. Reduced once, after the schedule.
    """

    FLAT = "flat"
    EACH_MICRO_BATCH = "each micro-batch"
    COALESCED = "coalesced"


def choose_flow(parallel: ParallelConfig) -> tuple[GradientFlow, int]:
    """The flow, and the stage DeepSpeed is given.

    Stage 2 under a pipeline is stage 1 to DeepSpeed: a pipeline's schedule interleaves micro-batches, whole gradients
    stay until its end, and there is nothing left for stage 2 to save. Stage 0 is stage 1 over a data group of one rank,
    after a plain all-reduce: the same optimizer code, nothing partitioned.
    """
    pipelined = parallel.pipeline > 1
    if parallel.zero_stage == 3:
        return (GradientFlow.COALESCED if pipelined else GradientFlow.EACH_MICRO_BATCH), 3
    if parallel.zero_stage == 2 and not pipelined:
        return GradientFlow.EACH_MICRO_BATCH, 2
    return (GradientFlow.COALESCED if parallel.offload_optimizer else GradientFlow.FLAT), 1


def memory_note(parallel: ParallelConfig) -> str | None:
    """What a chosen stage does not save, where a pipeline keeps it from saving what its name promises; else None."""
    if parallel.pipeline == 1 or parallel.zero_stage < 2:
        return None
    saves = "optimizer state, as ZeRO 1" if parallel.zero_stage == 2 else "optimizer state and weights"
    return (
        f"ZeRO {parallel.zero_stage} under a pipeline saves {saves}, but no gradient memory: micro-batches are in "
        "flight on all stages, so whole gradients stay on each rank until the step's end"
    )


def deepspeed_config(
    optimizer: OptimizerConfig,
    parallel: ParallelConfig,
    train: TrainConfig,
    data_ranks: int,
    local_parameters: int,
    *,
    pin_memory: bool,
) -> dict[str, Any]:
    """DeepSpeed's dict, derived from ours. Megatron counts micro-batches, so DeepSpeed sees one accumulation step.

    `data_ranks` of DeepSpeed's data group; `local_parameters`: elements this rank computes with.
    """
    flow, stage = choose_flow(parallel)
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": stage == 2,
        "overlap_comm": False,
        # Stage 2 allocates all of it, so no more than could ever fill it.
        "reduce_bucket_size": min(25_000_000, local_parameters),
        "stage3_param_persistence_threshold": 10_000,
        "memory_efficient_linear": False,  # it would replace torch's linear for the whole process
    }
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": pin_memory}
    config: dict[str, Any] = {
        "train_batch_size": train.micro_batch_size * data_ranks,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimizer.clip_norm,
        "communication_data_type": "fp32",
        # Flat gradients are fp32 without DeepSpeed's help; asked for it at stage 1 in bf16, it takes another optimizer.
        "data_types": {"grad_accum_dtype": train.precision if flow is GradientFlow.FLAT else "fp32"},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its CPU Adam compiles when first used; torch's fused one does not
        "steps_per_print": 1_000_000_000,
    }
    if train.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if train.precision == "fp16":
        config["fp16"] = {
            "enabled": True,
            "loss_scale": 0,
            "initial_scale_power": train.loss_scale.bit_length() - 1,
            "loss_scale_window": train.loss_scale_window,
            "hysteresis": 1,
            "min_loss_scale": 1,
        }
    return config
