"""The same code on GPUs: it computes what the CPU computes, in every precision, and over NCCL what one GPU computes.

Each test starts processes of its own. Bounds are relative, on losses and gradient norms of the
first steps on real text.
"""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from gptdist.checkpoint.read import Checkpoint
from gptdist.checkpoint.snapshot import to_host
from gptdist.checkpoint.write import save_checkpoint
from gptdist.comms import Comms
from gptdist.engine.engine import TrainEngine
from gptdist.engine.partition import TensorSource
from gptdist.model.sampling import Sampling
from gptdist.train.sample import generate
from gptdist.world import World
from tests.dist.cases import CLASSIC, LEARNING_RATE, MODELS, NEWLINE, Case, batch_of, engine_of, train, train_steps
from tests.gpu.ranks import run

Curve = list[tuple[float, float]]

# Kernels of the two devices add in other orders, about 1e-6 a product; ten steps of AdamW let that grow.
CPU_BOUND = 1e-4
# The same kernels on the same device, but atomics and collectives may add in any order.
GPU_BOUND = 2e-5
# bf16 keeps 8 bits of the weights and activations; over 50 steps the loss stays this close to fp32's.
BF16_BOUND = 0.02
STEPS = 10
LEARNING_STEPS = 50
PROMPT = [ord(letter) for letter in "import "]

TWO_GPUS = {
    "DP2 ZeRO 0": {"zero_stage": 0},
    "DP2 ZeRO 1": {"zero_stage": 1},
    "DP2 ZeRO 2": {"zero_stage": 2},
    "DP2 ZeRO 3": {"zero_stage": 3},
    "TP2": {"tensor": 2},
    "TP2+SP": {"tensor": 2, "sequence": True},
    "PP2": {"pipeline": 2},
    "PP2xVPP2": {"pipeline": 2, "virtual_pipeline": 2},
    "PP2 ZeRO 3": {"pipeline": 2, "zero_stage": 3},
}
FOUR_GPUS = {
    "DP4 ZeRO 3": {"zero_stage": 3},
    "DP2 x TP2+SP": {"tensor": 2, "sequence": True},
    "DP2 x PP2": {"pipeline": 2},
    "TP2+SP x PP2": {"tensor": 2, "sequence": True, "pipeline": 2},
    "TP2+SP x PP2xVPP2": {"tensor": 2, "sequence": True, "pipeline": 2, "virtual_pipeline": 2},
}


@pytest.mark.parametrize("end_of_text", (None, NEWLINE))
@pytest.mark.parametrize("model", ("classic", "modern"))
def test_fp32_on_a_gpu_equals_the_cpu(model: str, end_of_text: int | None) -> None:
    case = Case(MODELS[model], end_of_text=end_of_text)
    assert_close(curve(case), curve(case, device="cpu"), CPU_BOUND)


@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_16_bit_training_learns_as_fp32_does(precision: str) -> None:
    (losses, skipped), *_ = run(learn, 1, Case(CLASSIC, train={"precision": precision}))
    (reference, _), *_ = run(learn, 1, Case(CLASSIC))
    assert losses[-1] < 0.75 * losses[0]
    if precision == "bf16":
        assert skipped == 0
        assert_close([(loss,) for loss in losses], [(loss,) for loss in reference], BF16_BOUND)
    # A first fp16 loss scale that is too high costs a few steps, no more.
    assert skipped <= 10


def test_zero_stages_agree_on_one_gpu() -> None:
    reference = curve(Case(CLASSIC, parallel={"zero_stage": 0}))
    for stage in (1, 2, 3):
        assert_close(curve(Case(CLASSIC, parallel={"zero_stage": stage})), reference, GPU_BOUND)


def test_recomputed_activations_agree_with_dropout() -> None:
    model = CLASSIC.model_copy(update={"dropout": 0.1, "attention_dropout": 0.1})
    reference = curve(Case(model))
    without = curve(Case(CLASSIC))
    assert abs(reference[0][0] / without[0][0] - 1) > 1e-4, "nothing was dropped"
    for recompute in ("selective", "full"):
        assert_close(curve(Case(model, train={"recompute": recompute})), reference, GPU_BOUND)


@pytest.mark.parametrize("zero_stage", (1, 2, 3))
def test_optimizer_on_the_cpu_agrees(zero_stage: int) -> None:
    reference = curve(Case(CLASSIC, parallel={"zero_stage": zero_stage}))
    offloaded = Case(CLASSIC, parallel={"zero_stage": zero_stage, "offload_optimizer": True})
    assert_close(curve(offloaded), reference, CPU_BOUND)


@pytest.mark.parametrize("precision", ("fp32", "bf16"))
def test_checkpoints_go_from_gpu_to_cpu_and_back_bitwise(tmp_path: Path, precision: str) -> None:
    on_gpu, on_cpu = Case(CLASSIC, train={"precision": precision}), Case(CLASSIC)
    for name, source, there, target, here in (
        ("out", on_gpu, "gpu", on_cpu, "cpu"),
        ("back", on_cpu, "cpu", on_gpu, "gpu"),
    ):
        (saved,) = run(train_and_save, 1, source, str(tmp_path / name), device=there)  # type: ignore[arg-type]
        path = next((tmp_path / name).glob("step-*"))
        (loaded,) = run(load, 1, target, str(path), device=here)  # type: ignore[arg-type]
        assert loaded == saved, f"{name}: weights or moments changed on the way from {there} to {here}"


