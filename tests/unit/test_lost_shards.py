"""Ranks agree on the shards that are lost, and on having the same corpora, before they train on them."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptdist.comms import Comms
from gptdist.config.sections import DataConfig
from gptdist.data.corpora import build_source, open_corpora, open_stores
from gptdist.data.loader import BatchLoader
from gptdist.data.reader import LostShard
from gptdist.errors import CorpusError
from gptdist.train.lost_shards import AgreeingLoader, lose_alike, share_losses
from gptdist.train.progress import check_same_on_all_ranks
from gptdist.world import World
from tests.unit.corpora import write_corpus

LENGTH = 32
SHARDS = 10


class ThreadComms(Comms):
    """Ranks as threads: `gather` meets at a barrier."""

    def __init__(self, global_rank: int, size: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.world = World(global_rank=global_rank, world_size=size)
        self._values, self._barrier = values, barrier

    def gather(self, value: Any) -> list[Any]:
        self._values[self.world.global_rank] = value
        self._barrier.wait()
        gathered = list(self._values)
        self._barrier.wait()
        return gathered

    def broadcast(self, value: Any) -> Any:
        return self.gather(value)[0]


def as_ranks(size: int, work: Callable[[Comms], Any]) -> list[Any]:
    """`work(comms)` on so many ranks; what each returned or raised."""
    values: list[Any] = [None] * size
    results: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=20)

    def run(global_rank: int) -> None:
        try:
            results[global_rank] = work(ThreadComms(global_rank, size, values, barrier))
        except Exception as error:
            results[global_rank] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def lost(*numbers: int, corpus: str = "c") -> list[LostShard]:
    return [LostShard(corpus, number, f"shard {number} of {corpus}") for number in numbers]


@pytest.mark.parametrize(
    ("of_ranks", "shared"),
    [
        ([lost(), lost()], None),
        ([lost(3), lost(3)], None),
        ([lost(3), lost()], lost(3)),
        ([lost(3), lost(4), lost(3, 4)], lost(3, 4)),
        ([lost(1), lost(1, corpus="d")], lost(1) + lost(1, corpus="d")),
    ],
)
def test_what_one_has_lost_all_have(of_ranks: list[list[LostShard]], shared: list[LostShard] | None) -> None:
    found = as_ranks(len(of_ranks), lambda comms: share_losses(comms, of_ranks[comms.world.global_rank], 2))
    assert found == [shared] * len(of_ranks)


def test_the_cap_is_for_all_ranks_together() -> None:
    of_ranks = [lost(1, 2), lost(2, 3)]
    errors = as_ranks(2, lambda comms: share_losses(comms, of_ranks[comms.world.global_rank], 2))
    assert all(isinstance(error, CorpusError) for error in errors) and str(errors[0]) == str(errors[1])
    assert str(errors[0]).startswith("3 shards cannot be read, taking all ranks together; data.max_unreadable")
    assert all(f"shard {number} of c" in str(errors[0]) for number in (1, 2, 3))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lost") / "c"
    numbers = np.random.default_rng(5)
    documents = [numbers.integers(0, 256, 300, dtype=np.uint8) for _ in range(10 * SHARDS)]
    write_corpus(folder, {"train": documents}, shard_documents=10)
    return folder


def read_steps(corpora: list[Path], steps: int, allowed: int) -> list[Any]:
    """Tokens of each step on ranks of one model, each with a copy of the corpus of its own."""

    def work(comms: Comms) -> Any:
        folder = corpora[comms.world.global_rank]
        data = DataConfig(corpus=str(folder), max_unreadable_shards=allowed)
        (reader,) = open_corpora(data, "train", open_stores(data)).values()
        reader.corpus = "c"  # ranks share its name; only the copies differ
        source = build_source(data, {str(folder): reader}, LENGTH)
        loader = AgreeingLoader(BatchLoader(source, 1, 0, 1), comms, allowed)
        loader.start(0, lambda sample: 8)
        try:
            batches = [loader.next() for _ in range(steps)]
        finally:
            loader.close()
        assert [batch.first_sample for batch in batches] == [8 * step for step in range(steps)]
        return np.stack([batch.tokens.numpy() for batch in batches]), batches[-1].lost

    return as_ranks(len(corpora), work)


def without(corpus: Path, folder: Path, *numbers: int) -> Path:
    folder.mkdir()
    for path in corpus.iterdir():
        if path.name not in [f"train-{number:05d}.tar" for number in numbers]:
            (folder / path.name).symlink_to(path)
    return folder


def test_ranks_of_a_model_are_given_the_same_tokens(corpus: Path, tmp_path: Path) -> None:
    """Each rank lacks another shard: both lack both, and so does a rank alone that lacks both."""
    alone = without(corpus, tmp_path / "alone", 2, 7)
    copies = [without(corpus, tmp_path / f"copy-{number}", number) for number in (2, 7)]
    (expected,) = read_steps([alone], 30, 2)
    for tokens, shards in read_steps(copies, 30, 2):
        assert {shard.number for shard in shards} == {2, 7}
        assert np.array_equal(tokens, expected[0])
    errors = read_steps(copies, 30, 1)
    assert all(isinstance(error, CorpusError) and "2 shards cannot be read" in str(error) for error in errors)


def test_an_error_of_one_rank_is_that_of_all(corpus: Path, tmp_path: Path) -> None:
    errors = read_steps([corpus, without(corpus, tmp_path / "copy", 2, 7)], 30, 1)
    assert all(isinstance(error, CorpusError) for error in errors)
    assert str(errors[0]) == f"[rank 1] {errors[1]}" and "train-00007.tar" in str(errors[1])


def test_reading_on_the_spot_is_repeated_until_all_lack_the_same(corpus: Path, tmp_path: Path) -> None:
    copies = [without(corpus, tmp_path / f"copy-{number}", number) for number in (2, 7)]

    def work(comms: Comms) -> Any:
        data = DataConfig(corpus=str(copies[comms.world.global_rank]), max_unreadable_shards=2)
        (reader,) = open_corpora(data, "train", open_stores(data)).values()
        reader.corpus = "c"
        rows = np.empty((40, LENGTH + 1), dtype=np.int64)
        windows = np.linspace(0, reader.num_windows(LENGTH) - 1, 40).astype(np.int64)
        lose_alike(comms, lambda: void(reader.windows(windows, LENGTH, rows)), [reader], 2)
        return rows

    first, second = as_ranks(2, work)
    assert np.array_equal(first, second)


def test_ranks_with_different_corpora_are_told() -> None:
    def work(comms: Comms) -> None:
        check_same_on_all_ranks({"phases": copies[comms.world.global_rank]}, ["data/a", "data/b"], comms)

    copies = ["old", "old", "new"]
    errors = as_ranks(3, work)
    assert {str(error) for error in errors} == {str(errors[0])}
    assert "on rank 2, data/a, data/b has another index" in str(errors[0])
    copies = ["old"] * 3
    assert as_ranks(3, work) == [None] * 3


def void(_: object) -> None:
    pass
