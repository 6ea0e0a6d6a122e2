"""Corpora behind URLs: the same windows as from a folder, whatever the network, the disk and other processes do."""

import contextlib
import errno
import fcntl
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptdist import remote as fetch
from gptdist.data.cache import NodeCache, default_folder
from gptdist.data.fetch import FetchFailed, Remote
from gptdist.data.manifest import Manifest, ShardInfo
from gptdist.data.reader import TokenReader
from gptdist.data.store import CachedStore, LocalStore, Store, StoreSettings, open_store
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.errors import CorpusError, StorageError
from gptdist.remote import file_url, is_permanent, reason_of, without_secrets
from tests.unit.corpora import write_corpus

fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")

CONTEXT = 32
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    lines = [f"{index}: " + hashlib.sha256(str(index).encode()).hexdigest() for index in range(600)]
    documents = [np.frombuffer(line.encode(), dtype=np.uint8) for line in lines]
    splits = {"train": documents[:540], "validation": documents[540:]}
    write_corpus(folder / "c", splits, chunk_tokens=300, shard_documents=20)  # 27 shards of equal size
    return folder / "c"


@pytest.fixture(scope="module")
def expected(corpus: Path) -> np.ndarray:
    return read_all(TokenReader(corpus, "train"))


@pytest.fixture
def quick(tmp_path: Path) -> StoreSettings:
    return StoreSettings(
        cache_dir=tmp_path / "cache",
        cache_size=10**7,
        fetch_attempts=4,
        first_wait_seconds=0.001,
        room_wait_seconds=0.3,
    )


def changed(settings: StoreSettings, **changes: Any) -> StoreSettings:
    return StoreSettings(**{**settings.__dict__, **changes})


def read_all(reader: TokenReader) -> np.ndarray:
    count = reader.num_windows(CONTEXT)
    return reader.windows(np.arange(count), CONTEXT, np.empty((count, CONTEXT + 1), dtype=np.int64))


@contextlib.contextmanager
def opened(url: Path | str, settings: StoreSettings) -> Iterator[Any]:
    store = open_store(url, settings)
    try:
        yield store
    finally:
        store.close()


class Faulty(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """faulty://FOLDER: a folder whose files fail as `faults` says; each request takes the next fault of its file."""

    protocol = "faulty"
    cachable = False
    faults: ClassVar[dict[str, list[Any]]] = {}
    requests: ClassVar[list[tuple[str, int]]] = []

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: Any) -> bytes:
        file = Path("/" + self._strip_protocol(path).lstrip("/"))
        Faulty.requests.append((file.name, start or 0))
        coming = Faulty.faults.get(file.name)
        fault = coming.pop(0) if coming else None
        if isinstance(fault, Exception):
            raise fault
        content = file.read_bytes()[start:end]
        return fault(content) if fault else content


@pytest.fixture
def faulty() -> Iterator[type[Faulty]]:
    fsspec.register_implementation("faulty", Faulty, clobber=True)
    Faulty.faults, Faulty.requests = {}, []
    yield Faulty
    Faulty.faults, Faulty.requests = {}, []


class Status(Exception):
    """As an HTTP library's error."""

    def __init__(self, status: int, message: str = "no") -> None:
        super().__init__(message)
        self.status = status


# ---------------------------------------------------------------------------------------------------- many windows


@given(st.integers(1, 700), st.lists(st.integers(0, 10**6), max_size=200))
@settings(max_examples=60)
def test_many_windows_are_each_their_window(corpus: Path, context: int, numbers: list[int]) -> None:
    reader = TokenReader(corpus, "train")
    stream = np.concatenate(list(reader.chunks())).astype(np.int64)
    indices = [number % reader.num_windows(context) for number in numbers]
    out = np.full((len(indices), context + 1), -1, dtype=np.int64)
    assert reader.windows(indices, context, out) is out
    for row, index in zip(out, indices, strict=True):
        assert np.array_equal(row, stream[index * context : (index + 1) * context + 1])


