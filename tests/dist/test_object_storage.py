"""A run that trains from a bucket is the run that trains from the folder, and says what it cannot read.

Through the command, against a server of the S3 protocol on loopback.
"""

import signal
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptdist.data.manifest import Manifest
from tests.dist.bucket import Bucket
from tests.dist.commands import SOURCES, Command, Commands, Ended, checkpoint_names, curve, last_step, metrics
from tests.unit.corpora import write_corpus

pytest.importorskip("moto.server", reason="moto's server is not installed")
pytest.importorskip("s3fs", reason="s3fs is not installed")

DOCUMENT_BYTES = 400
DOCUMENTS = 480
SHARD_DOCUMENTS = 20
SHARDS = DOCUMENTS // SHARD_DOCUMENTS
# Buffers of 40 samples, each of two to four shards; a step takes 12.
SAME = 2e-5  # relative: another number of ranks sums in another order
LOCAL = {"data__shuffle": "local", "data__shuffle_blocks": 2, "data__shuffle_block_tokens": 640}
SHORT = {"train__steps": 8, "checkpoint__interval": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 24 shards of equal size, and one of held-out text."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = np.frombuffer(b"".join((stdlib / name).read_bytes() for name in SOURCES), dtype=np.uint8)
    documents = [text[start : start + DOCUMENT_BYTES] for start in range(0, len(text), DOCUMENT_BYTES)]
    splits = {"train": documents[:DOCUMENTS], "validation": documents[DOCUMENTS : DOCUMENTS + SHARD_DOCUMENTS]}
    corpus = tmp_path_factory.mktemp("many-shards") / "c"
    write_corpus(corpus, splits, shard_documents=SHARD_DOCUMENTS)
    return corpus


@pytest.fixture(scope="module")
def bucket(folder: Path) -> Iterator[Bucket]:
    """A bucket that holds the corpus under `c`."""
    server = Bucket()
    server.put("c", folder)
    yield server
    server.close()


class Runs:
    """Commands that know the bucket; their cache is of this test."""

    def __init__(self, commands: Commands, bucket: Bucket, cache: Path) -> None:
        self._commands = commands
        self._bucket = bucket
        self.cache = cache

    def start(self, run_dir: Path, nproc: int, corpus: object, **settings: Any) -> Command:
        settings = {"data__corpus": corpus, "data__cache_dir": self.cache, **settings}
        words = self._commands.train_words(run_dir, nproc, **settings)
        return self._commands.start(*words, **self._bucket.env)

    def train(self, run_dir: Path, nproc: int, corpus: object, **settings: Any) -> Ended:
        return self.start(run_dir, nproc, corpus, **settings).wait()

    def run(self, *argv: object) -> Ended:
        return self._commands.start(*argv, TMPDIR=str(self.cache.parent), **self._bucket.env).wait()


@pytest.fixture
def runs(commands: Commands, bucket: Bucket, tmp_path: Path) -> Runs:
    bucket.behave()
    return Runs(commands, bucket, tmp_path / "cache")


def shards_of(asked: Counter[str]) -> Counter[str]:
    return Counter({name: count for name, count in asked.items() if name.endswith((".tar", ".index"))})


# -- the same run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("shuffle", [{}, LOCAL], ids=["global", "local"])
def test_a_bucket_trains_as_the_folder_does(
    shuffle: dict[str, Any], nproc: int, runs: Runs, bucket: Bucket, folder: Path, tmp_path: Path
) -> None:
    runs.train(tmp_path / "folder", nproc, folder, **SHORT, **shuffle).expect(0)
    assert not bucket.asked()
    runs.train(tmp_path / "bucket", nproc, bucket.url("c"), **SHORT, **shuffle).expect(0)
    assert curve(tmp_path / "bucket") == curve(tmp_path / "folder")
    assert sorted(curve(tmp_path / "bucket")) == list(range(1, 9))
    evaluated = [
        [row["eval/loss"] for row in metrics(tmp_path / run) if "eval/loss" in row] for run in ("bucket", "folder")
    ]
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) == 2

    asked = shards_of(bucket.asked())
    assert set(asked.values()) == {1}, f"a file came twice to one node: {asked}"
    trained_on = [name for name in asked if name.startswith("train-")]
    if shuffle:  # three buffers and the one after them
        assert 4 <= len(trained_on) <= 4 * 4, asked
    else:
        assert len(trained_on) > SHARDS / 2


