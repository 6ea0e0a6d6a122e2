"""bf16 and fp16 against fp32, gradients accumulated in fp32, steps skipped because a number is not finite."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from gptdist.checkpoint.logical import Box
from gptdist.engine.engine import InferenceEngine, StepReport, TrainEngine, _InitialWeights
from gptdist.engine.megatron import LocalParameter
from gptdist.world import World
from tests.dist.cases import (
    LEARNING_RATE,
    MODELS,
    Case,
    assemble,
    engine_of,
    held,
    text,
    train,
    train_steps,
)
from tests.dist.ranks import RankPool

SMALL = MODELS["modern tied"].model_copy(update={"num_layers": 2})
DP2 = {f"DP2 ZeRO {stage}": {"zero_stage": stage} for stage in range(4)}
TP2 = {"TP2+SP ZeRO 1": {"tensor": 2, "sequence": True, "zero_stage": 1}}
PP2 = {f"PP2 ZeRO {stage}": {"pipeline": 2, "zero_stage": stage} for stage in (1, 3)}
EVERY_FLOW = {**DP2, **TP2, **PP2}
OFFLOADED = {
    "DP2 ZeRO 2 offload": {"zero_stage": 2, "offload_optimizer": True},
    "PP2 ZeRO 1 offload": {"pipeline": 2, "zero_stage": 1, "offload_optimizer": True},
}
SKIPPING = {**EVERY_FLOW, **OFFLOADED}

# -- bf16 ------------------------------------------------------------------------------------------------------------

BF16_STEPS = 50
# Seen, as the largest relative difference of any step's loss: 0.8e-3 (ZeRO 1, PP2) to 2.5e-3 (ZeRO 2 and 3).
BF16_LOSS_BOUND = 5e-3


def test_bf16_stays_near_fp32_over_50_steps(pool: RankPool) -> None:
    model = MODELS["classic"]
    (reference,) = pool.run(train, 1, Case(model, 1, {}, {"micro_batch_size": 8}), BF16_STEPS)
    assert reference[-1][0] < 0.75 * reference[0][0], "it learns"
    for name in ("DP2 ZeRO 1", "DP2 ZeRO 2", "DP2 ZeRO 3", "PP2 ZeRO 1"):
        fields = {"micro_batch_size": 2, "precision": "bf16"}
        curve = pool.run(train, 2, Case(model, 2, EVERY_FLOW[name], fields), BF16_STEPS)[0]
        apart = [abs(a - b) / b for (a, _), (b, _) in zip(curve, reference, strict=True)]
        print(f"bf16, {name}: loss at most {max(apart):.2e} from fp32, at the end {apart[-1]:.2e}")
        assert max(apart) <= BF16_LOSS_BOUND, name
        assert max(apart) > 1e-5, "it is not fp32 by another name"


# -- accumulation ----------------------------------------------------------------------------------------------------

COUNTS = (1, 64)


def accumulated_gradients(world: World, case: Case, counts: tuple[int, ...]) -> list[list[Any]]:
    """Adam's first moment after one step over `count` times the same micro-batch: 0.1 x their mean gradient."""
    sample = text(case.model.sequence_length + 1)[:1]
    answers = []
    for count in counts:
        with engine_of(case, world) as engine:
            report = engine.train_step(sample.expand(count, 1, -1).contiguous(), LEARNING_RATE, step=1)
            assert not report.skipped
            answers.append(held(engine, "exp_avg"))
    return answers


def bf16_accumulated_gradients(world: World, case: Case, counts: tuple[int, ...]) -> list[list[Any]]:
    """The same by torch alone, in the weights' own bf16: what happens where nothing is done about it."""
    engine = InferenceEngine(case.model, case.train_config, case.layout, world)
    sample = text(case.model.sequence_length + 1)[:1]
    answers = []
    try:
        engine.load_weights(_InitialWeights(case.model, case.train_config.seed))
        for count in counts:
            engine.network.chunks.zero_grad()
            for loss in engine.network.losses(sample.expand(count, 1, -1).contiguous()):
                loss.backward()
            answers.append([_whole_gradient(local) for local in engine.network.parameters])
    finally:
        engine.close()
    return answers


def _whole_gradient(local: LocalParameter) -> Any:
    gradient = local.parameter.grad
    assert gradient is not None and gradient.dtype == torch.bfloat16
    return (local.name, tuple(gradient.shape), Box.whole(gradient.shape), 0.1 * gradient.float().numpy())


