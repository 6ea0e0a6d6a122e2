"""Every layout trains as one rank does: losses and gradient norms of the first 10 steps, fp32, real text.

With GPTDIST_FULL=1 the whole matrix runs, 12 layouts x 4 ZeRO stages x 4 models, and its table is kept in
docs/parity.md. By default a subset of 31, COVERING below, which leaves out no pair of what meets in the code (a test
here counts them): kinds of tensor and of pipeline parallelism, data ranks, ZeRO stages, models; and has tensor with
sequence parallelism x stages of a pipeline under every ZeRO stage. Models are then two layers deep where no pipeline
divides them.
The bound is 2e-5 relative for every number, always.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gptdist.config.sections import ModelConfig
from gptdist.model.parameters import decayed
from gptdist.world import World
from tests.dist.cases import CLASSIC, LEARNING_RATE, MODELS, Case, batch_of, engine_of, is_full, train
from tests.dist.ranks import RankPool

BOUND = 2e-5
STEPS = 10
ZERO_STAGES = (0, 1, 2, 3)
Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Spread:
    """A layout without its ZeRO stage."""

    world_size: int
    parallel: dict[str, Any]
    global_batch_size: int = 8
    micro_batch_size: int = 2


SPREADS = {
    "DP2": Spread(2, {}),
    "DP3": Spread(3, {}, global_batch_size=12),
    "TP2": Spread(2, {"tensor": 2}),
    "TP2+SP": Spread(2, {"tensor": 2, "sequence": True}),
    "PP2": Spread(2, {"pipeline": 2}, micro_batch_size=1),
    "PP2xVPP2": Spread(2, {"pipeline": 2, "virtual_pipeline": 2}),
    "TP2+SP x PP2": Spread(4, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "DP2 x TP2": Spread(4, {"tensor": 2}, micro_batch_size=1),
    "DP2 x PP2": Spread(4, {"pipeline": 2}, micro_batch_size=1),
    "DP2 x TP2+SP x PP2": Spread(8, {"tensor": 2, "sequence": True, "pipeline": 2}),
    "TP4+SP": Spread(4, {"tensor": 4, "sequence": True}),
    "PP4": Spread(4, {"pipeline": 4}),
}
_NAMES = list(MODELS)  # classic, classic untied, modern, modern tied

# ZeRO stage -> model, by its place among the names.
COVERING: dict[str, dict[int, int]] = {
    "DP2": {0: 0, 1: 1, 2: 2, 3: 3},
    "DP3": {1: 2, 2: 3, 3: 0},
    "TP2": {0: 2, 3: 1},
    "TP2+SP": {0: 3, 1: 0, 2: 1, 3: 2},
    "PP2": {0: 0, 1: 1, 2: 2, 3: 3},
    "PP2xVPP2": {0: 1, 1: 2, 2: 3, 3: 0},
    "TP2+SP x PP2": {0: 2, 2: 0},
    "DP2 x TP2": {1: 0, 2: 3},
    "DP2 x PP2": {0: 1, 3: 3},
    "DP2 x TP2+SP x PP2": {1: 3, 3: 1},
    "TP4+SP": {1: 2},
    "PP4": {2: 1},
}


def matrix() -> list[Any]:
    """(spread, ZeRO stage, model), all of them or the covering subset."""
    return [
        pytest.param(spread, zero_stage, model, id=f"{spread}-zero{zero_stage}-{model}")
        for spread in SPREADS
        for zero_stage in ZERO_STAGES
        for place, model in enumerate(_NAMES)
        if is_full() or COVERING[spread].get(zero_stage) == place
    ]


def model_for(name: str, spread: str) -> ModelConfig:
    """Four tensor ranks need four key/value heads; two layers are enough of what is repeated on every rank."""
    model, parallel = MODELS[name], SPREADS[spread].parallel
    few = model.num_kv_heads is not None and model.num_kv_heads < parallel.get("tensor", 1)
    shallow = not is_full() and "pipeline" not in parallel
    return model.model_copy(update={"num_kv_heads": 4} if few else {}).model_copy(
        update={"num_layers": 2} if shallow else {}
    )


@dataclass
class Comparison:
    """References by model and batch, and the largest difference seen in each cell of the table."""

    pool: RankPool
    end_of_text: int | None = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    references: dict[tuple[Any, ...], Curve] = field(default_factory=dict)
    worst: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def reference(self, model: ModelConfig, global_batch_size: int) -> Curve:
        key = (model, global_batch_size)
        if key not in self.references:
            sizes = {"global_batch_size": global_batch_size}
            case = Case(model, 1, {"zero_stage": 0}, sizes, self.optimizer, self.end_of_text)
            (self.references[key],) = self.pool.run(train, 1, case, STEPS)
        return self.references[key]

    def check(self, model: ModelConfig, spread: str, parallel: dict[str, Any], **train_fields: Any) -> list[float]:
        """Assert that the layout's curve is the reference's; the largest relative differences of loss and norm."""
        place = SPREADS[spread]
        sizes = {"global_batch_size": place.global_batch_size, "micro_batch_size": place.micro_batch_size}
        spread_out, fields = {**place.parallel, **parallel}, {**sizes, **train_fields}
        case = Case(model, place.world_size, spread_out, fields, self.optimizer, self.end_of_text)
        curves = self.pool.run(train, place.world_size, case, STEPS)
        assert all(curve == curves[0] for curve in curves), "the report must be the same on every rank"
        differences = relative_differences(curves[0], self.reference(model, place.global_batch_size))
        assert max(differences) <= BOUND, f"loss, gradient norm: {differences}\n{curves[0]}"
        return differences

    def render(self) -> str:
        """The table: one row a layout, one column a ZeRO stage."""
        head = "| layout | ranks | " + " | ".join(f"ZeRO {stage}" for stage in ZERO_STAGES) + " |"
        lines = [head, "|---" * (2 + len(ZERO_STAGES)) + "|"]
        for name, place in SPREADS.items():
            cells = [self.worst.get((name, stage)) for stage in ZERO_STAGES]
            shown = [f"{cell[0]:.1e} / {cell[1]:.1e}" if cell else "" for cell in cells]
            lines.append(f"| {name} | {place.world_size} | {' | '.join(shown)} |")
        return "\n".join(lines)


def relative_differences(curve: Curve, reference: Curve) -> list[float]:
    """The largest over all steps, of the losses and of the gradient norms."""
    pairs = list(zip(curve, reference, strict=True))
    return [max(abs(a[i] - b[i]) / abs(b[i]) for a, b in pairs) for i in (0, 1)]


@pytest.fixture(scope="module")
def comparison(pool: RankPool) -> Iterator[Comparison]:
    compared = Comparison(pool)
    yield compared
    if compared.worst:
        print(f"\nLargest relative difference from one rank over {STEPS} steps, loss / gradient norm:\n")
        print(compared.render())


@pytest.mark.parametrize("model_name", MODELS)
def test_one_rank_equals_a_plain_torch_loop(comparison: Comparison, model_name: str) -> None:
    model = MODELS[model_name]
    (plain,) = comparison.pool.run(train_plainly, 1, Case(model, 1, {"zero_stage": 0}), STEPS)
    curve = comparison.reference(model, 8)
    assert curve[-1][0] < curve[0][0] - 0.5, "it learns"
    assert min(norm for _, norm in curve) > 1.0, "clipping at norm 1 is active in every step"
    assert max(relative_differences(curve, plain)) <= BOUND


def axes(spread: str, zero_stage: int, model_name: str) -> dict[str, Any]:
    """What of a row meets in the code: the kinds of parallelism, without how many ranks each has."""
    parallel = SPREADS[spread].parallel
    return {
        "tensor": ("tensor" in parallel) + ("sequence" in parallel),
        "pipeline": ("pipeline" in parallel) + ("virtual_pipeline" in parallel),
        "data": Case(CLASSIC, SPREADS[spread].world_size, parallel).layout.data > 1,
        "ZeRO": zero_stage,
        "model": model_name,
    }


def test_the_subset_leaves_out_no_pair() -> None:
    rows = [axes(spread, zero, _NAMES[place]) for spread, chosen in COVERING.items() for zero, place in chosen.items()]
    every = [axes(*row) for row in itertools.product(SPREADS, ZERO_STAGES, MODELS)]
    assert list(COVERING) == list(SPREADS) and len(rows) == 31
    for one, other in itertools.combinations(every[0], 2):
        missing = {(row[one], row[other]) for row in every} - {(row[one], row[other]) for row in rows}
        assert not missing, f"{one} x {other}"
    assert {row["ZeRO"] for row in rows if row["tensor"] == 2 and row["pipeline"]} == set(ZERO_STAGES)


@pytest.mark.parametrize(("spread", "zero_stage", "model_name"), matrix())
def test_layout_equals_one_rank(comparison: Comparison, spread: str, zero_stage: int, model_name: str) -> None:
    differences = comparison.check(model_for(model_name, spread), spread, {"zero_stage": zero_stage})
    worst = comparison.worst.setdefault((spread, zero_stage), [0.0, 0.0])
    worst[:] = map(max, worst, differences)


@pytest.mark.parametrize("zero_stage", (1, 2, 3))
@pytest.mark.parametrize("spread", ("DP2", "PP2"))
def test_optimizer_on_the_cpu_equals_one_rank(comparison: Comparison, spread: str, zero_stage: int) -> None:
    model = model_for("classic" if zero_stage % 2 else "modern", spread)
    comparison.check(model, spread, {"zero_stage": zero_stage, "offload_optimizer": True})


@pytest.mark.parametrize("recompute", ("selective", "full"))
@pytest.mark.parametrize(("spread", "zero_stage"), (("TP2+SP", 1), ("PP2", 1), ("DP2", 3)))
def test_recomputed_activations_equal_one_rank(
    comparison: Comparison, spread: str, zero_stage: int, recompute: str
) -> None:
    model = model_for("classic" if recompute == "full" else "modern", spread)
    comparison.check(model, spread, {"zero_stage": zero_stage}, recompute=recompute)


def train_plainly(world: World, case: Case, steps: int) -> Curve:
    """The same network under torch's own clipping and AdamW: no DeepSpeed, no flat buffers."""
    with engine_of(case, world) as engine:
        named = [(local.name, local.parameter) for local in engine.network.parameters]
        groups = [
            {"params": [p for name, p in named if decayed(name) is decay], "weight_decay": 0.1 * decay}
            for decay in (True, False)
        ]
        adamw = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
        for hook in getattr(engine.zero.engine.optimizer, "_grad_acc_hooks", []):
            hook.remove()
        curve = []
        for step in range(1, steps + 1):
            adamw.zero_grad()
            total = 0.0
            for loss in engine.network.losses(batch_of(case, world, step)):
                loss.backward()
                total += loss.item()
            norm = torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
            adamw.step()
            curve.append((total, norm.item()))
        dist.barrier()
    return curve
