"""Any layout loads what any other saved: every byte of every tensor, every counter, and the same ten steps after it.

By default each of the layouts saves once and loads once for each model; with GPTDIST_FULL=1 every one loads every
other's, eight ranks included. Losses go on within 2e-5 of the source's own; under the source's layout they are the same
to the last bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptdist.checkpoint.manifest import load_manifest
from gptdist.config.sections import ModelConfig
from tests.dist.cases import Case, is_full
from tests.dist.ranks import RankPool
from tests.dist.reshard import (
    ALL_PLACES,
    FIRST_SCALE,
    PLACES,
    STEPS_AFTER,
    STEPS_BEFORE,
    Seen,
    assembled,
    case_at,
    load_and_go_on,
    save_and_go_on,
    small,
)

BOUND = 2e-5
# 16 bits round differently in sums of another order; seen: bf16 5e-4, fp16 6e-5.
BOUND_16 = {"bf16": 5e-3, "fp16": 1e-3}
MODEL_NAMES = ("classic", "modern")
PLACE_NAMES = tuple(ALL_PLACES if is_full() else PLACES)
SKEWS = {"classic": 5, "modern": 7}  # which layout saves for which, where not all do: coprime to their number


@dataclass(frozen=True)
class Source:
    """A checkpoint, what its ranks held when they wrote it, and how they went on."""

    path: Path
    whole: dict[str, Tensor]
    seen: Seen


@dataclass
class Sources:
    """Checkpoints by case, each made once."""

    pool: RankPool
    folder: Path
    made: dict[str, Source] = field(default_factory=dict)

    def of(self, case: Case, before: int = STEPS_BEFORE) -> Source:
        key = repr((case, before))
        if key not in self.made:
            folder = self.folder / f"source-{len(self.made)}"
            by_rank = self.pool.run(save_and_go_on, case.world_size, case, folder, before, STEPS_AFTER)
            check_same_reports(by_rank)
            (path,) = folder.glob("step-*")
            self.made[key] = Source(path, assembled([seen.held for seen in by_rank]), by_rank[0])
        return self.made[key]

    def load(self, case: Case, sources: list[Source], again: Path | None = None) -> list[list[Seen]]:
        """What each rank of the target saw, for each source in turn."""
        paths = [source.path for source in sources]
        by_rank = self.pool.run(
            load_and_go_on, case.world_size, case, paths, STEPS_AFTER, again, timeout_seconds=1200.0
        )
        return [list(seen) for seen in zip(*by_rank, strict=True)]


@pytest.fixture(scope="module")
def sources(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sources]:
    yield Sources(pool, tmp_path_factory.mktemp("reshard"))


def source_names(target: str, model: str) -> list[str]:
    """Whose checkpoints `target` loads: everyone's, or one other's, each layout's in turn."""
    if is_full():
        return list(PLACE_NAMES)
    number = PLACE_NAMES.index(target)
    return [PLACE_NAMES[(number + SKEWS[model]) % len(PLACE_NAMES)]]


@pytest.mark.timeout(1500)
@pytest.mark.parametrize("target", PLACE_NAMES)
@pytest.mark.parametrize("model_name", MODEL_NAMES)
def test_every_layout_loads_every_other(sources: Sources, model_name: str, target: str, tmp_path: Path) -> None:
    model = small(model_name)
    names = source_names(target, model_name)
    made = [sources.of(case_at(ALL_PLACES[name], model)) for name in names]
    case = case_at(ALL_PLACES[target], model)
    again = None if is_full() else tmp_path
    worst = 0.0
    for name, source, by_rank in zip(names, made, sources.load(case, made, again), strict=True):
        check_same_reports(by_rank)
        check_same_state(source, by_rank)
        exact = name == target
        worst = max(worst, difference(source, by_rank))
        assert worst <= (0.0 if exact and len(names) == 1 else BOUND), f"{model_name}: {name} -> {target}"
        if exact:
            assert by_rank[0].reports == source.seen.reports, f"{model_name}: {name} -> {target}: not bit for bit"
    if again is not None:
        assert digests(next(again.glob("step-*"))) == digests(made[0].path)
    print(f"{model_name}: {', '.join(names) if len(names) < 3 else len(names)} -> {target}: loss within {worst:.1e}")


# -- 16 bits -----------------------------------------------------------------------------------------------------------

PAIRS_16 = (
    ("DP3 ZeRO 3", "PP2"),
    ("TP2+SP x PP2 ZeRO 2", "DP3 ZeRO 1"),
    ("1 rank", "DP4 ZeRO 2"),
    ("DP2 x PP2x2 ZeRO 1 offload", "DP4 ZeRO 3 offload"),
    ("DP2 ZeRO 2 offload", "TP4+SP"),
)


@pytest.mark.parametrize(("origin", "target"), PAIRS_16)
@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_masters_moments_and_loss_scale_in_16_bits(sources: Sources, precision: str, origin: str, target: str) -> None:
    model = small("modern")
    fields: dict[str, Any] = {"precision": precision, "loss_scale": 2**40, "loss_scale_window": 4}
    source = sources.of(case_at(ALL_PLACES[origin], model, **fields), before=6)
    (by_rank,) = sources.load(case_at(ALL_PLACES[target], model, **fields), [source])
    check_same_state(source, by_rank)
    state = by_rank[0].state
    if precision == "fp16":
        skipped = 6 - state["optimizer_steps"]
        assert skipped > 0 and state["loss_scaler"]["cur_scale"] < 2**40, "the scale was too large, and has moved"
        assert state["loss_scaler"]["cur_iter"] == 6
        # The scale follows from its counters, which went on where they were.
        scales = [report.loss_scale for report in by_rank[0].reports]
        assert scales == [report.loss_scale for report in source.seen.reports]
    assert difference(source, by_rank) <= BOUND_16[precision]
    print(f"{precision}: {origin} -> {target}: loss within {difference(source, by_rank):.1e}")


