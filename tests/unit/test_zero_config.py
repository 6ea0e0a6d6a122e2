"""What DeepSpeed is told under every stage, with and without a pipeline and offload."""

import pytest

from gptdist.config.sections import OptimizerConfig, ParallelConfig, TrainConfig
from gptdist.engine.zero_config import GradientFlow, choose_flow, deepspeed_config, memory_note

FLAT, EACH, COALESCED = GradientFlow.FLAT, GradientFlow.EACH_MICRO_BATCH, GradientFlow.COALESCED


@pytest.mark.parametrize(
    ("zero_stage", "pipeline", "offload", "expected"),
    [
        (0, 1, False, (FLAT, 1)),
        (0, 2, False, (FLAT, 1)),
        (1, 1, False, (FLAT, 1)),
        (1, 2, False, (FLAT, 1)),
        (1, 1, True, (COALESCED, 1)),
        (2, 1, False, (EACH, 2)),
        (2, 1, True, (EACH, 2)),
        (2, 2, False, (FLAT, 1)),
        (2, 2, True, (COALESCED, 1)),
        (3, 1, False, (EACH, 3)),
        (3, 2, False, (COALESCED, 3)),
    ],
)
def test_flow(zero_stage: int, pipeline: int, offload: bool, expected: tuple[GradientFlow, int]) -> None:
    parallel = ParallelConfig(zero_stage=zero_stage, pipeline=pipeline, offload_optimizer=offload)
    assert choose_flow(parallel) == expected


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_says_where_a_pipeline_keeps_a_stage_from_saving_gradients(zero_stage: int) -> None:
    assert memory_note(ParallelConfig(zero_stage=zero_stage)) is None
    note = memory_note(ParallelConfig(zero_stage=zero_stage, pipeline=2))
    if zero_stage < 2:
        assert note is None
    else:
        assert note is not None
        assert f"ZeRO {zero_stage} under a pipeline" in note
        assert "no gradient memory" in note


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_derived_from_ours(precision: str, zero_stage: int) -> None:
    train = TrainConfig.model_validate({"precision": precision, "micro_batch_size": 3, "loss_scale": 1024})
    parallel = ParallelConfig(zero_stage=zero_stage, offload_optimizer=zero_stage == 2)
    config = deepspeed_config(OptimizerConfig(clip_norm=0.5), parallel, train, 4, 1000, pin_memory=False)
    assert config["gradient_clipping"] == 0.5
    assert (config["train_batch_size"], config["train_micro_batch_size_per_gpu"]) == (12, 3)
    assert config["zero_optimization"]["stage"] == zero_stage
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert ("offload_optimizer" in config["zero_optimization"]) == (zero_stage == 2)
    assert {"bf16", "fp16"} & config.keys() == {precision} - {"fp32"}
    if precision == "fp16":
        assert 2 ** config["fp16"]["initial_scale_power"] == 1024
