"""Dropout under tensor and sequence parallelism: equal masks where activations are equal, others where they differ.

Masks are seen through the random state that each dropout starts from: equal states draw equal masks.
"""

import hashlib
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptdist.checkpoint.logical import Box
from gptdist.engine.partition import StateSource
from gptdist.world import World
from tests.dist.cases import MODELS, Case, RandomWeights, assemble, batch_of, engine_of, held, train_steps
from tests.dist.ranks import RankPool

DROPOUT = {"dropout": 0.2, "attention_dropout": 0.2}
MODEL = MODELS["classic"].model_copy(update={"num_layers": 2, **DROPOUT})
TENSOR = {"tensor": 2, "zero_stage": 1}
SEQUENCE = {**TENSOR, "sequence": True}


@contextmanager
def dropouts_seen() -> Iterator[dict[str, list[Any]]]:
    """Record the random state at every residual and attention dropout, and the kept positions of residual ones."""
    seen: dict[str, list[Any]] = {"residual": [], "attention": [], "kept": []}
    drop, attend = F.dropout, F.scaled_dot_product_attention

    def state() -> str:
        return hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()

    def recording_drop(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen["residual"].append(state())
        dropped = drop(hidden, *args, **kwargs)
        seen["kept"].append((dropped != 0).flatten().tolist())
        return dropped

    def recording_attend(*args: Any, **kwargs: Any) -> Tensor:
        seen["attention"].append(state())
        return attend(*args, **kwargs)

    with (
        mock.patch.object(F, "dropout", recording_drop),
        mock.patch.object(F, "scaled_dot_product_attention", recording_attend),
    ):
        yield seen


def drop_for_ten_steps(world: World, case: Case) -> dict[str, Any]:
    """The random states of a step's dropouts, then the weights that tensor ranks hold in common after ten steps."""
    with engine_of(case, world) as engine:
        with dropouts_seen() as seen:
            train_steps(engine, case, world, range(1, 2))
        train_steps(engine, case, world, range(2, 11))
        common = [
            local.parameter.detach().flatten().tolist()
            for local in engine.network.parameters
            if len(local.pieces) == 1 and local.pieces[0].box.shape == local.pieces[0].shape
        ]
        return {**seen, "common": common}


def test_tensor_ranks_drop_the_same_of_what_they_share(pool: RankPool) -> None:
    one, other = pool.run(drop_for_ten_steps, 2, Case(MODEL, 2, TENSOR, {"micro_batch_size": 4}))
    assert len(one["residual"]) == 2 * (1 + 2 * MODEL.num_layers), "the embedding and both branches of every layer"
    assert one["residual"] == other["residual"] and one["kept"] == other["kept"]
    assert len(set(one["residual"])) == len(one["residual"]), "each dropout draws anew"
    assert len(one["attention"]) == 2 * MODEL.num_layers
    assert not set(one["attention"]) & set(other["attention"]), "each rank drops attention of its own heads"
    assert len(one["common"]) >= 10 and one["common"] == other["common"], "bitwise, after ten steps"


def test_sequence_parallel_ranks_drop_differently(pool: RankPool) -> None:
    one, other = pool.run(drop_for_ten_steps, 2, Case(MODEL, 2, SEQUENCE, {"micro_batch_size": 4}))
    for kind in ("residual", "attention"):
        assert len(set(one[kind])) == len(one[kind]) > 0
        assert not set(one[kind]) & set(other[kind]), kind
    kept = [torch.tensor(list(itertools.chain.from_iterable(seen["kept"]))) for seen in (one, other)]
    rate = 1 - MODEL.dropout
    agree = (kept[0] == kept[1]).double().mean().item()
    count = kept[0].numel()
    assert all(abs(mask.double().mean().item() - rate) < 5 * math.sqrt(rate * (1 - rate) / count) for mask in kept)
    expected = rate**2 + (1 - rate) ** 2  # of two independent masks
    assert abs(agree - expected) < 5 * math.sqrt(expected * (1 - expected) / count)
    assert one["common"] == other["common"]


class GivenWeights:
    """A StateSource of known weights and zero moments."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights

    def read(self, name: str, box: Box) -> Tensor:
        kind, logical = name.split("/", 1)
        return self._weights[logical][box.slices()] * float(kind == "weight")


def overfit(world: World, case: Case) -> list[Any]:
    """Weights that know one batch by heart, so that dropping anything of them is felt."""
    batch = batch_of(case, world, step=1)
    with engine_of(case, world) as engine:
        for step in range(1, 41):
            engine.train_step(batch, 3e-3, step)
        return held(engine)


def keyed_losses(
    world: World, case: Case, source: StateSource, keys: list[tuple[int, int]], copies: int = 1
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of the same batch and weights under each (seed, step); each of `copies` draws its own."""
    batch = batch_of(case, world, step=1).repeat(1, copies, 1)
    answers = []
    with engine_of(case, world) as engine:
        engine.read(source, {"optimizer_steps": 0, "loss_scaler": {}})
        engine.refresh()
        for seed, step in keys:
            engine.seed = seed
            report = engine.train_step(batch, 0.0, step)
            answers.append((report.loss, report.grad_norm))
    return answers


@pytest.mark.parametrize("recompute", ("none", "selective", "full"))
@pytest.mark.parametrize(
    "parallel",
    (TENSOR, SEQUENCE, {"pipeline": 2, "zero_stage": 1}, {"zero_stage": 3}),
    ids=("TP2", "TP2+SP", "PP2", "ZeRO 3"),
)
def test_masks_are_keyed_by_seed_and_step(pool: RankPool, parallel: dict[str, Any], recompute: str) -> None:
    """Equal keys give the same bits; and recomputing draws the masks that the first pass drew."""
    case = Case(MODEL, 2, parallel, {"micro_batch_size": 2, "recompute": recompute})
    random, keys = RandomWeights(MODEL), [(1, 1), (1, 1), (1, 2), (2, 1)]
    first, again, step, seed = pool.run(keyed_losses, 2, case, random, keys)[0]
    assert first == again
    assert len({first, step, seed}) == 3
    if recompute != "none":
        kept = Case(MODEL, 2, parallel, {"micro_batch_size": 2})
        (plain,) = pool.run(keyed_losses, 2, kept, random, keys[:1])[0]
        assert first == pytest.approx(plain, rel=1e-6)


def test_the_mean_loss_is_the_same_under_every_layout(pool: RankPool) -> None:
    """Masks differ between layouts; what they do on average must not."""
    model = MODEL.model_copy(update={"hidden_size": 32, "sequence_length": 16})
    undropped = model.model_copy(update={"dropout": 0.0, "attention_dropout": 0.0})
    sizes = {"global_batch_size": 2, "micro_batch_size": 2}  # each collective costs an idle machine milliseconds
    source = GivenWeights(assemble(pool.run(overfit, 1, Case(undropped, 1, {}, sizes))))
    ((without, _),) = pool.run(keyed_losses, 1, Case(undropped, 1, {}, sizes), source, [(7, 1)])[0]
    copies, keys = 10, [(7, step) for step in range(1, 21)]
    layouts = {"one rank": (1, {}), "TP2": (2, TENSOR), "TP2+SP": (2, SEQUENCE), "PP2": (2, {"pipeline": 2})}
    means, errors = {}, {}
    for name, (world_size, parallel) in layouts.items():
        case = Case(model, world_size, parallel, sizes)
        losses = torch.tensor([loss for loss, _ in pool.run(keyed_losses, world_size, case, source, keys, copies)[0]])
        means[name], errors[name] = losses.mean().item(), losses.std().item() / math.sqrt(len(keys))
    shown = {name: f"{means[name]:.4f} +- {errors[name]:.4f}" for name in means}
    print(f"mean loss of {copies * len(keys)} draws: {shown}; without dropout {without:.4f}")
    for name in ("TP2", "TP2+SP", "PP2"):
        bound = 4 * math.hypot(errors[name], errors["one rank"])
        assert abs(means[name] - means["one rank"]) < bound, name
        assert means[name] - without > 2 * bound, "the test would see dropout missing"