PRECISIONS = ("fp32", "bf16", "fp16")


@pytest.mark.parametrize("now", PRECISIONS)
@pytest.mark.parametrize("then", PRECISIONS)
def test_another_precision_takes_up_masters_and_moments_exactly(sources: Sources, then: str, now: str) -> None:
    if then == now:
        pytest.skip("that is no change")
    model, origin, target = small("classic"), ALL_PLACES["DP2 ZeRO 2 offload"], ALL_PLACES["PP2"]
    fields = {"loss_scale": FIRST_SCALE, "loss_scale_window": 100}
    source = sources.of(case_at(origin, model, precision=then, **fields))
    (by_rank,) = sources.load(case_at(target, model, precision=now, **{**fields, "loss_scale": 2**10}), [source])
    check_same_tensors(source, by_rank)
    for seen in by_rank:
        assert seen.state["optimizer_steps"] == source.seen.state["optimizer_steps"]
        if now == "fp16":
            assert seen.state["loss_scaler"] == {
                "cur_scale": 2**10,
                "cur_iter": 0,
                "last_overflow_iter": -1,
                "cur_hysteresis": 1,
            }
        else:
            assert seen.state["loss_scaler"] == {}
    assert not any(report.skipped for report in by_rank[0].reports)
    assert difference(source, by_rank) <= BOUND_16["bf16"]


# -- dropout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ("1 rank", "DP3 ZeRO 3", "DP2 x TP2+SP ZeRO 2", "DP2 x PP2x2 ZeRO 1 offload"))
def test_dropout_goes_on_where_it_was(sources: Sources, place: str) -> None:
    """Masks are keyed by step, so the restart draws what the run that never stopped drew: bit for bit."""
    model = small("classic").model_copy(update={"dropout": 0.2, "attention_dropout": 0.2})
    case = case_at(ALL_PLACES[place], model)
    source = sources.of(case)
    (by_rank,) = sources.load(case, [source])
    check_same_state(source, by_rank)
    assert by_rank[0].reports == source.seen.reports
    undropped = sources.of(case_at(ALL_PLACES[place], small("classic")))
    assert by_rank[0].reports[0].loss != undropped.seen.reports[0].loss


# -- what is compared --------------------------------------------------------------------------------------------------


def check_same_state(source: Source, by_rank: list[Seen]) -> None:
    """Everything on every rank."""
    check_same_tensors(source, by_rank)
    for seen in by_rank:
        assert seen.state == source.seen.state


def check_same_tensors(source: Source, by_rank: list[Seen]) -> None:
    """Weights and both moments, bit for bit; name what differs."""
    whole = assembled([seen.held for seen in by_rank])
    assert sorted(whole) == sorted(source.whole)
    assert {name.partition("/")[0] for name in whole} == {"weight", "exp_avg", "exp_avg_sq"}
    different = [name for name in whole if not torch.equal(whole[name], source.whole[name])]
    assert not different, f"{len(different)} of {len(whole)} tensors differ: {different[:5]}"


def check_same_reports(by_rank: list[Seen]) -> None:
    assert all(seen.reports == by_rank[0].reports for seen in by_rank), "the report must be the same on every rank"


def difference(source: Source, by_rank: list[Seen]) -> float:
    """The largest relative difference between the losses of the two that went on."""
    pairs = zip(by_rank[0].reports, source.seen.reports, strict=True)
    return max(abs(found.loss - expected.loss) / abs(expected.loss) for found, expected in pairs)


def digests(path: Path) -> dict[str, tuple[Any, ...]]:
    """The layout-invariant digest of each logical tensor, which the manifest holds."""
    manifest = load_manifest(path)
    return {name: (entry.shape, entry.dtype, entry.digest) for name, entry in manifest.tensors.items()}


def test_the_comparison_sees_a_single_bit(sources: Sources) -> None:
    """What the tests above compare would tell another run's state, and one flipped bit, from the saved."""
    source = sources.of(case_at(ALL_PLACES["1 rank"], small("classic")))
    (by_rank,) = sources.load(case_at(ALL_PLACES["DP2 ZeRO 0"], small("classic")), [source])
    name, shape, box, numbers, owned = by_rank[1].held[0]
    by_rank[1].held[0] = (name, shape, box, bytes([numbers[0] ^ 1]) + numbers[1:], owned)
    with pytest.raises(AssertionError, match=f"replicas of {name} differ"):
        check_same_tensors(source, by_rank)
    other = sources.of(case_at(ALL_PLACES["1 rank"], small("classic"), seed=7))
    with pytest.raises(AssertionError, match="tensors differ"):
        check_same_tensors(source, [other.seen])


def test_places_are_as_many_as_are_claimed() -> None:
    assert len(PLACES) >= 12 and len(set(SKEWS.values())) == len(MODEL_NAMES)
    assert {place.world_size for place in PLACES.values()} == {1, 2, 3, 4}
    for model in MODEL_NAMES:
        if not is_full():
            loaded = [source_names(target, model)[0] for target in PLACE_NAMES]
            assert sorted(loaded) == sorted(PLACE_NAMES), "every layout saves once"
            assert all(source != target for source, target in zip(loaded, PLACE_NAMES, strict=True))
    assert isinstance(small("modern"), ModelConfig)
