"""Samples of runs: exactly once whatever the ranks and restarts; blends checked; what a resume may change."""

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.build import build_corpus
from gptdist.config.sections import DataConfig, RunConfig
from gptdist.data import loader as loader_module
from gptdist.data.blend import BlendOrder, Phase, turns_of_period
from gptdist.data.corpora import blend_phases, build_order, build_source, open_corpora, open_tokenizer, short_names
from gptdist.data.gaps import Gaps
from gptdist.data.loader import BatchLoader
from gptdist.data.local_order import LocalOrder
from gptdist.data.order import WindowOrder, micro_batches
from gptdist.data.samples import SampleSource
from gptdist.errors import CheckpointError, CorpusError
from gptdist.train.evaluate import blend_values
from gptdist.train.loop import epoch_values
from gptdist.train.progress import check_same_data, data_identity

CONTEXT = 4


class CountingReader:
    """Stands for a reader: a window is its number, and a mark of the corpus."""

    lost = ()

    def __init__(self, mark: int, num_windows: int, wants_ahead: bool = False) -> None:
        self.mark = mark
        self._count = num_windows
        self.wants_ahead = wants_ahead
        self.asked: list[list[tuple[int, int]]] = []

    def num_windows(self, sequence_length: int) -> int:
        return self._count

    def windows(self, indices: np.ndarray, sequence_length: int, out: np.ndarray) -> np.ndarray:
        out[:] = -1
        out[:, 0], out[:, 1] = self.mark, indices
        return out

    def fetch_ahead(self, token_ranges: Sequence[tuple[int, int]]) -> None:
        self.asked.append(list(token_ranges))


def source_of(sizes: Sequence[int], phases: Sequence[Phase], seed: int, local: tuple[int, int] | None) -> SampleSource:
    """Corpora "0", "1", ... of these sizes."""
    readers: Any = {str(mark): CountingReader(mark, size) for mark, size in enumerate(sizes)}
    orders = {
        str(mark): LocalOrder(seed, size, *local) if local else WindowOrder(seed, size)
        for mark, size in enumerate(sizes)
    }
    return SampleSource(readers, orders, BlendOrder(phases), CONTEXT)


@st.composite
def sources(draw: st.DrawFn, largest: int) -> SampleSource:
    """One to four corpora in up to three phases, by either shuffle."""
    sizes = draw(st.lists(st.integers(1, largest), min_size=1, max_size=4))
    names = [str(mark) for mark in range(len(sizes))]
    # The first phase names all corpora, in their order.
    phases = [Phase(0, tuple((name, draw(st.integers(1, 9))) for name in names))]
    for _ in range(draw(st.integers(0, 2))):
        some = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        start = phases[-1].from_sample + draw(st.integers(1, 60))
        phases.append(Phase(start, tuple((name, draw(st.integers(1, 9))) for name in some)))
    local = draw(st.none() | st.tuples(st.integers(1, 20), st.integers(1, 4)))
    return source_of(sizes, phases, draw(st.integers(0, 2**70)), local)


stretches = st.lists(
    # data ranks, micro-batch size, micro-batches, steps: each a restart
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5)),
    min_size=1,
    max_size=6,
)


def rows_of(source: SampleSource, first: int, batch: int, micro: int, data_size: int) -> list[tuple[int, int]]:
    """(corpus, window) of a global batch as its data ranks read it, in the order of samples."""
    parts = []
    for data_rank in range(data_size):
        samples = micro_batches(first, batch, micro, data_rank, data_size)
        tokens = np.empty((*samples.shape, CONTEXT + 1), dtype=np.int64)
        source.read(source.locate(samples.ravel()), tokens.reshape(-1, CONTEXT + 1))
        parts.append(tokens)
    together = np.stack(parts, axis=1).reshape(batch, CONTEXT + 1)
    return [(mark, window) for mark, window in together[:, :2].tolist()]