def test_many_windows_of_one_shard_and_bad_arguments(corpus: Path, expected: np.ndarray) -> None:
    reader = TokenReader(corpus, "train")
    indices = np.array([3, 1, 2, 1] * 50)
    assert np.array_equal(reader.windows(indices, CONTEXT, np.empty((200, CONTEXT + 1), int)), expected[indices])
    with pytest.raises(ValueError, match="out is"):
        reader.windows([1], CONTEXT, np.empty((1, CONTEXT), int))
    with pytest.raises(IndexError, match="window -1 of"):
        reader.windows([5, -1], CONTEXT, np.empty((2, CONTEXT + 1), int))


# ------------------------------------------------------------------------------------------------------- other URLs


@contextlib.contextmanager
def http_server(handler: Callable[..., http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """A web server of the plainest kind: it knows no ranges."""

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def s3(corpus: Path) -> Iterator[Any]:
    """A bucket `text` that holds the corpus under `c`, on a server of the S3 protocol; yields its boto client."""
    moto = pytest.importorskip("moto.server", reason="moto's server is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    import boto3

    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ACCESS_KEY_ID": "known-key",
        "AWS_SECRET_ACCESS_KEY": "known-secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="text")
        for path in corpus.iterdir():
            client.put_object(Bucket="text", Key=f"c/{path.name}", Body=path.read_bytes())
        yield client
        fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


def test_a_bucket_gives_the_same_windows(
    s3: Any, corpus: Path, expected: np.ndarray, quick: StoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "BLOCK_BYTES", 7_000)
    with opened("s3://text/c", quick) as store:
        reader = TokenReader("s3://text/c", "train", store=store)
        assert reader.wants_ahead
        assert np.array_equal(read_all(reader), expected)
        assert store.fetched_files == 1 + len(reader.manifest.split("train").shards)
        assert CorpusTokenizer.of_corpus(store).sha256 == CorpusTokenizer.load(corpus).sha256
        assert Manifest.load("s3://text/c") == Manifest.load(corpus)
    with opened("s3://text/c", quick) as store:  # all is here already
        assert np.array_equal(read_all(TokenReader("s3://text/c", "train", store=store)), expected)
        assert store.fetched_files == 0


def test_a_bucket_that_lost_or_changed_an_object(s3: Any, corpus: Path, quick: StoreSettings) -> None:
    whole = (corpus / "train-00001.tar").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    try:
        for body, message in (
            (
                bytes(flipped),
                r"s3://text/c/train-00001\.tar cannot be fetched: 4 attempts, .* its sha256 is .*\.\.\., the",
            ),
            (whole[:-600], r"train-00001\.tar cannot be fetched: 4 attempts, .* truncated: 19,880 bytes"),
            (None, r"Shard s3://text/c/train-00001\.tar cannot be fetched: 2 attempts, .*FileNotFoundError"),
        ):
            if body is None:
                s3.delete_object(Bucket="text", Key="c/train-00001.tar")
            else:
                s3.put_object(Bucket="text", Key="c/train-00001.tar", Body=body)
            with opened("s3://text/c", quick) as store, pytest.raises(CorpusError, match=message):
                read_all(TokenReader("s3://text/c", "train", store=store))
    finally:
        s3.put_object(Bucket="text", Key="c/train-00001.tar", Body=whole)
    with pytest.raises(CorpusError, match=r"s3://text/nothing is not a corpus: it has no manifest\.json"):
        Manifest.load("s3://text/nothing")
    sha256 = Manifest.load(corpus).split("train").shards[1].sha256
    assert not [path for path in (quick.cache_dir / sha256, quick.cache_dir / f"{sha256}.part") if path.exists()]  # type: ignore[operator]


def test_a_plain_web_server_and_a_file_url(corpus: Path, expected: np.ndarray, quick: StoreSettings) -> None:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")
    with http_server(partial(Quiet, directory=str(corpus))) as url, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch, "BLOCK_BYTES", 7_000)
        with opened(url, quick) as store:
            assert np.array_equal(read_all(TokenReader(url, "train", store=store)), expected)
        with pytest.raises(CorpusError, match=r"is not a corpus: it has no manifest\.json"):
            Manifest.load(f"{url}/elsewhere/")
    url = f"file://{corpus}"
    with opened(url, changed(quick, cache_dir=Path(quick.cache_dir or "") / "other")) as store:
        assert isinstance(store, CachedStore)
        assert np.array_equal(read_all(TokenReader(url, "train", store=store)), expected)
    assert CorpusTokenizer.load(url).vocab_size == 257


def test_urls_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"nosuch:// cannot be opened .*Use s3://"):
        Manifest.load("nosuch://bucket/c")
    assert isinstance(open_store(tmp_path), LocalStore)
    assert not open_store(str(tmp_path)).wants_ahead


# ------------------------------------------------------------------------------------------------ faults on the way


@pytest.mark.parametrize(
    "fault",
    [OSError("reset"), TimeoutError(), Status(503), Status(429), lambda data: data[:-9], lambda data: data[::-1]],
)
@pytest.mark.parametrize("times", [1, 3])
def test_faults_that_pass(
    corpus: Path, expected: np.ndarray, quick: StoreSettings, faulty: type[Faulty], fault: Any, times: int
) -> None:
    faulty.faults = {name: [fault] * times for name in ("manifest.json", "train.index", "train-00002.tar")}
    if callable(fault):
        faulty.faults["manifest.json"] = []  # it says itself that it is damaged
    with opened(f"faulty://{corpus}", quick) as store:
        assert np.array_equal(read_all(TokenReader("", "train", store=store)), expected)
    assert sum(name == "train-00002.tar" for name, _ in faulty.requests) == times + 1


@pytest.mark.parametrize(
    ("fault", "attempts", "reason"),
    [
        (OSError("reset by peer"), 4, "OSError: reset by peer"),
        (Status(500), 4, "Status 500: no"),
        (lambda data: data[:-1] + b"?", 4, "its sha256 is .* the manifest says"),
        (lambda data: b"", 4, "it is truncated: 0 bytes came where"),
        (lambda data: data + b"more", 4, "is not the file that was built"),
        (Status(403), 2, "Status 403"),
        (FileNotFoundError(2, "not there"), 2, "FileNotFoundError"),
        (PermissionError("denied"), 2, "denied"),
    ],
)
def test_faults_that_stay_name_shard_attempts_and_reason(
    corpus: Path, quick: StoreSettings, faulty: type[Faulty], fault: Any, attempts: int, reason: str
) -> None:
    faulty.faults["train-00002.tar"] = [fault] * 99
    message = rf"Shard faulty://.*train-00002\.tar cannot be fetched: {attempts} attempts, the last one: .*{reason}"
    with opened(f"faulty://{corpus}", quick) as store, pytest.raises(CorpusError, match=message):
        read_all(TokenReader("", "train", store=store))
    assert sum(name == "train-00002.tar" for name, _ in faulty.requests) == attempts


def test_an_interrupted_download_goes_on_where_it_was(
    corpus: Path, expected: np.ndarray, quick: StoreSettings, faulty: type[Faulty], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "BLOCK_BYTES", 5_000)
    faulty.faults["train-00000.tar"] = [None, None, OSError("cut")]
    with opened(f"faulty://{corpus}", quick) as store:
        assert np.array_equal(read_all(TokenReader("", "train", store=store)), expected)
    assert [start for name, start in faulty.requests if name == "train-00000.tar"] == [
        0,
        5000,
        10000,
        10000,
        15000,
        20000,
    ]


def test_waits_double_and_end_with_the_store(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    class Recorded(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waits.append(timeout or 0)
            return len(waits) == 7

    remote = Remote(f"file://{corpus}/nowhere", 20, 1.0, Recorded())
    monkeypatch.setattr(fetch, "PERMANENT_ATTEMPTS", 20)
    with pytest.raises(FetchFailed, match="stopped"):
        remote.read("a")
    assert all(0.5 * 2**n <= wait <= 1.5 * 2**n for n, wait in enumerate(waits[:5]))
    assert all(15 <= wait <= 45 for wait in waits[5:])
    assert len(set(waits)) == 7


def test_no_secret_is_shown(faulty: type[Faulty], quick: StoreSettings) -> None:
    secret = "https://me:pass@host/c?token=deep"
    assert without_secrets(f"GET {secret}, then") == "GET https://***@host/c?*** then"
    assert file_url(secret, "a.tar") == "https://me:pass@host/c/a.tar?token=deep"
    assert file_url("s3://b/c/", "a.tar") == "s3://b/c/a.tar"
    assert reason_of(OSError("no " + secret)) == "OSError: no https://***@host/c?***"
    with opened("faulty://key:secret@host/c", quick) as store, pytest.raises(CorpusError) as caught:
        Manifest.load(store)
    assert "secret" not in str(caught.value)
    assert "faulty://***@host/c" in str(caught.value)


def test_what_libraries_call_permanent() -> None:
    class Botocore(Exception):
        response: ClassVar[dict[str, Any]] = {"ResponseMetadata": {"HTTPStatusCode": 403}}

    assert [is_permanent(error) for error in (Botocore(), Status(404), PermissionError(), FileNotFoundError())] == [
        True
    ] * 4
    assert [is_permanent(error) for error in (Status(503), Status(429), OSError(), TimeoutError(), KeyError())] == [
        False
    ] * 5


# ---------------------------------------------------------------------------------------------- shards given up


def damaged_copy(corpus: Path, folder: Path, numbers: tuple[int, ...]) -> Path:
    folder.mkdir()
    for path in corpus.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for number in numbers:
        path = folder / f"train-{number:05d}.tar"
        if number % 3 == 0:
            path.unlink()
        elif number % 3 == 1:
            path.write_bytes(path.read_bytes()[:-512])
        else:
            content = bytearray(path.read_bytes())
            content[1000] ^= 1
            path.write_bytes(content)
    return folder


@pytest.mark.parametrize("remote", [False, True])
def test_windows_of_lost_shards_are_replaced_by_the_next(
    corpus: Path, expected: np.ndarray, tmp_path: Path, quick: StoreSettings, remote: bool
) -> None:
    shards = list(Manifest.load(corpus).split("train").shards)
    last = len(shards) - 1
    lost = (0, 2, 3, 4, last)
    folder = damaged_copy(corpus, tmp_path / "c", lost)
    ends = np.cumsum([0, *(shard.tokens for shard in shards)])
    starts = np.arange(len(expected)) * CONTEXT
    good = np.ones(len(expected), dtype=bool)
    for number in lost:
        good &= (starts + CONTEXT < ends[number]) | (starts >= ends[number + 1])
    order = np.flatnonzero(good)
    replacement = order[np.searchsorted(order, np.arange(len(expected))) % len(order)]
    allowed = changed(quick, max_unreadable_shards=len(lost))
    with opened(f"file://{folder}" if remote else folder, allowed) as store:
        reader = TokenReader("", "train", store=store)
        assert np.array_equal(read_all(reader), expected[replacement])
        assert (len(reader.lost), reader.replaced_windows) == (len(lost), int((~good).sum()))
        assert np.array_equal(reader.window(0, CONTEXT), expected[replacement[0]])
        assert reader.replaced_windows == int((~good).sum()) + 1
    with opened(f"file://{folder}" if remote else folder, changed(quick, max_unreadable_shards=4)) as store:
        with pytest.raises(CorpusError, match=r"5 shards of the train split .*max_unreadable_shards is 4") as caught:
            read_all(TokenReader("", "train", store=store))
        assert all(f"train-{number:05d}.tar" in str(caught.value) for number in lost)


def test_a_corpus_of_lost_shards_is_said_to_be_lost(corpus: Path, tmp_path: Path, quick: StoreSettings) -> None:
    count = len(Manifest.load(corpus).split("train").shards)
    folder = damaged_copy(corpus, tmp_path / "c", tuple(range(count)))
    reader = TokenReader(folder, "train", store=open_store(folder, changed(quick, max_unreadable_shards=count)))
    with pytest.raises(CorpusError, match=r"No window of the train split"):
        read_all(reader)


def test_a_copy_that_went_bad_in_the_cache_is_fetched_again(
    corpus: Path, expected: np.ndarray, quick: StoreSettings, faulty: type[Faulty]
) -> None:
    url = f"faulty://{corpus}"
    with opened(url, quick) as store:
        read_all(TokenReader("", "train", store=store))
    shards = Manifest.load(corpus).split("train").shards
    for shard, place in ((shards[1], 700), (shards[2], None)):
        path = Path(quick.cache_dir or "") / shard.sha256
        content = bytearray(path.read_bytes())
        if place is None:
            content = content[:-1]
        else:
            content[place] ^= 1
        path.write_bytes(content)
    faulty.requests = []
    with opened(url, quick) as store:
        assert np.array_equal(read_all(TokenReader("", "train", store=store)), expected)
        assert store.fetched_files == 2


# ------------------------------------------------------------------------------------------------------- the cache


def put(cache: NodeCache, content: bytes) -> str:
    sha256 = hashlib.sha256(content).hexdigest()
    filling = cache.start(sha256)
    assert filling
    assert cache.reserve(filling, len(content))
    os.pwrite(filling.descriptor, content, 0)
    filling.commit().release()
    time.sleep(0.002)
    return sha256


def names(cache: NodeCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if not path.name.endswith(".lock")}


def test_the_least_recently_used_goes_first_and_never_a_leased_one(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache", 3000)
    a, b, c = (put(cache, bytes([n]) * 1000) for n in range(3))
    leased = cache.lease(b, 1000)
    used = cache.lease(a, 1000)
    assert leased
    assert used
    used.release()
    time.sleep(0.002)
    d = put(cache, b"d" * 900)  # c was used before a, and b is leased
    assert names(cache) == {a, b, d}
    filling = cache.start(c)
    assert filling
    assert not cache.reserve(filling, 2500)
    filling.drop()
    assert b in names(cache)
    leased.release()
    assert cache.lease(a, 999) is None  # another size: not the file
    assert a not in names(cache)


def test_only_one_fills_a_file(tmp_path: Path) -> None:
    one, two = NodeCache(tmp_path / "cache", 3000), NodeCache(tmp_path / "cache", 3000)
    filling = one.start("a" * 64)
    assert filling
    assert two.start("a" * 64) is None
    assert one.reserve(filling, 2000)
    other = two.start("b" * 64)
    assert other
    assert not two.reserve(other, 1500)  # the room of what is being filled is taken
    other.drop()
    lease = filling.commit()
    assert two.start("a" * 64) is None
    assert names(one) == {"a" * 64}
    lease.release()


def test_remains_and_too_much_are_cleared_at_the_start(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path / "cache", 5000)
    kept = [put(cache, bytes([n]) * 1000) for n in range(5)]
    (cache.folder / f"{'f' * 64}.part").write_bytes(b"half")
    (cache.folder / "a letter").write_text("not ours")
    with (cache.folder / f"{'e' * 64}.part").open("wb") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        assert names(NodeCache(tmp_path / "cache", 2500)) == {*kept[3:], f"{'e' * 64}.part", "a letter"}
    assert names(NodeCache(tmp_path / "cache", 2500)) == {*kept[3:], "a letter"}


def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    NodeCache(None, 1)
    assert default_folder() == tmp_path / f"gptdist-cache-{os.getuid()}"
    assert default_folder().stat().st_mode & 0o777 == 0o700
    default_folder().chmod(0o777)
    with pytest.raises(StorageError, match=r"written by everyone \(mode 777\)\. Set data\.cache_dir"):
        NodeCache(None, 1)
    with monkeypatch.context() as patch:
        uid = os.getuid()
        patch.setattr(os, "getuid", lambda: uid + 1)
        (tmp_path / "mine").mkdir()
        with pytest.raises(StorageError, match=f"belongs to user {uid}, not to you"):
            NodeCache(tmp_path / "mine", 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be used"):
        NodeCache(tmp_path / "file", 1)


def test_a_full_disk_evicts_and_then_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = NodeCache(tmp_path / "cache", 10_000)
    for n in range(3):
        put(cache, bytes([n]) * 1000)
    room = 1500

    def allocate(descriptor: int, offset: int, size: int) -> None:
        if cache.used_bytes() + size > room:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", allocate)
    filling = cache.start("a" * 64)
    assert filling
    assert cache.reserve(filling, 1000)
    assert len(names(cache)) == 1  # only the new one
    room = 0
    with pytest.raises(StorageError, match=r"No space left on device \(1,000 bytes were needed\).*data\.cache_dir"):
        cache.reserve(filling, 1000)
    filling.drop()


@pytest.mark.parametrize("shards_that_fit", [1, 4])
def test_the_cache_keeps_its_bound_while_all_is_read(
    corpus: Path, expected: np.ndarray, quick: StoreSettings, shards_that_fit: int
) -> None:
    info = Manifest.load(corpus).split("train")
    size = info.index.bytes + max(shard.bytes for shard in info.shards) * shards_that_fit
    with opened(f"file://{corpus}", changed(quick, cache_size=size, room_wait_seconds=20)) as store:
        reader = TokenReader("", "train", store=store)
        out = np.empty((16, CONTEXT + 1), dtype=np.int64)
        for first in range(0, len(expected) - 16, 16):
            reader.fetch_ahead([(index * CONTEXT, (index + 1) * CONTEXT + 1) for index in range(first, first + 200)])
            assert np.array_equal(reader.windows(range(first, first + 16), CONTEXT, out), expected[first : first + 16])
            with store._cache._room_locked():  # a listing is no snapshot: a file that is just renamed is seen twice
                assert min(store._cache.used_bytes() for _ in range(3)) <= size
        assert len(reader._shards) <= shards_that_fit + 1
        assert store.fetched_files <= 1 + 3 * len(info.shards)


def test_a_cache_that_is_too_small_is_refused(corpus: Path, quick: StoreSettings) -> None:
    info = Manifest.load(corpus).split("train")
    needed = info.index.bytes + max(shard.bytes for shard in info.shards)
    message = f"data.cache_size .* its largest shard. Set .* at least {needed:,}"
    too_small = changed(quick, cache_size=needed - 1)
    with opened(f"file://{corpus}", too_small) as store, pytest.raises(StorageError, match=message):
        TokenReader("", "train", store=store)
    with opened(f"file://{corpus}", changed(quick, cache_size=needed)) as store:
        TokenReader("", "train", store=store)


def test_room_for_ranges_is_that_of_one_shard_more_each(corpus: Path) -> None:
    reader = TokenReader(corpus, "train")
    info = reader.manifest.split("train")
    shard, tokens = info.shards[0].bytes, info.tokens // len(info.shards)
    shards = [
        (reader.room_for(ranges, each) - info.index.bytes) / shard
        for ranges, each in ((1, 1), (3, tokens), (2, 4 * tokens))
    ]
    assert shards == pytest.approx([2, 6, 10], rel=0.01)
    assert (
        reader.room_for(100, tokens)
        == reader.room_for(10**9, 10**9)
        == info.index.bytes + sum(s.bytes for s in info.shards)
    )


def test_a_cache_that_others_fill_says_so(corpus: Path, quick: StoreSettings) -> None:
    info = Manifest.load(corpus).split("train")
    size = info.index.bytes + max(shard.bytes for shard in info.shards)
    with opened(f"file://{corpus}", changed(quick, cache_size=size)) as store:
        reader = TokenReader("", "train", store=store)
        cache = NodeCache(quick.cache_dir, size)
        lease = cache.lease(put(cache, b"x" * 9000), 9000)
        assert lease
        with pytest.raises(StorageError, match=r"No room in the cache .* in use by this node's ranks\. Increase data"):
            reader.window(0, CONTEXT)
        lease.release()
        reader.window(0, CONTEXT)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def present(store: CachedStore, shards: list[ShardInfo]) -> list[bool]:
    return [(store._open_cache().folder / shard.sha256).exists() for shard in shards]


def test_shards_come_ahead_in_the_order_of_need(corpus: Path, quick: StoreSettings, faulty: type[Faulty]) -> None:
    info = Manifest.load(corpus).split("train")
    shards = list(info.shards)
    size = info.index.bytes + 3 * max(shard.bytes for shard in shards)
    with opened(f"faulty://{corpus}", changed(quick, cache_size=size)) as store:
        reader = TokenReader("", "train", store=store)
        ends = np.cumsum([0, *(shard.tokens for shard in shards)]).tolist()
        reader.fetch_ahead([(ends[n], ends[n] + 5) for n in (5, 2, 7, 1)])
        wait_until(lambda: store.fetched_files == 4)
        assert [name for name, _ in faulty.requests if name.endswith("tar")] == [
            f"train-0000{n}.tar" for n in (5, 2, 7)
        ]
        time.sleep(0.3)  # the fourth finds no room, and takes none from those that are needed sooner
        assert [number for number, there in enumerate(present(store, shards)) if there] == [2, 5, 7]
        for _ in range(3):
            reader.fetch_ahead([(ends[n], ends[n + 1]) for n in (7, 1)])  # 5 and 2 are used up
        wait_until(lambda: store.fetched_files == 5)
        assert [number for number, there in enumerate(present(store, shards)) if there] == [1, 2, 7]
        reader.window(ends[4] // CONTEXT + 1, CONTEXT)  # what is needed now has precedence
        faulty.faults["train-00006.tar"] = [OSError("down")] * 99
        for _ in range(3):
            reader.fetch_ahead([(ends[6], ends[7]), (ends[8], ends[9])])
        wait_until(lambda: present(store, shards)[8])
        faulty.faults = {}
        reader.window(ends[6] // CONTEXT + 1, CONTEXT)  # failing ahead is no failure


def test_what_another_is_fetching_is_passed_over(corpus: Path, quick: StoreSettings) -> None:
    shards = list(Manifest.load(corpus).split("train").shards)
    with opened(f"file://{corpus}", quick) as store:
        filling = NodeCache(quick.cache_dir, quick.cache_size).start(shards[0].sha256)
        assert filling
        store.fetch_ahead(shards[:3])
        wait_until(lambda: present(store, shards[:3]) == [False, True, True])
        found: list[Path] = []
        waiting = threading.Thread(target=lambda: found.append(store.path(shards[0])))
        waiting.start()
        time.sleep(0.05)
        assert not found
        filling.drop()
        waiting.join()
        assert found[0].read_bytes() == (corpus / "train-00000.tar").read_bytes()


def test_a_cache_emptied_by_hand_is_filled_again(corpus: Path, expected: np.ndarray, quick: StoreSettings) -> None:
    with opened(f"file://{corpus}", quick) as store:
        reader = TokenReader("", "train", store=store)
        read_all(reader)
        reader.close()  # the store is not its own, and stays open
        for name in names(store._cache):
            store._cache.discard(name)
        assert np.array_equal(read_all(reader), expected)
    own = TokenReader(corpus, "train")
    own.close()


# ------------------------------------------------------------------------------------------------ several processes

READ_ALL = """
import sys, numpy as np
from gptdist.data.reader import TokenReader
from gptdist.data.store import StoreSettings, open_store
url, cache, size, seed = sys.argv[1:]
store = open_store(url, StoreSettings(cache, int(size), first_wait_seconds=0.01))
reader = TokenReader(url, "train", store=store)
order = np.random.default_rng(int(seed)).permutation(reader.num_windows(32))
total = 0
for part in np.array_split(order, 5):
    reader.fetch_ahead([(i * 32, i * 32 + 33) for i in part.tolist()])
    total += int(reader.windows(part, 32, np.empty((len(part), 33), np.int64)).sum())
print(store.fetched_files, total)
assert "torch" not in sys.modules
store.close()
"""


def start(code: str, *args: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, env=environment, text=True
    )


def outputs(processes: list[subprocess.Popen[str]]) -> list[list[int]]:
    results = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return [list(map(int, result.split())) for result in results]


def test_processes_that_share_a_cache_fetch_each_shard_once(
    s3: Any, corpus: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    found = outputs([start(READ_ALL, "s3://text/c", tmp_path / "cache", 10**8, seed) for seed in range(2)])
    assert [total for _, total in found] == [int(expected.sum())] * 2
    assert sum(fetched for fetched, _ in found) == 1 + len(Manifest.load(corpus).split("train").shards)


def test_processes_that_share_a_small_cache_all_get_on(corpus: Path, expected: np.ndarray, tmp_path: Path) -> None:
    info = Manifest.load(corpus).split("train")
    size = info.index.bytes + 3 * max(shard.bytes for shard in info.shards)
    processes = [start(READ_ALL, f"file://{corpus}", tmp_path / "cache", size, seed) for seed in range(2)]
    assert [total for _, total in outputs(processes)] == [int(expected.sum())] * 2
    assert NodeCache(tmp_path / "cache", size).used_bytes() <= size


def test_a_killed_process_leaves_nothing_under_a_final_name(
    corpus: Path, expected: np.ndarray, tmp_path: Path, quick: StoreSettings
) -> None:
    pytest.importorskip("aiohttp", reason="aiohttp is not installed")

    class Dripping(Quiet):
        """Shards come in pieces, slowly."""

        def copyfile(self, source: Any, outputfile: Any) -> None:
            with contextlib.suppress(OSError):
                while piece := source.read(5000):
                    outputfile.write(piece)
                    outputfile.flush()
                    time.sleep(0.05 if ".tar" in self.path and slow else 0)

    slow = True
    shards = {shard.sha256: shard for shard in Manifest.load(corpus).split("train").shards}
    with http_server(partial(Dripping, directory=str(corpus))) as url:
        for _ in range(3):
            process = start(READ_ALL, url, quick.cache_dir, 10**8, 1)
            deadline = time.monotonic() + 30
            while not list(tmp_path.glob("cache/*.part")) or not any(tmp_path.glob(f"cache/{s}") for s in shards):
                assert time.monotonic() < deadline
                time.sleep(0.01)
            time.sleep(0.07)
            process.send_signal(signal.SIGKILL)
            process.communicate()
            for path in (tmp_path / "cache").iterdir():
                if path.name in shards:
                    assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
        slow = False
        with opened(url, quick) as store:
            assert np.array_equal(read_all(TokenReader(url, "train", store=store)), expected)
    assert not list(tmp_path.glob("cache/*.part"))


def test_one_store_serves_several_threads(corpus: Path, expected: np.ndarray, quick: StoreSettings) -> None:
    info = Manifest.load(corpus).split("train")
    size = info.index.bytes + 4 * max(shard.bytes for shard in info.shards)
    found: list[np.ndarray] = []
    with opened(f"file://{corpus}", changed(quick, cache_size=size, room_wait_seconds=30)) as store:
        readers = [TokenReader("", "train", store=store) for _ in range(3)]
        threads = [threading.Thread(target=lambda reader=reader: found.append(read_all(reader))) for reader in readers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(found) == 3
    assert all(np.array_equal(windows, expected) for windows in found)


def test_the_store_protocol_is_kept() -> None:
    stores: list[Store] = [LocalStore(Path("x"), StoreSettings()), CachedStore("file:///x", StoreSettings())]
    assert [store.name for store in stores] == ["x", "file:///x"]