def relative_error(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """|gradients - exact| / |exact| over all elements."""
    apart = sum(float((gradients[name] - exact[name]).double().square().sum()) for name in exact)
    return math.sqrt(apart / sum(float(exact[name].double().square().sum()) for name in exact))


def test_bf16_gradients_accumulate_in_fp32(pool: RankPool) -> None:
    """64 micro-batches are as exact as one, under every way gradients flow; in bf16 they would not be."""
    # A vocabulary without padding, so that plain torch has the same gradients.
    model = MODELS["classic"].model_copy(update={"num_layers": 2, "vocab_size": 320})
    optimizer = {"clip_norm": 0.0, "beta1": 0.9}
    case = Case(model, 1, {}, {}, optimizer)
    (exact,) = pool.run(accumulated_gradients, 1, case, (1,))
    exact_whole = assemble(exact)
    bf16 = {"precision": "bf16"}
    for name, parallel in EVERY_FLOW.items():
        by_rank = pool.run(accumulated_gradients, 2, Case(model, 2, parallel, bf16, optimizer), COUNTS)
        errors = [relative_error(assemble(list(parts)), exact_whole) for parts in zip(*by_rank, strict=True)]
        print(f"bf16, {name}: error of the gradient of {COUNTS} micro-batches:", *(f"{error:.2e}" for error in errors))
        assert errors[0] < 2e-2
        assert errors[-1] <= 1.02 * errors[0], name
    (plain,) = pool.run(bf16_accumulated_gradients, 1, Case(model, 1, {}, bf16, optimizer), COUNTS)
    errors = [relative_error(assemble([parts]), exact_whole) for parts in plain]
    print(f"accumulated in bf16: {COUNTS}:", *(f"{error:.2e}" for error in errors))
    assert errors[-1] > 2 * errors[0], "the contrast: this test can fail"


# -- fp16 ------------------------------------------------------------------------------------------------------------

FIRST_SCALE = 2**30


def train_fp16(world: World, case: Case, steps: int) -> list[StepReport]:
    with engine_of(case, world) as engine:
        return train_steps(engine, case, world, range(1, steps + 1))


@pytest.mark.parametrize("name", SKIPPING)
def test_fp16_halves_a_loss_scale_that_is_too_large_and_recovers(pool: RankPool, name: str) -> None:
    fields = {"precision": "fp16", "micro_batch_size": 2, "loss_scale": FIRST_SCALE, "loss_scale_window": 6}
    by_rank = pool.run(train_fp16, 2, Case(SMALL, 2, SKIPPING[name], fields), 30)
    reports = by_rank[0]
    assert by_rank[1] == reports, "all ranks see the same"
    skipped = [report.skipped for report in reports]
    assert 1 <= sum(skipped) < 20 and skipped[0]
    assert all(math.isfinite(report.loss) for report in reports)
    scales = [float(FIRST_SCALE)] + [report.loss_scale for report in reports]
    changes = list(zip(itertools.pairwise(scales), skipped, strict=True))
    assert all(after == before / 2 for (before, after), skip in changes if skip)
    good = [change for change, skip in changes if not skip]
    assert all(after in (before, 2 * before) for before, after in good)
    assert any(after == 2 * before for before, after in good), "six good steps double it"
    assert reports[-1].loss < reports[0].loss - 0.3, "it learns"


# -- non-finite numbers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Poisoned:
    """What a poisoned step, and the sound one after it, did on one rank."""

    report: StepReport
    changed: list[str]  # what the poisoned step changed
    next_report: StepReport
    moved: bool  # the next step changed something
    optimizer_steps: int


def poisoned_steps(world: World, case: Case, poisoned_rank: int) -> dict[str, Poisoned]:
    """A sound step; then one rank meets a NaN in a gradient, a sound step, a loss that is infinite, a sound step."""
    answers = {}
    with engine_of(case, world) as engine:
        train_steps(engine, case, world, range(1, 2))
        for number, poison in enumerate(("gradient", "loss")):
            before = _everything(engine)
            remove = _poison(engine, poison) if world.global_rank == poisoned_rank else lambda: None
            (poisoned,) = train_steps(engine, case, world, range(2 + number, 3 + number))
            remove()
            changed = [name for name, tensor in _everything(engine).items() if not torch.equal(tensor, before[name])]
            (sound,) = train_steps(engine, case, world, range(2 + number, 3 + number))
            moved = any(not torch.equal(tensor, before[name]) for name, tensor in _everything(engine).items())
            answers[poison] = Poisoned(poisoned, changed, sound, moved, engine.state()["optimizer_steps"])
    return answers


def _everything(engine: TrainEngine) -> dict[str, Tensor]:
    """Masters and moments this rank owns, and the logits its model group computes with the weights in use."""
    tensors = {f"{fragment.name} {fragment.box}": fragment.data.clone() for fragment in engine.fragments()}
    tensors["logits"] = engine.logits(text(engine.model.sequence_length)[:2]).clone()
    return tensors


def _poison(engine: TrainEngine, poison: str) -> Any:
    if poison == "gradient":
        parameter = engine.network.parameters[-1].parameter
        return parameter.register_hook(lambda gradient: torch.full_like(gradient, math.nan)).remove
    chunk: Any = engine.network.chunks[-1]
    sound = chunk.compute_language_model_loss
    chunk.compute_language_model_loss = lambda labels, logits: sound(labels, logits) * math.inf

    def remove() -> None:
        del chunk.compute_language_model_loss

    return remove


@pytest.mark.parametrize("precision", ("fp32", "bf16", "fp16"))
@pytest.mark.parametrize("name", SKIPPING)
def test_a_step_with_a_non_finite_number_changes_nothing(pool: RankPool, name: str, precision: str) -> None:
    case = Case(SMALL, 2, SKIPPING[name], {"precision": precision, "micro_batch_size": 2, "loss_scale": 1024})
    # Of a pipeline the last stage, which has the loss; of tensor ranks the one whose loss is reported.
    poisoned_rank = 0 if "tensor" in SKIPPING[name] else 1
    for answers in pool.run(poisoned_steps, 2, case, poisoned_rank):
        for number, (poison, seen) in enumerate(answers.items()):
            assert seen.report.skipped, poison
            whole_buffer = name in ("DP2 ZeRO 0", "DP2 ZeRO 1")
            if whole_buffer or poison == "loss":
                assert poisoned_rank in seen.report.culprits, poison
            if whole_buffer:
                assert seen.report.culprits == (poisoned_rank,), poison
            assert math.isfinite(seen.report.loss) is (poison == "gradient")
            assert seen.changed == [], poison
            assert not seen.next_report.skipped and seen.moved, poison
            assert math.isfinite(seen.next_report.loss) and math.isfinite(seen.next_report.grad_norm)
            assert seen.optimizer_steps == 2 + number, "a skipped step is not counted"
