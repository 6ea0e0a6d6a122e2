"""Any layout loads what any other saved: every byte of every tensor, every counter, and the same ten steps after it.

By default each of the layouts saves once and loads once for each model; with GPTDIST_FULL=1 each loads what every one
saved, and some exchange checkpoints with eight ranks. Losses go on within 2e-5 of the source's own; under the source's
layout they are the same to the last bit.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import permutations
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
    EIGHT_RANKS,
    PLACES,
    STEPS_AFTER,
    STEPS_BEFORE,
    WITH_EIGHT_RANKS,
    Seen,
    assembled,
    case_at,
    load_and_go_on,
    save_and_go_on,
    small,
)

BOUND = 2e-5
# 16 bits round differently in sums of another order; seen: bf16 1.4e-4, fp16 3.2e-6.
BOUND_16 = {"bf16": 1e-3, "fp16": 1e-4}
BOUND_CHANGED = 5e-3  # another precision from here on
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
            load_and_go_on, case.world_size, case, paths, STEPS_AFTER, again, timeout_seconds=200.0 * len(paths)
        )
        return [list(seen) for seen in zip(*by_rank, strict=True)]


@pytest.fixture(scope="module")
def sources(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sources]:
    yield Sources(pool, tmp_path_factory.mktemp("reshard"))


def source_names(target: str, model: str) -> list[str]:
    """Whose checkpoints `target` loads: everyone's, or one other's, each layout's in turn."""
    if target in EIGHT_RANKS:
        return [*WITH_EIGHT_RANKS, *EIGHT_RANKS]
    if is_full():
        return [*PLACES, *(EIGHT_RANKS if target in WITH_EIGHT_RANKS else ())]
    number = PLACE_NAMES.index(target)
    return [PLACE_NAMES[(number + SKEWS[model]) % len(PLACE_NAMES)]]


@pytest.mark.timeout(7200 if is_full() else 300)
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
    ("DP2 ZeRO 2 offload", "DP2 x TP2+SP ZeRO 2"),
)


@pytest.mark.parametrize(("origin", "target"), PAIRS_16)
@pytest.mark.parametrize("precision", ("bf16", "fp16"))
def test_masters_moments_and_loss_scale_in_16_bits(sources: Sources, precision: str, origin: str, target: str) -> None:
    """The fp16 loss scale doubles when its counters say so, which went on where they were."""
    model, fields = small("modern"), {"precision": precision, "loss_scale": 2**6, "loss_scale_window": 4}
    source = sources.of(case_at(ALL_PLACES[origin], model, **fields), before=6)
    (by_rank,) = sources.load(case_at(ALL_PLACES[target], model, **fields), [source])
    check_same_state(source, by_rank)
    if precision == "fp16":
        scales = [report.loss_scale for report in by_rank[0].reports]
        assert scales == [report.loss_scale for report in source.seen.reports]
        assert len(set(scales)) > 2 and scales[0] > 2**6, "it doubled before and after"
    assert not any(report.skipped for report in by_rank[0].reports)
    assert difference(source, by_rank) <= BOUND_16[precision]
    print(f"{precision}: {origin} -> {target}: loss within {difference(source, by_rank):.1e}")


@pytest.mark.parametrize(
    ("origin", "target"), (("DP2 ZeRO 2 offload", "DP3 ZeRO 3"), ("PP2", "DP2 x PP2x2 ZeRO 1 offload"))
)
def test_a_loss_scale_that_is_still_searching(sources: Sources, origin: str, target: str) -> None:
    """Skipped steps are no optimizer steps: both counts are what they were, and so is the scale."""
    before, model = 10, small("classic")
    fields = {"precision": "fp16", "loss_scale": 2**22, "loss_scale_window": 1000}
    source = sources.of(case_at(ALL_PLACES[origin], model, **fields), before)
    (by_rank,) = sources.load(case_at(ALL_PLACES[target], model, **fields), [source])
    check_same_state(source, by_rank)
    state = by_rank[0].state
    assert 0 < state["optimizer_steps"] < before, "some steps were skipped"
    assert state["loss_scaler"]["cur_iter"] == before
    assert state["loss_scaler"]["cur_scale"] == 2.0 ** (22 - before + state["optimizer_steps"])
    found, expected = by_rank[0].reports[0], source.seen.reports[0]
    assert found.loss == pytest.approx(expected.loss, rel=BOUND_16["fp16"])


PRECISIONS = ("fp32", "bf16", "fp16")


@pytest.mark.parametrize(("then", "now"), list(permutations(PRECISIONS, 2)))
def test_another_precision_takes_up_masters_and_moments_exactly(sources: Sources, then: str, now: str) -> None:
    """The loss scale of fp16 begins at train.loss_scale: what another precision was saved with has none."""
    model, origin, target = small("classic"), ALL_PLACES["DP2 ZeRO 2 offload"], ALL_PLACES["PP2"]
    source = sources.of(case_at(origin, model, precision=then, loss_scale=2**10))
    (by_rank,) = sources.load(case_at(target, model, precision=now, loss_scale=2**8), [source])
    check_same_tensors(source, by_rank)
    for seen in by_rank:
        assert seen.state["optimizer_steps"] == source.seen.state["optimizer_steps"] == STEPS_BEFORE
        scaler = seen.state["loss_scaler"]
        assert (scaler["cur_scale"], scaler["cur_iter"]) == (2**8, 0) if now == "fp16" else scaler == {}
    assert not any(report.skipped for report in by_rank[0].reports)
    assert 0 < difference(source, by_rank) <= BOUND_CHANGED


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