def test_killed_and_resumed_on_another_number_of_ranks(
    runs: Runs, bucket: Bucket, folder: Path, tmp_path: Path
) -> None:
    settings = {**LOCAL, "train__steps": 16, "checkpoint__interval": 4}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    runs.train(undisturbed, 1, folder, **settings).expect(0)

    run = runs.start(killed, 2, bucket.url("c"), **settings)
    assert run.wait_until(lambda: last_step(killed) >= 6 and len(checkpoint_names(killed)) > 0), run.wait().err
    assert run.kill().code == -signal.SIGKILL
    bucket.asked()
    resumed = runs.train(killed, 1, bucket.url("c"), **settings).expect(0)
    assert "resumed from" in resumed.out
    expected, found = curve(undisturbed), curve(killed)
    assert sorted(found) == list(range(1, 17))
    for step, (loss, norm, samples) in expected.items():
        assert found[step][2] == samples
        assert found[step][:2] == pytest.approx((loss, norm), rel=SAME), f"step {step}"
    assert set(shards_of(bucket.asked()).values()) <= {1}, "what was in the cache came again"
    # The files are the corpus's wherever they lie: the same run goes on from the folder.
    runs.train(killed, 2, folder, **{**settings, "train__steps": 18}).expect(0)
    assert sorted(curve(killed)) == list(range(1, 19))


def test_shards_come_while_the_run_trains(runs: Runs, bucket: Bucket, tmp_path: Path) -> None:
    """A buffer of 30 steps: with 50 ms a request only the beginning waits."""
    bucket.latency_seconds = 0.05
    blocks = {**LOCAL, "data__shuffle_block_tokens": 1920, "data__prefetch": 1}
    settings = {**blocks, **SHORT, "train__steps": 70, "train__global_batch_size": 4, "train__eval_samples": 1}
    runs.train(tmp_path / "run", 1, bucket.url("c"), **settings).expect(0)
    rows = [row for row in metrics(tmp_path / "run") if row["step"] > 4 and "train/loss" in row]
    waited, took = (sum(row[f"speed/{what}_seconds"] for row in rows) for what in ("data_wait", "step"))
    assert waited < 0.05 * took


# -- what goes wrong ---------------------------------------------------------------------------------------------


def test_a_cache_too_small_for_two_buffers_is_said_before_anything_is_written(
    runs: Runs, bucket: Bucket, folder: Path, tmp_path: Path
) -> None:
    # Two buffers of two blocks, each of which touches two shards.
    shard = Manifest.load(folder).split("train").shards[0].bytes
    run_dir = tmp_path / "run"
    ended = runs.train(run_dir, 2, bucket.url("c"), **SHORT, **LOCAL, data__cache_size=7 * shard)
    ended.one_error("data.cache_size", f"({7 * shard:,} bytes)", "two buffers", "data.shuffle_blocks", "at least")
    assert not run_dir.exists()
    runs.train(run_dir, 2, bucket.url("c"), **SHORT, **LOCAL, data__cache_size=9 * shard).expect(0)
    held = sum(path.stat().st_size for path in runs.cache.iterdir())
    assert held <= 9 * shard


@pytest.fixture(scope="module")
def worse(bucket: Bucket, folder: Path) -> dict[str, str]:
    """Folders of the bucket whose shard 7 is gone, and cut short."""
    cut = bucket.put("cut", folder)
    bucket.write("cut", "train-00007.tar", (folder / "train-00007.tar").read_bytes()[:-512])
    return {"gone": bucket.put("gone", folder, without=["train-00007.tar"]), "cut": cut}


@pytest.mark.parametrize(("fault", "says"), [("gone", "FileNotFoundError"), ("cut", "truncated")])
def test_a_shard_that_cannot_be_read_ends_the_run_by_its_name(
    fault: str, says: str, runs: Runs, worse: dict[str, str], tmp_path: Path
) -> None:
    ended = runs.train(tmp_path / "run", 2, worse[fault], **SHORT, data__fetch_attempts=2)
    ended.one_error(f"s3://text/{fault}/train-00007.tar", "2 attempts", says, "data.max_unreadable_shards")