@given(sources(largest=60), stretches)
@settings(max_examples=50, deadline=None)
def test_exactly_once_over_restarts(source: SampleSource, stretches: list[tuple[int, int, int, int]]) -> None:
    seen: list[tuple[int, int]] = []
    while len(seen) < 150:
        for data_size, micro, turns, steps in stretches:
            for _ in range(steps):
                seen += rows_of(source, len(seen), data_size * micro * turns, micro, data_size)
    for name, corpus in zip(source.blend.corpora, range(len(source.blend.corpora)), strict=True):
        own = [window for mark, window in seen if mark == int(name)]
        windows = source.orders[name].num_windows
        assert own == source.orders[name].windows(0, len(own)).tolist()
        whole = len(own) // windows
        assert np.bincount(own[: whole * windows], minlength=windows).tolist() == [whole] * windows
        assert len(set(own[whole * windows :])) == len(own) - whole * windows
        assert source.blend.counts(len(seen))[corpus] == len(own)


@given(sources(largest=10**12), stretches, st.integers(0, 10**12))
@settings(max_examples=80, deadline=None)
def test_the_same_order_from_any_sample_of_any_size(
    source: SampleSource, stretches: list[tuple[int, int, int, int]], first: int
) -> None:
    for data_size, micro, turns, _ in stretches:
        batch = data_size * micro * turns
        rows = rows_of(source, first, batch, micro, data_size)
        places = [source.place(sample) for sample in range(first, first + batch)]
        assert rows == [(int(place.corpus), place.window) for place in places]
        assert [source.sample(place) for place in places] == list(range(first, first + batch))
        first += batch


@given(
    sources(largest=60),
    stretches.map(lambda legs: legs[:3]),
    st.lists(st.tuples(st.integers(0, 150), st.integers(1, 40)), max_size=4),
)
@settings(max_examples=15, deadline=None)
def test_each_sample_is_trained_on_once_or_passed_over(
    source: SampleSource, stretches: list[tuple[int, int, int, int]], spans: list[tuple[int, int]]
) -> None:
    """Over restarts, ranks, blends, phases and epochs, with gaps anywhere: what the loaders give is the order without
    the gaps, and epochs go by the order."""
    source.gaps = Gaps.of((first, first + length) for first, length in spans)
    left_out = {sample for first, stop in source.gaps.ranges for sample in range(first, stop)}
    seen: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "_SAMPLES_LOCATED_AT_ONCE", 8)
        for data_size, micro, turns, steps in stretches:
            batch = data_size * micro * turns
            loaders = [BatchLoader(source, micro, data_rank, data_size) for data_rank in range(data_size)]
            for loader in loaders:
                loader.start(len(seen), lambda sample, batch=batch: batch)
            for _ in range(steps):
                parts = torch.stack([loader.next().tokens for loader in loaders], dim=1)
                seen += parts.reshape(batch, CONTEXT + 1)[:, :2].tolist()
            for loader in loaders:
                loader.close()
    samples = [sample for sample in range(len(seen) + len(left_out)) if sample not in left_out][: len(seen)]
    places = [source.place(sample) for sample in samples]
    assert seen == [[int(place.corpus), place.window] for place in places]
    counts = source.blend.counts(samples[-1] + 1)
    for number, name in enumerate(source.blend.corpora):
        assert source.epochs(len(seen))[name] == counts[number] / source.orders[name].num_windows


