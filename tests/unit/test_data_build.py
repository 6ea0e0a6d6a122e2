"""Building a corpus: the same bytes from the same text, readable by stock webdataset, clear errors for bad input."""

import errno
import gc
import hashlib
import json
import math
import os
import random
import re
import resource
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.build import BuiltCorpus, build_corpus
from data_tools.building.arrange import HASH_RANGE, order_hashes, shard_range, split_bound, split_hashes
from data_tools.corpus.show import render_corpus, sample_text, unigram_entropy
from data_tools.corpus.verify import verify_corpus
from data_tools.reporting.progress import NoProgress
from gptdist.data.manifest import Manifest
from gptdist.data.reader import TokenReader
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.errors import CorpusError, StorageError
from tests.unit.corpora import write_corpus

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def stdlib_sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few dozen modules of the standard library, in two folders."""
    folder = tmp_path_factory.mktemp("sources")
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    for place in ("json", "email"):
        (folder / place).mkdir()
        for path in sorted((stdlib / place).glob("*.py")):
            (folder / place / path.name).write_bytes(path.read_bytes())
    return folder


def built(corpus: BuiltCorpus | None) -> Manifest:
    assert corpus is not None
    return corpus.manifest


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stock_samples(folder: Path, split: str) -> list[dict[str, Any]]:
    """The samples of a split as webdataset itself reads and decodes them."""
    urls = [str(folder / shard.file) for shard in Manifest.load(folder).split(split).shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode()) if urls else []
        gc.collect()
    return samples


def documents_of(corpus_dir: Path, split: str) -> dict[str, str]:
    """Key -> text of every document, read by stock webdataset alone."""
    tokenizer = CorpusTokenizer.load(corpus_dir)
    documents: dict[str, str] = {}
    for sample in stock_samples(corpus_dir, split):
        start = 0
        for key, end in zip(sample["json"]["documents"], sample["docs.npy"].tolist(), strict=True):
            ids = sample["tokens.npy"][start:end].tolist()
            assert ids[-1] == tokenizer.end_of_text
            assert tokenizer.end_of_text not in ids[:-1]
            assert key not in documents
            documents[key] = tokenizer.decode(ids[:-1])
            start = end
        assert start == len(sample["tokens.npy"])
    return documents


@pytest.mark.parametrize("tokenizer", ["bytes", "train:400"])
def test_every_document_arrives_whole_through_stock_webdataset(
    stdlib_sources: Path, tmp_path: Path, tokenizer: str
) -> None:
    manifest = built(
        build_corpus([stdlib_sources], tmp_path / "c", tokenizer, chunk_tokens=20_000, shard_bytes=200_000)
    )
    found = documents_of(tmp_path / "c", "train") | documents_of(tmp_path / "c", "validation")
    expected = {path.relative_to(stdlib_sources).as_posix(): path.read_text() for path in stdlib_sources.rglob("*.py")}
    assert found == {key: text for key, text in expected.items() if text.strip()}
    assert len(manifest.split("train").shards) > 1
    assert verify_corpus(tmp_path / "c") == []
    assert sum(split.documents for split in manifest.splits.values()) == len(found)
    assert sum(split.text_bytes for split in manifest.splits.values()) == sum(
        len(text.encode()) for text in found.values()
    )


def test_webdataset_yields_the_tokens_of_the_reader(stdlib_sources: Path, tmp_path: Path) -> None:
    manifest = built(build_corpus([stdlib_sources], tmp_path / "c", "bytes", chunk_tokens=30_000, shard_bytes=300_000))
    reader = TokenReader(tmp_path / "c", "train")
    samples = stock_samples(tmp_path / "c", "train")
    assert len(samples) == len(reader.index) == manifest.split("train").chunks
    for sample, tokens in zip(samples, reader.chunks(), strict=True):
        assert re.fullmatch(r"train-\d{5}-\d{5}", sample["__key__"])
        assert sample["tokens.npy"].dtype == tokens.dtype == np.uint16
        assert np.array_equal(sample["tokens.npy"], tokens)
    for number, shard in enumerate(manifest.split("train").shards):
        mine = [len(reader.chunk_tokens(chunk)) for chunk in np.flatnonzero(reader.index.shard == number).tolist()]
        assert (shard.tokens, shard.chunks) == (sum(mine), len(mine))


@pytest.mark.parametrize("tokenizer", ["bytes", "train:300"])
def test_the_same_text_gives_the_same_bytes(stdlib_sources: Path, tmp_path: Path, tokenizer: str) -> None:
    elsewhere = tmp_path / "another" / "place"
    for path in sorted(stdlib_sources.rglob("*.py"), reverse=True):  # other times, other order on the disk
        copy = elsewhere / path.relative_to(stdlib_sources)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    build_corpus([stdlib_sources], tmp_path / "one", tokenizer, chunk_tokens=50_000)
    build_corpus([elsewhere], tmp_path / "two", tokenizer, chunk_tokens=50_000)
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    build_corpus([stdlib_sources], tmp_path / "three", tokenizer, chunk_tokens=50_000, seed=5)
    assert files_of(tmp_path / "three")["train-00000.tar"] != files_of(tmp_path / "one")["train-00000.tar"]


def test_real_text_and_its_unigram_entropy(tmp_path: Path) -> None:
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real text at {SHARED_DATA}")
    sources = [SHARED_DATA / "wikitext2-valid.txt"]
    held_out = [SHARED_DATA / "wikitext2-test.txt"]
    manifest = built(build_corpus(sources, tmp_path / "c", "bytes", validation_sources=held_out))
    for split, source in (("train", sources[0]), ("validation", held_out[0])):
        counts = Counter(source.read_bytes())
        counts[256] += 1
        total = sum(counts.values())
        entropy = -sum(count / total * math.log(count / total) for count in counts.values())
        assert manifest.split(split).tokens == total
        assert unigram_entropy(tmp_path / "c", split) == pytest.approx(entropy, rel=1e-12)
    assert documents_of(tmp_path / "c", "validation")["wikitext2-test.txt"].encode() == held_out[0].read_bytes()


def test_json_lines_and_names_that_meet(tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        lines = [{"body": f"{place} line {number} é \n\n end"} for number in range(3)]
        text = "\n".join(json.dumps(line) for line in lines) + "\n\n" + json.dumps({"body": "  \n"}) + "\n"
        (tmp_path / place / "x.jsonl").write_text(text)
    sources = [tmp_path / "a" / "x.jsonl", tmp_path / "b" / "x.jsonl"]
    manifest = built(build_corpus(sources, tmp_path / "c", "bytes", text_fields=("body",), validation_fraction=0))
    documents = documents_of(tmp_path / "c", "train")
    expected = [f"{place} line {number} é \n\n end" for place in ("a", "b") for number in range(3)]
    assert sorted(documents.values()) == sorted(expected)
    for place, name in (("a", "x.jsonl"), ("b", "x.jsonl~2")):
        content = (tmp_path / place / "x.jsonl").read_bytes()
        for number, line in enumerate(content.splitlines()[:3]):
            assert documents[f"{name}@{content.index(line)}"] == f"{place} line {number} é \n\n end"
    assert manifest.build["dropped"] == {"empty": 2}
    assert manifest.split("validation").tokens == 0
    assert verify_corpus(tmp_path / "c") == []


def test_folders_are_searched_for_text_only(tmp_path: Path) -> None:
    for name in ("a.txt", "b.PY", "c.png", ".git/d.txt", "site-packages/e.py", "deep/er/f.rst", "g.log"):
        path = tmp_path / "s" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    build_corpus([tmp_path / "s"], tmp_path / "c", "bytes", validation_fraction=0)
    assert set(documents_of(tmp_path / "c", "train")) == {"a.txt", "b.PY", "deep/er/f.rst"}
    build_corpus([tmp_path / "s"], tmp_path / "d", "bytes", validation_fraction=0, suffixes=(".log", ".py"), exclude=())
    assert set(documents_of(tmp_path / "d", "train")) == {"b.PY", "g.log", "site-packages/e.py"}


def digests_of(texts: list[str]) -> np.ndarray:
    content = b"".join(hashlib.sha256(text.encode()).digest()[:16] for text in texts)
    return np.frombuffer(content, dtype="<u8").reshape(-1, 2)


@given(st.lists(st.text(max_size=3), min_size=1, max_size=30), st.integers(0, 9), st.floats(0, 0.99))
def test_the_split_keeps_equal_texts_together(texts: list[str], seed: int, fraction: float) -> None:
    hashes = split_hashes(seed, digests_of(texts)).tolist()
    bound = split_bound(fraction, min(hashes), max(hashes))
    sides = {text: set() for text in texts}
    for text, value in zip(texts, hashes, strict=True):
        sides[text].add(value < bound)
    assert all(len(side) == 1 for side in sides.values())
    both = {side for found in sides.values() for side in found}
    assert (fraction > 0 and len(set(texts)) >= 2) <= (len(both) == 2)
    assert (fraction == 0) <= (both == {False})


def test_the_split_takes_about_its_fraction_and_the_order_is_mixed() -> None:
    hashes = split_hashes(1, digests_of([f"text {number}" for number in range(5000)]))
    assert 400 < (hashes < np.uint64(split_bound(0.1, 0, HASH_RANGE - 1))).sum() < 600
    keys = [f"d{number}".encode() for number in range(5000)]
    order = np.argsort(order_hashes(1, keys))
    assert abs(np.corrcoef(order, np.arange(5000))[0, 1]) < 0.06
    assert order.tolist() != np.argsort(order_hashes(2, keys)).tolist()


@given(st.integers(1, 10**6))
def test_shards_take_every_hash_once(count: int) -> None:
    numbers = sorted({0, count // 3, count // 2, max(0, count - 2), count - 1})
    for number in numbers:
        low, high = shard_range(number, count)
        assert low < high
        assert number == 0 or shard_range(number - 1, count)[1] == low
    assert shard_range(0, count)[0] == 0
    assert shard_range(count - 1, count)[1] == HASH_RANGE


@pytest.mark.parametrize("max_bytes", [1, 40, 500, 2000, 10**6])
def test_max_bytes_takes_the_longest_prefix_of_the_order(tmp_path: Path, max_bytes: int) -> None:
    texts = {f"{number:03d}.txt": "x" * (7 * number % 41 + 1) for number in range(60)}
    for name, text in texts.items():
        file_of(tmp_path, name, text.encode())
    manifest = built(
        build_corpus([tmp_path], tmp_path / "out" / "c", "bytes", max_bytes=max_bytes, validation_fraction=0)
    )
    hashes = order_hashes(1234, [name.encode() for name in texts])
    in_order = [name for _, name in sorted(zip(hashes.tolist(), texts, strict=True))]
    sizes = np.cumsum([len(texts[name]) for name in in_order])
    count = max(1, int((sizes <= max_bytes).sum()))
    assert list(documents_of(tmp_path / "out" / "c", "train")) == in_order[:count]
    assert manifest.build["dropped"] == ({"over the size limit": 60 - count} if count < 60 else {})


@given(
    st.lists(st.lists(st.integers(0, 70_000), max_size=40), min_size=1, max_size=30),
    st.integers(1, 60),
    st.integers(1, 12),
    st.sampled_from(["uint16", "uint32"]),
)
@settings(max_examples=30, deadline=None)
def test_any_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], chunk: int, shard: int, dtype: str
) -> None:
    folder = tmp_path_factory.mktemp("split")
    limit = np.iinfo(dtype).max
    kept = [np.array([index for index in ids if index <= limit], dtype=np.int64) for ids in documents]
    write_corpus(folder, {"train": kept}, dtype=dtype, chunk_tokens=chunk, shard_documents=shard)
    expected = [index for ids in kept for index in [*ids.tolist(), 256]]
    reader = TokenReader(folder, "train")
    assert np.concatenate(list(reader.chunks())).tolist() == expected
    assert all(len(tokens) <= max(chunk, 41) for tokens in reader.chunks())
    assert (reader.index.tokens_offset % 512 == 0).all()
    assert reader.index.document_start[-1] == len(documents)


def test_show_says_what_is_there(stdlib_sources: Path, tmp_path: Path) -> None:
    manifest = built(build_corpus([stdlib_sources], tmp_path / "c", "train:300"))
    text = render_corpus(tmp_path / "c")
    assert "hf, 300 ids" in text
    assert f"{manifest.split('train').tokens:,} tokens" in text
    assert f"{manifest.split('validation').documents:,} documents" in text
    first_key = next(iter(documents_of(tmp_path / "c", "train")))
    assert (stdlib_sources / first_key).read_text().startswith(sample_text(tmp_path / "c"))
    assert len(sample_text(tmp_path / "c")) > 20


BAD_INPUT: dict[str, tuple[Callable[[Path], dict[str, object]], str]] = {
    "missing file": (lambda d: {"sources": [d / "no.txt"]}, r"Source .*no\.txt does not exist"),
    "missing validation": (lambda d: {"validation_sources": [d / "no"]}, r"Source .*no does not exist"),
    "no sources": (lambda d: {"sources": []}, "No document in no source"),
    "empty folder": (lambda d: {"sources": [folder_of(d)]}, r"No document in .*\.txt, \.jsonl, \.md"),
    "only blanks": (lambda d: {"sources": [file_of(d, "x.txt", b" \n")]}, "No document is left to build a corpus from"),
    "broken encoding": (
        lambda d: {"sources": [file_of(d, "x.txt", b"good \xff bad")]},
        r"x\.txt is not UTF-8 at byte offset 5 \(byte 0xff\)",
    ),
    "broken encoding in a line": (
        lambda d: {"sources": [file_of(d, "x.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n')]},
        r"x\.jsonl is not UTF-8 at byte offset 24 \(byte 0xe9\)",
    ),
    "bad JSON": (
        lambda d: {"sources": [file_of(d, "x.jsonl", b'{"text": "a"}\n{"text": \n')]},
        r"x\.jsonl at byte offset 14 is not JSON.*--on-bad-text skip",
    ),
    "deep JSON": (
        lambda d: {"sources": [file_of(d, "x.jsonl", b"[" * 200_000)]},
        r"x\.jsonl at byte offset 0 is not JSON",
    ),
    "JSON list": (
        lambda d: {"sources": [file_of(d, "x.jsonl", b"[1]\n")]},
        r"x\.jsonl at byte offset 0 is a JSON list, not an object",
    ),
    "missing field": (
        lambda d: {"sources": [file_of(d, "x.jsonl", b'{"body": "a", "id": 3}\n')]},
        r"x\.jsonl at byte offset 0 has no text in field 'text'; its fields are 'body', 'id'\. .*--text-field",
    ),
    "field of a number": (
        lambda d: {"sources": [file_of(d, "x.jsonl", b'{"text": 3}\n')]},
        r"x\.jsonl at byte offset 0 has no text in field 'text'; it is int",
    ),
    "half a surrogate": (
        lambda d: {"sources": [file_of(d, "x.jsonl", b'{"text": "\\ud800"}\n')]},
        r"x\.jsonl at byte offset 0 spells half of a surrogate pair",
    ),
    "compressed": (
        lambda d: {"sources": [file_of(d, "x.jsonl.gz", b"..")]},
        r"x\.jsonl\.gz cannot be read: not a gzipped file",
    ),
    "tokenizer nowhere": (
        lambda d: {"tokenizer": str(d / "t.json")},
        r"Tokenizer .*t\.json' does not exist.*train:SIZE",
    ),
    "tokenizer not JSON": (
        lambda d: {"tokenizer": str(file_of(d, "t.json", b"hello"))},
        r"t\.json is not a tokenizer: it is not JSON",
    ),
    "tokenizer of another kind": (
        lambda d: {"tokenizer": str(file_of(d, "t.json", b"{}"))},
        r"t\.json is not a HF tokenizer\.json",
    ),
    "tokenizer broken": (
        lambda d: {"tokenizer": str(file_of(d, "t.json", b'{"model": {"type": "none"}}'))},
        r"t\.json is not a tokenizer that",
    ),
    "folder without tokenizer": (
        lambda d: {"tokenizer": str(folder_of(d))},
        r"should have a tokenizer\.json and has none",
    ),
    "size too small": (lambda d: {"tokenizer": "train:100"}, r"'train:100'.*at least 257"),
    "size no number": (lambda d: {"tokenizer": "train:many"}, r"'train:many'.*must be a number"),
    "fraction": (lambda d: {"validation_fraction": 1.0}, r"fraction is 1\.0.*below 1"),
    "chunk": (lambda d: {"chunk_tokens": 0}, "chunk_tokens is 0"),
    "max bytes": (lambda d: {"max_bytes": 0}, "max_bytes is 0"),
    "bad text choice": (lambda d: {"on_bad_text": "ignore"}, "'ignore'; it must be one of error, skip"),
    "folder in use": (lambda d: {"out_dir": folder_of(d, "there")}, r"exists and is not the corpus of these.*--out"),
    "file in the way": (
        lambda d: {"out_dir": file_of(d, "there", b"")},
        r"exists and is not the corpus of these.*--out",
    ),
}


def file_of(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def folder_of(folder: Path, *names: str) -> Path:
    (folder / "folder").mkdir()
    for name in names:
        (folder / "folder" / name).write_text(name)
    return folder / "folder"


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_clear_error(tmp_path: Path, case: str) -> None:
    make, message = BAD_INPUT[case]
    arguments: dict[str, object] = {
        "sources": [file_of(tmp_path, "good.txt", b"good")],
        "out_dir": tmp_path / "out" / "corpus",
        "tokenizer": "bytes",
    }
    arguments |= make(tmp_path)
    with pytest.raises(CorpusError, match=message) as caught:
        build_corpus(**arguments)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_broken_text_is_left_out_and_counted_where_asked(tmp_path: Path) -> None:
    sources = tmp_path / "s"
    sources.mkdir()
    file_of(sources, "a.txt", b"good")
    file_of(sources, "b.txt", b"\xff")
    file_of(sources, "c.jsonl", b'{"text": "fine"}\nnot json\n{"text": "\xff"}\n')
    manifest = built(build_corpus([sources], tmp_path / "c", "bytes", on_bad_text="skip", validation_fraction=0))
    assert set(documents_of(tmp_path / "c", "train")) == {"a.txt", "c.jsonl@0"}
    assert manifest.build["dropped"] == {"not readable": 3}
    assert "3 not readable" in render_corpus(tmp_path / "c")


class Recorder(NoProgress):
    """Keeps what a build said, and does something at a stage."""

    def __init__(self, at: str = "", do: Callable[[], None] = lambda: None) -> None:
        self.stages: list[str] = []
        self.done: dict[str, tuple[int, int]] = {}
        self._at, self._do = at, do

    def stage(self, name: str, total: int, unit: str, workers: int = 1) -> None:
        self.stages.append(name)
        self.done[name] = (0, total)
        if name == self._at:
            self._do()

    def advance(self, done: int, *counts: Any, **more: Any) -> None:
        before, total = self.done[self.stages[-1]]
        self.done[self.stages[-1]] = (before + done, total)


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path) -> None:
    source = file_of(tmp_path, "a.txt", b"before")
    progress = Recorder("read and tokenize", lambda: file_of(tmp_path, "a.txt", b"longer than before") and None)
    with pytest.raises(CorpusError, match=r"a\.txt changed while"):
        build_corpus([source], tmp_path / "c", "bytes", progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_progress_reaches_its_end(stdlib_sources: Path, tmp_path: Path) -> None:
    progress = Recorder()
    build_corpus([stdlib_sources], tmp_path / "c", "train:300", dedup="near", progress=progress)
    assert progress.stages == [
        "sample text for the tokenizer",
        "read and tokenize",
        "find exact duplicates",
        "find near duplicates",
        "write shards",
    ]
    assert all(done == total > 0 for done, total in progress.done.values())


def test_too_little_room_is_said_before_anything_is_written(
    stdlib_sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("data_tools.build.shutil.disk_usage", lambda path: usage)
    with pytest.raises(StorageError, match=r"No room .* need at least [\d,]+ bytes, 1,000 are free") as caught:
        build_corpus([stdlib_sources], tmp_path / "c", "bytes")
    assert caught.value.exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_the_next_build_goes_on(stdlib_sources: Path, tmp_path: Path) -> None:
    def build(out_dir: Path) -> None:
        build_corpus([stdlib_sources], out_dir, "bytes", validation_fraction=0)

    build(tmp_path / "d")
    shard = (tmp_path / "d" / "train-00000.tar").stat().st_size
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The nearest that an ordinary user has to a full disk: with no room for what is read, then with none for the shard.
    for limit, left in ((100_000, ["d"]), (shard - 1, [".c.building", "d"])):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(StorageError, match=rf"could not be written to .*{os.strerror(errno.EFBIG)}") as caught:
                build(tmp_path / "c")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        assert sorted(path.name for path in tmp_path.iterdir()) == left
        assert ("goes on from there" in str(caught.value)) == (len(left) == 2)
        assert not list(tmp_path.glob(".c.building/**/.tmp-*"))
    build(tmp_path / "c")
    assert files_of(tmp_path / "c") == files_of(tmp_path / "d")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "d"]


def test_two_builds_of_one_corpus_do_not_mix(stdlib_sources: Path, tmp_path: Path) -> None:
    refused: list[str] = []

    def build_again() -> None:
        with pytest.raises(CorpusError, match="Another build") as caught:
            build_corpus([stdlib_sources], tmp_path / "c", "bytes")
        refused.append(str(caught.value))

    build_corpus([stdlib_sources], tmp_path / "c", "bytes", progress=Recorder("write shards", build_again))
    assert refused
    assert verify_corpus(tmp_path / "c") == []


def test_the_same_command_again_finds_the_corpus(stdlib_sources: Path, tmp_path: Path) -> None:
    first = build_corpus([stdlib_sources], tmp_path / "c", "train:300")
    again = build_corpus([stdlib_sources], tmp_path / "c", "train:300")
    assert first is not None
    assert again is not None
    assert (again.manifest, again.statistics) == (first.manifest, None)
    with pytest.raises(CorpusError, match="is not the corpus of these sources and options"):
        build_corpus([stdlib_sources], tmp_path / "c", "train:301")


def test_an_empty_output_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    build_corpus([file_of(tmp_path, "a.txt", b"text")], tmp_path / "c", "bytes")
    assert verify_corpus(tmp_path / "c") == []


@pytest.mark.parametrize("kind", ["flip", "truncate"])
def test_damage_is_noticed_by_verify_and_by_reading(stdlib_sources: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "c"
    build_corpus([stdlib_sources], folder, "bytes", chunk_tokens=40_000, shard_bytes=400_000)
    random_places = random.Random(20)
    shards = sorted(folder.glob("*.tar"))
    assert len(shards) > 2
    for _ in range(50 if kind == "flip" else 20):
        path = random_places.choice(shards)
        whole = path.read_bytes()
        place = random_places.randrange(len(whole))
        bad = bytearray(whole)
        bad[place] ^= 1 << random_places.randrange(8)
        path.write_bytes(bad if kind == "flip" else whole[:place])
        (problem,) = verify_corpus(folder)
        assert path.name in problem
        assert ("damaged" if kind == "flip" else "truncated") in problem
        with pytest.raises(CorpusError, match=rf"{path.name} is (damaged|truncated)"):
            read_all(folder, path.name.split("-")[0])
        if kind == "flip":
            reader = TokenReader(folder, path.name.split("-")[0], verify=False)
            number = int(path.stem.split("-")[1])
            starts = np.where(reader.index.shard == number, reader.index.sample_offset, len(whole) + 1)
            chunk = int(np.flatnonzero(starts <= place)[-1])
            assert f"The first bad chunk is {chunk} " in problem
        path.write_bytes(whole)
    assert verify_corpus(folder) == []


def read_all(folder: Path, split: str) -> None:
    for _ in TokenReader(folder, split, verify=True).chunks():
        pass


@pytest.mark.parametrize("name", ["manifest.json", "train.index", "tokenizer.json"])
def test_damage_beside_the_shards_is_noticed(stdlib_sources: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "c"
    build_corpus([stdlib_sources], folder, "train:300", chunk_tokens=20_000)
    path = folder / name
    whole = path.read_bytes()
    random_places = random.Random(3)
    for _ in range(15):
        bad = bytearray(whole)
        bad[random_places.randrange(len(whole))] ^= 1 << random_places.randrange(8)
        path.write_bytes(bad)
        problems = verify_corpus(folder)
        assert problems
        assert name in problems[0]
    path.unlink()
    assert name in verify_corpus(folder)[0]


def test_a_missing_shard_is_named(stdlib_sources: Path, tmp_path: Path) -> None:
    build_corpus([stdlib_sources], tmp_path / "c", "bytes")
    (tmp_path / "c" / "train-00000.tar").unlink()
    assert "train-00000.tar cannot be read" in verify_corpus(tmp_path / "c")[0]
    with pytest.raises(CorpusError, match=r"train-00000\.tar cannot be read"):
        TokenReader(tmp_path / "c", "train").window(0, 8)


def test_verify_checks_content_and_not_only_hashes(stdlib_sources: Path, tmp_path: Path) -> None:
    """A builder's fault: all hashes fit, and the tokens are not the tokenizer's."""
    write_corpus(tmp_path, {"train": [np.array([5, 300])]}, end_of_text=9)
    problems = verify_corpus(tmp_path)
    assert len(problems) == 2
    assert "token 300 is not among the tokenizer's 257 ids" in problems[0]
    assert "does not end with the end-of-text id" in problems[1]
