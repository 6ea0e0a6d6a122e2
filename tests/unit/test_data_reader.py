"""Reading a corpus: every window is its piece of the stream, batches follow the order, errors reach the caller."""

import json
import random
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.build import build_corpus
from gptdist.data import mapped_shards
from gptdist.data.blend import BlendOrder, Phase
from gptdist.data.chunk_index import ChunkIndex, ChunkRecord, index_bytes, render_index
from gptdist.data.loader import BatchLoader, LoadedBatch, held_out_batches
from gptdist.data.manifest import Manifest
from gptdist.data.order import WindowOrder, micro_batches
from gptdist.data.reader import TokenReader
from gptdist.data.samples import SampleSource
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.errors import ConfigError, CorpusError

CONTEXT = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small chunks and shards, so that windows cross both."""
    folder = tmp_path_factory.mktemp("corpus")
    source = Path(sysconfig.get_paths()["stdlib"]) / "json"
    lines = [line for path in sorted(source.glob("*.py")) for line in path.read_text().splitlines() if line.strip()]
    (folder / "lines.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    build_corpus(
        [folder / "lines.jsonl"], folder / "c", "bytes", chunk_tokens=300, shard_bytes=20_000, validation_fraction=0.1
    )
    return folder / "c"


@pytest.fixture(scope="module")
def reader(corpus: Path) -> TokenReader:
    return TokenReader(corpus, "train")


@pytest.fixture(scope="module")
def stream(corpus: Path) -> np.ndarray:
    return np.concatenate(list(TokenReader(corpus, "train").chunks())).astype(np.int64)


@given(st.integers(1, 3000), st.data())
@settings(deadline=None)
def test_a_window_is_its_piece_of_the_stream(
    reader: TokenReader, stream: np.ndarray, context: int, data: st.DataObject
) -> None:
    windows = reader.num_windows(context)
    assert windows * context + 1 <= len(stream) < (windows + 1) * context + 1
    index = data.draw(st.integers(0, windows - 1))
    window = reader.window(index, context)
    assert window.dtype == np.int64
    assert np.array_equal(window, stream[index * context : (index + 1) * context + 1])
    out = np.full(context + 1, -1, dtype=np.int64)
    assert reader.window(index, context, out=out) is out
    assert np.array_equal(out, window)


def test_windows_cover_the_stream(reader: TokenReader, stream: np.ndarray) -> None:
    assert len(reader.index) > 50
    assert len(reader.manifest.split("train").shards) > 5
    windows = np.stack([reader.window(index, CONTEXT) for index in range(reader.num_windows(CONTEXT))])
    assert np.array_equal(windows[:, :-1].ravel(), stream[: windows.shape[0] * CONTEXT])
    assert np.array_equal(windows[:, 1:].ravel(), stream[1 : windows.shape[0] * CONTEXT + 1])


def test_few_shards_stay_open(corpus: Path, stream: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped_shards, "MAX_OPEN_SHARDS", 2)
    reader = TokenReader(corpus, "train")
    order = WindowOrder(1, reader.num_windows(CONTEXT))
    for window in order.windows(0, 200).tolist():
        assert np.array_equal(reader.window(window, CONTEXT), stream[window * CONTEXT : (window + 1) * CONTEXT + 1])
        assert len(reader._shards) <= 2


@pytest.mark.parametrize("index", [-1, 10**9])
def test_a_window_that_is_not_there_is_refused(reader: TokenReader, index: int) -> None:
    with pytest.raises(IndexError, match=str(index)):
        reader.window(index, CONTEXT)


def test_too_few_tokens_say_how_many_there_are(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789")
    build_corpus([tmp_path / "a.txt"], tmp_path / "c", "bytes")
    train = TokenReader(tmp_path / "c", "train")
    assert train.num_windows(10) == 1
    with pytest.raises(
        CorpusError, match=r"train split .* holds 11 tokens; .* 11 needs 12\. Set .* at most 10, or build"
    ):
        train.num_windows(11)
    with pytest.raises(CorpusError, match=r"validation split .* holds 0 tokens.*--validation-fraction"):
        TokenReader(tmp_path / "c", "validation").num_windows(4)
    with pytest.raises(CorpusError, match="no split 'test'; it has train, validation"):
        TokenReader(tmp_path / "c", "test")


def test_a_folder_that_is_no_corpus_is_said_to_be_none(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"nowhere is not a corpus: it does not exist\. Build one with `gptdist data"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(CorpusError, match=r"it has no manifest\.json"):
        Manifest.load(tmp_path)
    whole = (corpus / "manifest.json").read_text()
    changes: dict[str, tuple[str, str]] = {
        "is not JSON": (whole, whole[:-20]),
        "format is 'tar'": ("gptdist-corpus", "tar"),
        "format version 1": ('"version": 2', '"version": 1'),
        "checksum does not fit": ('"vocab_size": 257', '"vocab_size": 258'),
    }
    for message, (old, new) in changes.items():
        (tmp_path / "manifest.json").write_text(whole.replace(old, new, 1))
        with pytest.raises(CorpusError, match=message):
            Manifest.load(tmp_path)


def test_a_manifest_cannot_point_outside(corpus: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(corpus)
    for name in ("../train-00000.tar", "/etc/passwd", "a\\b", "..", ""):
        content = manifest.render().replace(b"train-00000.tar", json.dumps(name)[1:-1].encode())
        (tmp_path / "manifest.json").write_bytes(resealed(content))
        with pytest.raises(CorpusError, match="plain name"):
            Manifest.load(tmp_path)
    for old, new in ((b'"tokens": ', b'"tokens": -'), (b'"dtype": "uint16"', b'"dtype": "object"')):
        (tmp_path / "manifest.json").write_bytes(resealed(manifest.render().replace(old, new, 1)))
        with pytest.raises(CorpusError, match="damaged"):
            Manifest.load(tmp_path)


def resealed(content: bytes) -> bytes:
    """The manifest with a checksum that fits again."""
    import hashlib

    blank = content.replace(json.loads(content)["checksum"].encode(), b"0" * 64)
    return blank.replace(b"0" * 64, hashlib.sha256(blank).hexdigest().encode(), 1)


def test_a_manifest_comes_back_as_it_was(corpus: Path) -> None:
    manifest = Manifest.load(corpus)
    assert manifest.render() == (corpus / "manifest.json").read_bytes()


def test_an_index_of_another_corpus_is_refused(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "i").write_bytes(render_index([ChunkRecord(5, 1, 0, 0, 512, 7)]))
    assert (tmp_path / "i").stat().st_size == index_bytes(1)
    index = ChunkIndex.open(tmp_path / "i", 1, 5, 1)
    assert (index.token_start.tolist(), index.document_start.tolist(), index.digest.tolist()) == ([0, 5], [0, 1], [7])
    for numbers in ((2, 5, 1), (1, 6, 1), (1, 5, 2)):
        with pytest.raises(CorpusError, match="not the index that the corpus's manifest describes"):
            ChunkIndex.open(tmp_path / "i", *numbers)
    with (tmp_path / "i").open("ab") as file:
        file.write(b"x")
    with pytest.raises(CorpusError, match=f"is {index_bytes(1) + 1} bytes; with 1 chunks it must be {index_bytes(1)}"):
        ChunkIndex.open(tmp_path / "i", 1, 5, 1)


def test_no_flipped_bit_of_an_index_changes_a_window_silently(corpus: Path, stream: np.ndarray, tmp_path: Path) -> None:
    for path in corpus.iterdir():
        if path.name != "train.index":
            (tmp_path / path.name).symlink_to(path)
    whole = (corpus / "train.index").read_bytes()
    places = random.Random(8)
    noticed = 0
    for _ in range(60):
        bad = bytearray(whole)
        bad[places.randrange(len(whole))] ^= 1 << places.randrange(8)
        (tmp_path / "train.index").write_bytes(bad)
        try:
            reader = TokenReader(tmp_path, "train")
            for window in range(reader.num_windows(CONTEXT)):
                expected = stream[window * CONTEXT : (window + 1) * CONTEXT + 1]
                assert np.array_equal(reader.window(window, CONTEXT), expected)
        except CorpusError:
            noticed += 1
    assert noticed > 30  # the rest fell on what training does not read: where documents start


def make_loader(reader: TokenReader, micro: int, data_rank: int, data_size: int, prefetch: int = 2) -> BatchLoader:
    return BatchLoader(source_of(reader), micro, data_rank, data_size, prefetch)


def source_of(reader: TokenReader) -> SampleSource:
    order = WindowOrder(77, reader.num_windows(CONTEXT))
    return SampleSource({"c": reader}, {"c": order}, BlendOrder([Phase(0, (("c", 1),))]), CONTEXT)


def ramp(consumed: int) -> int:
    return 6 if consumed < 24 else 12


@pytest.mark.parametrize(("micro", "data_size"), [(1, 1), (2, 1), (1, 2), (3, 2), (1, 3), (2, 3), (1, 6)])
def test_batches_follow_the_order_and_the_ramp(corpus: Path, reader: TokenReader, micro: int, data_size: int) -> None:
    order = WindowOrder(77, reader.num_windows(CONTEXT))
    loaders = [make_loader(TokenReader(corpus, "train"), micro, rank, data_size) for rank in range(data_size)]
    for loader in loaders:
        loader.start(0, ramp)
    first = 0
    for size in (6, 6, 6, 6, 12, 12):
        batches = [loader.next() for loader in loaders]
        assert {(batch.first_sample, batch.global_batch_size) for batch in batches} == {(first, size)}
        assert all(batch.tokens.dtype == torch.int64 and batch.wait_seconds >= 0 for batch in batches)
        together = torch.stack([batch.tokens for batch in batches], dim=1).reshape(size, CONTEXT + 1)
        expected = [reader.window(window, CONTEXT) for window in order.windows(first, size).tolist()]
        assert np.array_equal(together.numpy(), np.stack(expected))
        first += size
    for loader in loaders:
        loader.close()


def test_a_loader_goes_on_from_any_sample(corpus: Path) -> None:
    def some(first: int, count: int) -> list[LoadedBatch]:
        loader.start(first, lambda consumed: 4)
        return [loader.next() for _ in range(count)]

    loader = make_loader(TokenReader(corpus, "train"), 2, 0, 2)
    whole = some(0, 8)
    again = some(16, 4)
    assert [batch.first_sample for batch in again] == [16, 20, 24, 28]
    assert all(torch.equal(one.tokens, two.tokens) for one, two in zip(whole[4:], again, strict=True))
    far = some(10**12, 1)[0]
    reader = TokenReader(corpus, "train")
    window = WindowOrder(77, reader.num_windows(CONTEXT)).window(10**12)[1]
    assert np.array_equal(far.tokens[0, 0].numpy(), reader.window(window, CONTEXT))
    loader.close()


def test_closing_does_not_wait_for_room(corpus: Path) -> None:
    loader = make_loader(TokenReader(corpus, "train"), 1, 0, 1, prefetch=1)
    loader.start(0, lambda consumed: 1)
    time.sleep(0.05)
    started = time.perf_counter()
    loader.close()
    assert time.perf_counter() - started < 5
    loader.close()
    with pytest.raises(RuntimeError, match="before start"):
        loader.next()


def test_errors_in_the_thread_are_raised_in_next(corpus: Path, tmp_path: Path) -> None:
    loader = make_loader(TokenReader(corpus, "train"), 2, 0, 2)
    loader.start(0, lambda consumed: 4 if consumed < 8 else 5)
    assert [loader.next().first_sample for _ in range(2)] == [0, 4]
    for _ in range(2):
        with pytest.raises(ConfigError, match="global batch size"):
            loader.next()
    loader.close()

    for path in corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    shard = tmp_path / "train-00001.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    loader = make_loader(TokenReader(tmp_path, "train"), 1, 0, 1)
    loader.start(0, lambda consumed: 500)
    with pytest.raises(CorpusError, match=r"train-00001\.tar is truncated"):
        loader.next()
    loader.close()


def test_a_loader_that_cannot_be_right_is_refused(reader: TokenReader) -> None:
    order = WindowOrder(0, reader.num_windows(CONTEXT))
    with pytest.raises(ValueError, match="data_rank 2 is not one of 2"):
        BatchLoader(source_of(reader), 1, 2, 2)
    with pytest.raises(ValueError, match="the order is over"):
        SampleSource({"c": reader}, {"c": order}, BlendOrder([Phase(0, (("c", 1),))]), CONTEXT + 1)


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_held_out_windows_do_not_depend_on_the_ranks(corpus: Path, samples: int, micro: int, data_size: int) -> None:
    reader = TokenReader(corpus, "validation", verify=False)
    windows = reader.num_windows(CONTEXT)
    ranks = [list(held_out_batches(reader, CONTEXT, samples, micro, rank, data_size)) for rank in range(data_size)]
    assert len({len(batches) for batches in ranks}) == 1
    rows: list[tuple[int, ...]] = []
    for batches in zip(*ranks, strict=True):
        for tokens, real in batches:
            assert tokens.shape == (micro, CONTEXT + 1)
            assert (tokens.dtype, real.dtype) == (torch.int64, torch.bool)
            rows.extend(tuple(row) for row in tokens[real].tolist())
    count = min(samples, windows)
    expected = [index * windows // count for index in range(count)]
    assert len(set(expected)) == count
    assert rows == [tuple(reader.window(window, CONTEXT).tolist()) for window in expected]


def test_held_out_windows_cover_a_small_split(corpus: Path) -> None:
    reader = TokenReader(corpus, "validation")
    windows = reader.num_windows(CONTEXT)
    batches = list(held_out_batches(reader, CONTEXT, 10**9, 4, 0, 1))
    tokens = torch.cat([tokens[real] for tokens, real in batches])
    assert tokens[:, :-1].flatten().tolist() == [
        token for window in range(windows) for token in reader.window(window, CONTEXT)[:-1].tolist()
    ]
    with pytest.raises(ConfigError, match="0 samples"):
        next(held_out_batches(reader, CONTEXT, 0, 4, 0, 1))


@pytest.mark.parametrize("spec", ["bytes", "train:300"])
@pytest.mark.parametrize("text", ["", "plain", "é 日本 🙂\r\n\ttab  two", "<|endoftext|> is text", "\x00\x7f"])
def test_text_survives_the_tokenizer(tmp_path: Path, spec: str, text: str) -> None:
    (tmp_path / "a.txt").write_text("some words to learn merges from, some words " * 20)
    build_corpus([tmp_path / "a.txt"], tmp_path / "c", spec)
    tokenizer = CorpusTokenizer.load(tmp_path / "c")
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_text not in ids
    assert all(0 <= index < tokenizer.vocab_size for index in ids)
    assert tokenizer.decode([*ids, tokenizer.end_of_text]) == text
    assert CorpusTokenizer.load(tmp_path / "c" / "tokenizer.json").sha256 == tokenizer.sha256
    assert tokenizer.sha256 == Manifest.load(tmp_path / "c").tokenizer.sha256


def test_broken_bytes_decode_to_the_replacement_character() -> None:
    assert CorpusTokenizer.of_bytes().decode([104, 105, 0xE9, 256]) == "hi\ufffd"


def test_a_tokenizer_that_is_not_the_corpuss_is_refused(corpus: Path, tmp_path: Path) -> None:
    for path in corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes() + b" ")
    with pytest.raises(CorpusError, match="not the tokenizer that the corpus was built with: its sha256"):
        CorpusTokenizer.load(tmp_path)


def hf_file(folder: Path, change: Callable[[dict[str, object]], None]) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2, "<end>": 70_000}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.add_special_tokens(["<end>"])
    fields = json.loads(tokenizer.to_str())
    change(fields)
    (folder / "tokenizer.json").write_text(json.dumps(fields))
    return folder


def test_another_tokenizer_and_its_end_of_text(tmp_path: Path) -> None:
    folder = hf_file(tmp_path, lambda fields: None)
    (tmp_path / "a.txt").write_text("a b a b a")
    with pytest.raises(CorpusError, match=r"none of the usual end-of-text tokens \(<\|endoftext\|>.*--end-of-text"):
        build_corpus([tmp_path / "a.txt"], tmp_path / "c", str(folder))
    with pytest.raises(CorpusError, match="no token '<stop>' to end documents"):
        build_corpus([tmp_path / "a.txt"], tmp_path / "c", str(folder), end_of_text="<stop>")
    build_corpus([tmp_path / "a.txt"], tmp_path / "c", str(folder), end_of_text="<end>")
    manifest = Manifest.load(tmp_path / "c")
    assert (manifest.dtype, manifest.tokenizer.vocab_size) == ("uint32", 70_001)
    reader = TokenReader(tmp_path / "c", "train")
    assert next(reader.chunks()).tolist() == [0, 1, 0, 1, 0, 70_000]  # not cut off after two
    assert CorpusTokenizer.load(tmp_path / "c").end_of_text == 70_000
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    build_corpus([tmp_path / "a.txt"], tmp_path / "d", str(folder))
    assert Manifest.load(tmp_path / "d").tokenizer.end_of_text == 70_000
    for name in ("train-00000.tar", "train.index", "tokenizer.json"):
        assert (tmp_path / "c" / name).read_bytes() == (tmp_path / "d" / name).read_bytes()


def test_micro_batches_are_what_the_loader_reads(corpus: Path) -> None:
    reader = TokenReader(corpus, "train")
    order = WindowOrder(77, reader.num_windows(CONTEXT))
    loader = make_loader(reader, 3, 1, 2)
    loader.start(12, lambda consumed: 12)
    tokens = loader.next().tokens
    loader.close()
    windows = order.windows_of(micro_batches(12, 12, 3, 1, 2))
    assert windows.shape == (2, 3)
    assert np.array_equal(tokens[1, 2].numpy(), reader.window(int(windows[1, 2]), CONTEXT))