def test_a_shard_less_is_counted_and_is_so_on_all_ranks(
    runs: Runs, bucket: Bucket, worse: dict[str, str], tmp_path: Path
) -> None:
    """Gone for both ranks of a model, or only when the first of them asks: it is the same run."""
    settings = {**SHORT, "parallel__tensor": 2, "data__max_unreadable_shards": 1, "data__fetch_attempts": 1}
    runs.train(tmp_path / "gone", 2, worse["gone"], **settings).expect(0)
    last = [row for row in metrics(tmp_path / "gone") if "train/loss" in row][-1]
    assert last["data/unreadable_shards"] == 1 and last["data/replaced_windows"] >= 1

    bucket.behave()
    bucket.denies = denies_once("train-00007.tar")
    runs.cache = tmp_path / "another-cache"
    runs.train(tmp_path / "denied", 2, bucket.url("c"), **settings).expect(0)
    assert bucket.asked()["train-00007.tar"] == 2, "the other rank could read it"
    assert curve(tmp_path / "denied") == curve(tmp_path / "gone")


def test_what_one_rank_cannot_read_in_the_middle_ends_all(runs: Runs, bucket: Bucket, tmp_path: Path) -> None:
    bucket.denies = lambda file, before: before == 20  # six files of each rank are not shards of the training split
    settings = {"train__steps": 1000, "train__global_batch_size": 2, "data__prefetch": 1, "data__fetch_attempts": 1}
    started = time.monotonic()
    ended = runs.train(tmp_path / "run", 2, bucket.url("c"), **settings)
    ended.one_error("s3://text/c/train-000", "1 attempt, the last one: PermissionError", "data.max_unreadable_shards")
    assert last_step(tmp_path / "run") >= 1, "it did not even begin"
    assert time.monotonic() - started < 30
    assert runs.train(tmp_path / "run", 2, bucket.url("c"), **settings, train__stop_after=20).expect(75)


# -- the other commands ------------------------------------------------------------------------------------------


def test_what_comes_after_and_what_is_asked(runs: Runs, bucket: Bucket, folder: Path, tmp_path: Path) -> None:
    url, run_dir = bucket.url("c"), tmp_path / "run"
    runs.train(run_dir, 1, url, **SHORT, **LOCAL).expect(0)
    (loss,) = [row["eval/loss"] for row in metrics(run_dir) if "eval/loss" in row and row["step"] == 8]
    (run_dir / "tokenizer.json").unlink()  # then the bucket has it
    for words in ([], ["--corpus", url]):
        evaluated = runs.run("eval", run_dir, "--samples", 8, *words).expect(0).out
        assert f" on {url}: loss {loss:.4f} nats" in evaluated
    assert "def " in runs.run("generate", run_dir, "--prompt", "def ", "--tokens", 4).expect(0).out

    config = run_dir / "config.yaml"
    order = [runs.run("data", "order", config, f"data.corpus={place}", "--step", 3) for place in (url, folder)]
    assert order[0].expect(0).out == order[1].expect(0).out.replace(str(folder), url)
    assert len(order[0].out.splitlines()) == 13 and url in order[0].out


def test_a_bucket_is_shown_and_verified(
    runs: Runs, bucket: Bucket, folder: Path, worse: dict[str, str], tmp_path: Path
) -> None:
    shown = [runs.run("data", "show", place, "--samples", 3).expect(0).out for place in (bucket.url("c"), folder)]
    assert shown[0] == shown[1].replace(str(folder), bucket.url("c"))
    assert "every byte is as it was built" in runs.run("data", "verify", bucket.url("c"), "--workers", 1).expect(0).out
    ended = runs.run("data", "verify", worse["gone"], "--workers", 1).expect(1)  # the node's cache has it
    assert len(ended.errors) == 1 and "s3://text/gone/train-00007.tar" in ended.errors[0]
    runs.run("data", "index", bucket.url("c")).one_error("is a URL", "Copy the corpus")
    runs.run("data", "show", bucket.url("nothing")).one_error("s3://text/nothing is not a corpus", "manifest.json")


def denies_once(name: str) -> Callable[[str, int], bool]:
    """Deny a file to the first who asks."""
    left = [name]
    return lambda file, before: file in left and not left.remove(file)
