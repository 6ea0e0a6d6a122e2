"""Documents kept apart in a window: each computes what it computes alone, under every layout, in training and after.

Lines of text are the documents, so that every window has a few. Bounds are those of test_parity.py; what
transformers says of it is in test_oracle.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from data_tools.build import build_corpus
from gptdist.comms import Comms
from gptdist.model.sampling import Sampling
from gptdist.train.sample import generate
from gptdist.world import World
from tests.dist.cases import MODELS, NEWLINE, Case, RandomWeights, engine_of, is_full, text, train
from tests.dist.commands import Commands, metrics
from tests.dist.ranks import RankPool
from tests.dist.test_parity import Comparison, matrix, model_for, relative_differences

GREEDY = Sampling(temperature=0.0)
ROUNDING = 1e-5  # of a logit, fp32: matrices of other heights are added up in another order

# (spread, ZeRO stage, model)
SUBSET = (
    ("TP2", 1, "classic"),
    ("TP2+SP", 1, "modern"),
    ("PP2", 2, "classic"),
    ("PP2xVPP2", 1, "modern"),
    ("DP2", 0, "classic"),
    ("DP2", 1, "modern"),
    ("DP2", 2, "classic"),
    ("DP2", 3, "modern"),
    ("TP2+SP x PP2", 1, "classic"),
)


def logits_of(world: World, case: Case, batches: list[Tensor]) -> list[Any]:
    """Logits of each batch, of random weights."""
    with engine_of(case, world) as engine:
        engine.read(RandomWeights(case.model), {"optimizer_steps": 0, "loss_scaler": {}})
        engine.refresh()
        return [engine.logits(tokens).numpy() for tokens in batches]


def generate_in(world: World, case: Case, prompts: list[list[int]]) -> list[list[int]]:
    """What follows each prompt, the likeliest."""
    with engine_of(case, world) as engine:
        engine.read(RandomWeights(case.model), {"optimizer_steps": 0, "loss_scaler": {}})
        engine.refresh()
        return [generate(engine, Comms(world, dist.group.WORLD), prompt, 8, GREEDY) for prompt in prompts]


@pytest.mark.parametrize("model_name", ("classic", "modern"))
def test_a_document_in_a_window_computes_what_it_computes_alone(pool: RankPool, model_name: str) -> None:
    """Whether positions are learned or rotary; in a batch with another window that holds but one document."""
    window = torch.cat([window_of(9, 1), window_of(1, 2), window_of(13, 3), window_of(9, 4)[:, :-1]], dim=1)
    unbroken = torch.full_like(window, ord("x"))
    case = Case(MODELS[model_name], end_of_text=NEWLINE)
    ((packed, *alone),) = pool.run(
        logits_of, 1, case, [torch.cat([window, unbroken]), *window.split([9, 1, 13, 8], 1), unbroken]
    )
    lone = torch.cat([torch.from_numpy(logits[0]) for logits in alone[:-1]])
    together = torch.from_numpy(packed)
    assert lone.std() > 0.1
    assert (together[0] - lone).abs().max() <= ROUNDING
    assert (together[1] - torch.from_numpy(alone[-1][0])).abs().max() <= ROUNDING


@pytest.mark.parametrize("end_of_text", (NEWLINE, None))
def test_a_document_feels_nothing_of_the_one_before(pool: RankPool, end_of_text: int | None) -> None:
    """Not one bit; without masking it does."""
    window = torch.cat([window_of(12, 1), window_of(20, 2)], dim=1)
    changed = window.clone()
    changed[0, 4] += 1
    for model_name in ("classic", "modern"):
        case = Case(MODELS[model_name], end_of_text=end_of_text)
        ((one, other),) = pool.run(logits_of, 1, case, [window, changed])
        assert (one[0, 4:12] != other[0, 4:12]).any(axis=-1).all(), "the change is felt in its own document"
        felt = one[0, 12:] != other[0, 12:]
        assert not felt.any() if end_of_text is not None else felt.any(axis=-1).all()


def test_what_a_prompt_ended_is_forgotten(pool: RankPool) -> None:
    """Also where stages pad prompts to a fixed length, and where the id of the padding ends documents."""
    ended, plain = window_of(6, 1)[0].tolist(), window_of(9, 2)[0, :-1].tolist()
    prompts = [ended + plain, plain]
    ((with_ended, without),) = pool.run(generate_in, 1, Case(MODELS["classic"], end_of_text=NEWLINE), prompts)
    assert with_ended == without and len(without) == 8
    zeros = [[0 if token == NEWLINE else token for token in prompt] for prompt in prompts]
    case = Case(MODELS["modern"], 2, {"pipeline": 2}, end_of_text=0)
    for with_ended, without in pool.run(generate_in, 2, case, zeros):
        assert with_ended == without and len(without) == 8


@pytest.fixture(scope="module")
def comparison(pool: RankPool) -> Iterator[Comparison]:
    # Of this text some gradients are as small as AdamW's usual 1e-8, next to which rounding decides how far it goes:
    # every first gradient norm agrees to 1e-7, later ones to 5e-5 with 1e-8 and to 3e-6 with this.
    yield Comparison(pool, NEWLINE, {"epsilon": 1e-6})


def test_lines_are_documents_of_the_text_trained_on() -> None:
    inner = (text(33)[:80, :31] == NEWLINE).sum(1)
    assert inner.double().mean() > 0.5 and inner.max() >= 3 and inner.min() == 0


@pytest.mark.parametrize(("spread", "zero_stage", "model_name"), matrix() if is_full() else SUBSET)
def test_layout_equals_one_rank(comparison: Comparison, spread: str, zero_stage: int, model_name: str) -> None:
    comparison.check(model_for(model_name, spread), spread, {"zero_stage": zero_stage})


@pytest.mark.parametrize(
    ("world_size", "parallel", "model_name", "precision"),
    (
        (1, {}, "modern", "bf16"),
        (2, {"tensor": 2, "sequence": True}, "classic", "fp32"),
        (2, {"pipeline": 2}, "modern", "fp32"),
    ),
    ids=("one rank", "TP2+SP", "PP2"),
)
def test_recomputed_activations_are_the_same_bits(
    pool: RankPool, world_size: int, parallel: dict[str, Any], model_name: str, precision: str
) -> None:
    curves = []
    for recompute in ("none", "selective", "full"):
        fields = {"recompute": recompute, "micro_batch_size": 2, "precision": precision}
        case = Case(MODELS[model_name], world_size, parallel, fields, end_of_text=NEWLINE)
        curves.append(pool.run(train, world_size, case, 2)[0])
    assert curves[0] == curves[1] == curves[2]


def test_dropout_goes_on_within_documents(pool: RankPool) -> None:
    """Attention drops, by keys that recomputing repeats; tensor ranks agree on the result."""
    model = MODELS["modern"].model_copy(update={"attention_dropout": 0.3})
    curves = {}
    for recompute in ("none", "full"):
        case = Case(model, 2, {"tensor": 2}, {"recompute": recompute}, end_of_text=NEWLINE)
        one, other = pool.run(train, 2, case, 2)
        assert one == other
        curves[recompute] = one
    (undropped,) = pool.run(train, 1, Case(MODELS["modern"], end_of_text=NEWLINE), 2)
    assert max(relative_differences(curves["none"], curves["full"])) <= 1e-6
    assert abs(curves["none"][0][1] / undropped[0][1] - 1) > 1e-3, "nothing was dropped"


def test_a_run_trained_so_is_evaluated_so(commands: Commands, tmp_path: Path) -> None:
    sources = tmp_path / "lines"
    sources.mkdir()
    for number, row in enumerate(text(20)[:600]):
        (sources / f"{number}.txt").write_bytes(bytes(row.tolist()))
    build_corpus([sources], tmp_path / "short", "bytes", validation_fraction=0.1)
    settings = {"data__corpus": tmp_path / "short", "train__steps": 3, "train__eval_interval": 3}
    losses = {}
    for mask in (True, False):
        run_dir = tmp_path / f"run-{mask}"
        commands.train(run_dir, 1, **settings, data__mask_documents=mask).expect(0)
        losses[mask] = [row["eval/loss"] for row in metrics(run_dir) if "eval/loss" in row]
    assert losses[True][0] != losses[False][0], "the same weights, of step 0"
    evaluated = commands.run("eval", tmp_path / "run-True", "--samples", "8").expect(0).out
    assert f"loss {losses[True][-1]:.4f} nats per token" in evaluated
    assert f"loss {losses[False][-1]:.4f}" not in evaluated


def window_of(length: int, seed: int) -> Tensor:
    """A document of `length` random letters, the last of them its end: [1, length] int64."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(ord("a"), ord("z"), (1, length), generator=generator)
    letters[0, -1] = NEWLINE
    return letters