def test_a_gpu_generates_as_the_cpu_does() -> None:
    (on_gpu,) = run(train_and_generate, 1, Case(CLASSIC))
    (on_cpu,) = run(train_and_generate, 1, Case(CLASSIC), device="cpu")
    first, again, logits = on_gpu
    assert first == again, "the same seed must give the same text"
    assert len(first) == 16
    assert all(0 <= token < CLASSIC.vocab_size for token in first)
    difference = max(abs(a - b) for a, b in zip(logits, on_cpu[2], strict=True))
    assert difference <= CPU_BOUND * max(map(abs, on_cpu[2]))


@pytest.mark.gpu(2)
@pytest.mark.parametrize("spread", TWO_GPUS)
def test_two_gpus_equal_one(spread: str) -> None:
    check_spread(2, TWO_GPUS[spread])


@pytest.mark.gpu(4)
@pytest.mark.parametrize("spread", FOUR_GPUS)
def test_four_gpus_equal_one(spread: str) -> None:
    check_spread(4, FOUR_GPUS[spread])


@pytest.mark.gpu(2)
def test_bf16_on_two_gpus_learns_as_one_does() -> None:
    sizes = {"precision": "bf16", "global_batch_size": 8}
    ((one, _),) = run(learn, 1, Case(CLASSIC, train=sizes))
    for parallel in ({"zero_stage": 2}, {"tensor": 2, "sequence": True}):
        (two, _), *_ = run(learn, 2, Case(CLASSIC, 2, parallel, sizes))
        assert_close([(loss,) for loss in two], [(loss,) for loss in one], BF16_BOUND)


def check_spread(gpus: int, parallel: dict[str, Any]) -> None:
    for name in ("classic", "modern tied"):
        assert_close(curve(Case(MODELS[name], gpus, parallel)), curve(Case(MODELS[name])), GPU_BOUND)


def curve(case: Case, device: Any = "gpu") -> Curve:
    """(loss, gradient norm) of the first steps; the same on every rank. What one rank gave is kept for other tests."""
    key = (repr(case), device)
    if key in _one_rank:
        return _one_rank[key]
    curves = run(train, case.world_size, case, STEPS, device=device)
    assert all(other == curves[0] for other in curves), "the report must be the same on every rank"
    if case.world_size == 1:
        _one_rank[key] = curves[0]
    return list(curves[0])


_one_rank: dict[tuple[str, Any], Curve] = {}


def assert_close(got: list[Any], wanted: list[Any], bound: float) -> None:
    """Every number of every step within `bound`, relative."""
    assert len(got) == len(wanted)
    pairs = [(a, b) for step, reference in zip(got, wanted, strict=True) for a, b in zip(step, reference, strict=True)]
    worst = max(abs(a - b) / abs(b) for a, b in pairs)
    assert worst <= bound, f"{worst:.2g} apart, at most {bound:g} allowed:\n{got}\n{wanted}"


# -- what ranks do ---------------------------------------------------------------------------------------------------


def learn(world: World, case: Case) -> tuple[list[float], int]:
    """The losses of many steps, and how many steps were skipped."""
    with engine_of(case, world) as engine:
        reports = train_steps(engine, case, world, range(1, LEARNING_STEPS + 1))
    return [report.loss for report in reports], sum(report.skipped for report in reports)


def train_and_save(world: World, case: Case, folder: str) -> str:
    """Three steps and a checkpoint; the digest of what was saved."""
    with engine_of(case, world) as engine:
        train_steps(engine, case, world, range(1, 4))
        save_checkpoint(Path(folder), 3, to_host(engine.fragments()), engine.state(), Comms(world))
        return digest(engine)


def load(world: World, case: Case, path: str) -> str:
    """The digest of the state as loaded; the step that follows must be a sound one."""
    with engine_of(case, world) as engine:
        with Checkpoint.open(Path(path), verify=True) as checkpoint:
            engine.read(TensorSource(checkpoint), checkpoint.state)
        engine.refresh()
        loaded = digest(engine)
        report = engine.train_step(batch_of(case, world, 4), LEARNING_RATE, 4)
        if report.skipped or not 0 < report.loss < 6:
            raise AssertionError(f"the step after loading is {report}")
    return loaded


def digest(engine: TrainEngine) -> str:
    """Of all weights and moments, by logical name, and of the number of steps."""
    hashed = hashlib.sha256(str(engine.state()["optimizer_steps"]).encode())
    for fragment in sorted(engine.fragments(), key=lambda fragment: fragment.name):
        hashed.update(fragment.name.encode())
        hashed.update(fragment.data.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def train_and_generate(world: World, case: Case) -> tuple[list[int], list[int], list[float]]:
    """Text drawn twice after a few steps, and the logits after the prompt."""
    with engine_of(case, world) as engine:
        train_steps(engine, case, world, range(1, STEPS + 1))
        first, again = (generate(engine, Comms(world), PROMPT, 16, Sampling(seed=1)) for _ in range(2))
        logits = engine.next_token_logits(torch.tensor(PROMPT))
    return first, again, logits.tolist()