def test_readers_that_fetch_ahead_are_told_their_buffer_and_the_next() -> None:
    readers: Any = {"a": CountingReader(0, 100, True), "b": CountingReader(1, 40), "c": CountingReader(2, 50, True)}
    orders: Any = {name: LocalOrder(7, reader.num_windows(CONTEXT), 10, 2) for name, reader in readers.items()}
    phases = [Phase(0, (("a", 1), ("b", 1))), Phase(100, (("b", 1), ("c", 1)))]
    source = SampleSource(readers, orders, BlendOrder(phases), CONTEXT)
    told = readers["a"].asked
    for sample in range(0, 60, 6):
        source.prepare(sample)
    # 30 samples of a by sample 60: its buffers are of 20 windows, so that two were entered.
    assert len(told) == 2
    for number, asked in enumerate(told):
        own, following = orders["a"].buffer_of(20 * number), orders["a"].buffer_of(20 * (number + 1))
        ranges = own.window_ranges + following.window_ranges
        assert asked == [(start * CONTEXT, stop * CONTEXT + 1) for start, stop in ranges]
    assert readers["b"].asked == readers["c"].asked == []  # the one does not want it, the other's phase is to come
    source.prepare(3)  # a loader that began again
    source.prepare(100)
    assert (len(told), len(readers["c"].asked)) == (3, 1)
    epoch_end = SampleSource({"a": readers["a"]}, {"a": orders["a"]}, BlendOrder([Phase(0, (("a", 1),))]), CONTEXT)
    epoch_end.prepare(99)
    assert len(told[-1]) == 4  # the last buffer of an epoch and the first of the next
    shuffled: Any = SampleSource(
        {"a": readers["a"]}, {"a": WindowOrder(1, 100)}, BlendOrder([Phase(0, (("a", 1),))]), CONTEXT
    )
    shuffled.prepare(0)
    assert len(told) == 4  # nothing can be said of a global order


def test_epochs_are_counted_by_corpus() -> None:
    source = source_of([10, 40], [Phase(0, (("0", 1), ("1", 1)))], 1, None)
    assert source.epochs(40) == {"0": 2.0, "1": 0.5}
    assert epoch_values(source, 40) == {"data/epoch/0": 2.0, "data/epoch/1": 0.5}
    assert epoch_values(source_of([10], [Phase(0, (("0", 1),))], 1, None), 25) == {"data/epoch": 2.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora a, b and c of different texts, d of another tokenizer; c has no held-out text."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, count in (("a", 300), ("b", 120), ("c", 60), ("d", 20)):
        lines = (json.dumps({"text": f"{name} {number} " + name * 40}) for number in range(count))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        build_corpus(
            [folder / f"{name}.jsonl"],
            folder / name,
            "train:270" if name == "d" else "bytes",
            chunk_tokens=400,
            shard_bytes=8000,
            validation_fraction=0.0 if name == "c" else 0.2,
        )
    return folder


def blend_of(folder: Path, *phases: tuple[int, dict[str, float]], **more: Any) -> DataConfig:
    parts = [
        (start, tuple({"corpus": str(folder / name), "weight": weight} for name, weight in weights.items()))
        for start, weights in phases
    ]
    fields: dict[str, Any] = {"blend": parts[0][1], **more}
    fields["phases"] = [{"from_sample": start, "blend": blend} for start, blend in parts[1:]]
    return DataConfig.model_validate(fields)


@pytest.mark.parametrize("shuffle", [{}, {"shuffle": "local", "shuffle_blocks": 2, "shuffle_block_tokens": 500}])
def test_a_loader_over_a_blend(folder: Path, shuffle: dict[str, Any]) -> None:
    data = blend_of(folder, (0, {"a": 0.5, "b": 0.5}), (24, {"b": 0.25, "c": 0.75}), **shuffle)
    source = build_source(data, open_corpora(data, "train"), 32)
    readers = open_corpora(data, "train")
    loaders = [BatchLoader(source, 2, rank, 2) for rank in range(2)]
    for loader in loaders:
        loader.start(12, lambda consumed: 12)
    for first in (12, 24, 36):
        tokens = torch.stack([loader.next().tokens for loader in loaders], dim=1).reshape(12, 33).numpy()
        for sample, row in enumerate(tokens, first):
            place = source.place(sample)
            assert np.array_equal(row, readers[place.corpus].window(place.window, 32))
            assert Path(place.corpus).name in ("ab" if sample < 24 else "bc")
    for loader in loaders:
        loader.close()


def test_the_first_batch_at_sample_10_9_is_there_in_no_time(folder: Path) -> None:
    data = blend_of(folder, (0, {"a": 0.5731, "b": 0.2269, "c": 0.2}), (10**6, {"a": 0.3, "b": 0.3, "c": 0.4}))
    seconds = []
    for _ in range(4):
        turns_of_period.cache_clear()
        started = time.perf_counter()
        source = build_source(data, open_corpora(data, "train"), 32)
        rows = np.empty((64, 33), dtype=np.int64)
        source.read(source.locate(np.arange(10**9, 10**9 + 64)), rows)
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.1


def test_blocks_are_of_a_mean_shard_or_as_given(folder: Path) -> None:
    data = DataConfig(corpus=str(folder / "a"), shuffle="local")
    reader = open_corpora(data, "train")[str(folder / "a")]
    shards = len(reader.manifest.split("train").shards)
    order = build_order(data, reader, 32)
    assert isinstance(order, LocalOrder) and shards > 1
    assert order.block_windows == reader.num_tokens // shards // 32
    given = build_order(data.model_copy(update={"shuffle_block_tokens": 320}), reader, 32)
    assert isinstance(given, LocalOrder) and given.block_windows == 10


def test_corpora_that_cannot_be_blended(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"/a and .*/d were built with different tokenizers .*--tokenizer"):
        open_corpora(blend_of(folder, (0, {"a": 1, "d": 1})), "train")
    shutil.copytree(folder / "a", tmp_path / "copy")
    copied = DataConfig.model_validate(
        {"blend": [{"corpus": str(folder / "a"), "weight": 1}, {"corpus": str(tmp_path / "copy"), "weight": 1}]}
    )
    with pytest.raises(CorpusError, match=r"/a and .*copy are the same corpus"):
        open_corpora(copied, "train")
    with pytest.raises(CorpusError, match="nowhere is not a corpus"):
        open_corpora(DataConfig(corpus=str(tmp_path / "nowhere")), "validation")


def test_held_out_splits_of_a_blend(folder: Path) -> None:
    data = blend_of(folder, (0, {"a": 1, "b": 1, "c": 1}))
    train, validation = open_corpora(data, "train"), open_corpora(data, "validation")
    assert [Path(name).name for name in train] == ["a", "b", "c"]
    assert {Path(name).name for name, reader in validation.items() if reader.num_tokens > 32} == {"a", "b"}
    assert open_tokenizer(train).kind == "bytes"


def test_names_in_metrics() -> None:
    assert short_names(("data/web", "s3://x/books/")) == {"data/web": "web", "s3://x/books/": "books"}
    assert short_names(("a/x", "b/x")) == {"a/x": "a/x", "b/x": "b/x"}


def test_values_of_a_blend_are_means_by_its_weights() -> None:
    of = {name: {"eval/loss": loss, "eval/bits_per_byte": 2 * loss} for name, loss in (("a", 1.0), ("b", 4.0))}
    values = blend_values(of, {"a": 0.25, "b": 0.5, "c": 0.25})
    assert values["eval/loss"] == 3.0 and values["eval/bits_per_byte"] == 6.0
    assert values["eval/perplexity"] == pytest.approx(np.exp(3.0))
    assert (values["eval/loss/a"], values["eval/loss/b"]) == (1.0, 4.0)
    assert blend_values(of, {"a": 0.0, "b": 0.0, "c": 1.0}) == {"eval/loss/a": 1.0, "eval/loss/b": 4.0}


def identity(data: DataConfig, **model: Any) -> dict[str, Any]:
    config = RunConfig.model_validate({"data": data.model_dump(), "model": model})
    manifests = {name: reader.manifest for name, reader in open_corpora(data, "train").items()}
    found: dict[str, Any] = json.loads(json.dumps(data_identity(config, manifests)))
    return found


def test_phases_to_come_may_change_and_those_begun_may_not(folder: Path) -> None:
    saved = identity(blend_of(folder, (0, {"a": 0.7, "b": 0.3}), (100, {"a": 1, "b": 1}), (500, {"a": 1})))
    for later in ([], [(300, {"c": 1})], [(300, {"a": 2}), (301, {"b": 1}), (302, {"c": 1})]):
        same = blend_of(folder, (0, {"a": 7, "b": 3}), (100, {"a": 0.5, "b": 0.5}), *later)
        check_same_data(saved, identity(same), 300, "step-1")
    wrong: list[tuple[list[tuple[int, dict[str, float]]], str]] = [
        (
            [(0, {"a": 0.6, "b": 0.4}), (100, {"a": 1, "b": 1})],
            r"other weights .*/a \(weight 7,.* now says .*/a \(weight 3,",
        ),
        ([(0, {"a": 0.7, "b": 0.3})], "other phases .*from sample 100 on; the config now says no such phase"),
        (
            [(0, {"a": 0.7, "b": 0.3}), (100, {"a": 1, "b": 1}), (299, {"c": 1})],
            "no such phase; .* from sample 299",
        ),
        ([(0, {"a": 0.7, "b": 0.3}), (101, {"a": 1, "b": 1})], "from sample 100 on.* from sample 101 on"),
        ([(0, {"a": 0.7, "c": 0.3}), (100, {"a": 1, "b": 1})], "another corpus .*/b .*now says.*/c "),
    ]
    for phases, message in wrong:
        with pytest.raises(CheckpointError, match=f"(?s)step-1 cannot be resumed.*{message}.*from_sample: 300"):
            check_same_data(saved, identity(blend_of(folder, *phases)), 300, "step-1")


def test_a_corpus_and_a_blend_of_it_alone_are_the_same_data_wherever_it_lies(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "a", tmp_path / "moved")
    saved = identity(DataConfig(corpus=str(folder / "a")))
    check_same_data(saved, identity(DataConfig(corpus=str(tmp_path / "moved"))), 10, "x")
    check_same_data(saved, identity(blend_of(folder, (0, {"a": 5}), (10, {"a": 1, "b": 1}))), 10, "x")
    check_same_data(saved, identity(DataConfig(corpus=str(folder / "b"))), 0, "x")  # nothing was consumed yet
    with pytest.raises(CheckpointError, match=r"/b \(weight 1"):
        check_same_data(saved, identity(DataConfig(corpus=str(folder / "b"))), 10, "x")


def test_the_shuffle_is_part_of_what_a_sample_means(folder: Path) -> None:
    corpus = str(folder / "a")
    local = DataConfig(corpus=corpus, shuffle="local", shuffle_block_tokens=500)
    saved = identity(local)
    check_same_data(saved, identity(local), 5, "x")
    for data, model, message in (
        (DataConfig(corpus=corpus), {}, "data.shuffle was another .'local' then, 'global' now"),
        (local.model_copy(update={"shuffle_blocks": 3}), {}, "data.shuffle_blocks was another .16 then, 3 now"),
        (local.model_copy(update={"shuffle_block_tokens": None}), {}, "data.shuffle_block_tokens was another"),
        (local.model_copy(update={"seed": 9}), {}, "data.seed was another"),
        (local, {"sequence_length": 512}, "model.sequence_length was another"),
    ):
        with pytest.raises(CheckpointError, match=message):
            check_same_data(saved, identity(data, **model), 5, "x")
    same = local.model_copy(update={"mask_documents": True, "prefetch": 1, "verify": False})
    check_same_data(saved, identity(same), 5, "x")


def test_phases_have_whole_weights(folder: Path) -> None:
    phases = blend_phases(blend_of(folder, (0, {"a": 0.7, "b": 0.3}), (9, {"c": 2})))
    assert [(phase.from_sample, [weight for _, weight in phase.weights]) for phase in phases] == [(0, [7, 3]), (9, [1])]
