"""Damaged, cut and forged shards: none passes verify, none trains silently; what is lost beside the tars is rebuilt."""

import hashlib
import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data_tools.build import build_corpus
from data_tools.corpus.index import rebuild_index
from data_tools.corpus.shards import npy_header, write_shard
from data_tools.corpus.show import render_corpus
from data_tools.corpus.tar_members import ShardFile
from data_tools.corpus.verify import verify_corpus
from gptdist.data.chunk_index import ChunkIndex, ChunkRecord, render_index
from gptdist.data.manifest import IndexInfo, Manifest, SplitInfo, TokenizerInfo
from gptdist.data.reader import TokenReader
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.errors import CorpusError
from launch.cli import main

SEQUENCE_LENGTH = 32
TEXTS = [f"Document {number}, é 漢字 {'and on ' * (number % 23)}\n\n it ends." for number in range(260)]


def byte_level_tokenizer() -> CorpusTokenizer:
    """A BPE with an end of text whose name nobody would guess, and a token that was added as plain text."""
    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<over>"], initial_alphabet=alphabet, show_progress=False
    )
    hf.train_from_iterator(TEXTS, trainer)
    hf.add_tokens([" é 漢"])
    return CorpusTokenizer.parse(hf.to_str().encode(), "a test", "<over>")


def write_corpus(folder: Path, tokenizer: CorpusTokenizer, splits: dict[str, list[list[str]]]) -> Manifest:
    """A corpus of the given texts: per split, per shard. Made without the code that rebuilds one."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = "uint16" if tokenizer.vocab_size < 1 << 16 else "uint32"
    infos: dict[str, SplitInfo] = {}
    for split, shards in splits.items():
        written = []
        for number, texts in enumerate(shards):
            name = f"{split}-{number:05d}"
            ids = [np.append(found, tokenizer.end_of_text) for found in tokenizer.encode_documents(texts)]
            named = [(f"{name}/{place}.txt", found.astype(dtype)) for place, found in enumerate(ids)]
            written.append(write_shard(folder / f"{name}.tar", name, named, 700, np.dtype(dtype)))
        records = [
            ChunkRecord(int(row[0]), int(row[1]), number, int(row[2]), int(row[3]), int(row[4]))
            for number, shard in enumerate(written)
            for row in shard.chunks
        ]
        index = render_index(records)
        (folder / f"{split}.index").write_bytes(index)
        infos[split] = SplitInfo(
            tokens=sum(shard.info.tokens for shard in written),
            documents=sum(shard.info.documents for shard in written),
            text_bytes=sum(len(text.encode()) for texts in shards for text in texts),
            index=IndexInfo(f"{split}.index", len(index), hashlib.sha256(index).hexdigest()),
            shards=tuple(shard.info for shard in written),
        )
    info = TokenizerInfo(
        tokenizer.kind, "tokenizer.json", tokenizer.sha256, tokenizer.vocab_size, tokenizer.end_of_text
    )
    manifest = Manifest(info, dtype, infos, {"seed": 5})
    (folder / "tokenizer.json").write_bytes(tokenizer.content)
    (folder / "manifest.json").write_bytes(manifest.render())
    return manifest


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "pristine"
    splits = {"train": [TEXTS[:70], TEXTS[70:140], TEXTS[140:210]], "validation": [TEXTS[210:]]}
    write_corpus(folder, byte_level_tokenizer(), splits)
    assert verify_corpus(folder) == []
    return folder


@pytest.fixture
def corpus(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "corpus"))


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def all_windows(folder: Path) -> dict[str, list[list[int]]]:
    """Every window of every split, as training reads them."""
    windows: dict[str, list[list[int]]] = {}
    for split in ("train", "validation"):
        reader = TokenReader(folder, split, verify=True)
        count = reader.num_windows(SEQUENCE_LENGTH)
        windows[split] = [reader.window(number, SEQUENCE_LENGTH).tolist() for number in range(count)]
    return windows


def chunk_at(folder: Path, shard: Path, place: int) -> tuple[int, int, int]:
    """The chunk whose bytes hold byte `place` of `shard`, and where it begins and ends."""
    manifest = Manifest.load(folder)
    split, number = shard.stem.split("-")
    info = manifest.split(split)
    index = ChunkIndex.open(folder / info.index.file, info.chunks, info.tokens, info.documents)
    size = info.shards[int(number)].bytes
    for chunk in np.flatnonzero(index.shard == int(number)).tolist():
        start, end = int(index.sample_offset[chunk]), index.sample_end(chunk, size)
        if start <= place < end:
            return chunk, start, end
    raise AssertionError("every byte of a shard belongs to a chunk")


@pytest.mark.parametrize(("kind", "count"), [("flip", 200), ("truncate", 30)])
def test_no_damage_passes_verify_or_trains_silently(corpus: Path, kind: str, count: int) -> None:
    """Every byte of a shard belongs to a chunk's digest, tar headers and padding too, and every chunk holds tokens that
    some window reads: so each flip must be noticed by both.
    """
    places = random.Random(f"gptdist damage {kind}")
    shards = sorted(corpus.glob("*.tar"))
    sizes = [path.stat().st_size for path in shards]
    expected = all_windows(corpus)
    for _ in range(count):
        (path,) = places.choices(shards, sizes)
        whole = path.read_bytes()
        place = places.randrange(len(whole))
        bad = bytearray(whole)
        bad[place] ^= 1 << places.randrange(8)
        path.write_bytes(bad if kind == "flip" else whole[:place])
        (problem,) = verify_corpus(corpus)
        chunk, start, end = chunk_at(corpus, path, place)
        assert f"Shard {path} is {'damaged' if kind == 'flip' else 'truncated'}" in problem
        assert f"The first bad chunk is {chunk} " in problem
        assert f"bytes {start:,} to {end:,}" in problem
        with pytest.raises(CorpusError, match=rf"{path.name} is (damaged|truncated)"):
            all_windows(corpus)
        path.write_bytes(whole)
    assert verify_corpus(corpus) == []
    assert all_windows(corpus) == expected


def test_bytes_after_a_shard_are_damage(corpus: Path) -> None:
    path = corpus / "train-00001.tar"
    path.write_bytes(path.read_bytes() + bytes(512))
    assert "train-00001.tar is too long" in verify_corpus(corpus)[0]
    with pytest.raises(CorpusError, match=r"train-00001\.tar is not the file that was built"):
        all_windows(corpus)


def test_any_number_of_workers_finds_the_same(corpus: Path) -> None:
    for name, place in (("train-00000.tar", 5000), ("train-00002.tar", 9000), ("validation-00000.tar", 700)):
        bad = bytearray((corpus / name).read_bytes())
        bad[place] ^= 4
        (corpus / name).write_bytes(bad)
    (corpus / "train-00001.tar").unlink()
    (corpus / "tokenizer.json").write_bytes(b"{}")
    (corpus / "validation.index").write_bytes(b"")
    (corpus / "train-00009.tar").write_bytes(b"")
    alone = verify_corpus(corpus)
    assert [
        next(word for word in ("tokenizer.json", ".index", "00000", "00001", "00002", "00009") if word in problem)
        for problem in alone
    ] == ["tokenizer.json", "00000", "00001", "00002", ".index", "00000", "00009"]
    assert verify_corpus(corpus, workers=2) == alone


def make_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for info, content in members:
            info.size = len(content) if info.type == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(content))


def member(name: str, content: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def npy_bytes(array: np.ndarray) -> bytes:
    return npy_header(array) + array.tobytes()


PICKLED = io.BytesIO()
np.save(PICKLED, np.array([{"a": 1}], dtype=object), allow_pickle=True)
DOCS, KEYS = member("a.docs.npy", npy_bytes(np.array([2]))), member("a.json", b'{"documents": ["k"]}')
TOKENS = member("a.tokens.npy", npy_bytes(np.array([1, 2], dtype=np.uint16)))
GOOD = [DOCS, KEYS, TOKENS]

FORGED: dict[str, tuple[list[tuple[tarfile.TarInfo, bytes]], str]] = {
    "repeated": ([*GOOD, member("a.docs.npy")], "member a.docs.npy is there twice"),
    "absolute": ([member("/a.docs.npy")], "'/a.docs.npy' is none of KEY.docs.npy, KEY.json, KEY.tokens.npy"),
    "parent": ([member("../a.docs.npy")], "'../a.docs.npy' is none of"),
    "in a folder": ([member("f/a.docs.npy")], "'f/a.docs.npy' is none of"),
    "hidden": ([member(".json")], "'.json' is none of"),
    "a dot in the key": ([member("a.b.json")], "'a.b.json' is none of"),
    "a line end in the name": ([member("a.json\n")], r"'a.json\n' is none of"),
    "symbolic link": ([member("a.docs.npy", type=tarfile.SYMTYPE, linkname="/etc/passwd")], "is a symbolic link"),
    "hard link": ([member("a.docs.npy", type=tarfile.LNKTYPE, linkname="a.json")], "is a hard link"),
    "device": ([member("a.docs.npy", type=tarfile.CHRTYPE)], "is a device"),
    "pipe": ([member("a.docs.npy", type=tarfile.FIFOTYPE)], "is a pipe"),
    "folder": ([member("a.docs.npy", type=tarfile.DIRTYPE)], "is a folder"),
    "sparse": ([member("a.docs.npy", type=tarfile.GNUTYPE_SPARSE)], "is a sparse file"),
    "unknown type": ([member("a.docs.npy", type=b"Q")], "is not a plain file"),
    "link in a plain file": ([member("a.docs.npy", linkname="/etc/passwd")], "is not a plain file"),
    "pyd": ([*GOOD, member("b.pyd")], "'b.pyd' is none of"),
    "pickle": ([*GOOD, member("b.pickle")], "'b.pickle' is none of"),
    "pkl": ([*GOOD, member("b.pkl")], "'b.pkl' is none of"),
    "pt": ([*GOOD, member("b.pt")], "'b.pt' is none of"),
    "npy of another name": ([*GOOD, member("b.npy")], "'b.npy' is none of"),
    "order": ([KEYS, DOCS, TOKENS], "a.json stands where KEY.docs.npy should"),
    "two chunks mixed": ([DOCS, member("b.json")], "b.json stands where a.json should"),
    "half a chunk": ([DOCS, KEYS], "chunk a has no tokens.npy"),
    "pickled array": ([DOCS, KEYS, member("a.tokens.npy", PICKLED.getvalue())], "a.tokens.npy is a pickled array"),
    "no array": ([DOCS, KEYS, member("a.tokens.npy", b"hello")], "a.tokens.npy is not an array"),
    "array too short": ([DOCS, KEYS, (TOKENS[0], TOKENS[1][:-1])], "a.tokens.npy has 131 bytes; 2 of <u2"),
    "signed tokens": ([DOCS, KEYS, member("a.tokens.npy", npy_bytes(np.array([1])))], "holds <i8 (1,), not a row of"),
    "keys no list": ([DOCS, member("a.json", b'{"documents": 3}'), TOKENS], "a.json does not list"),
    "keys no JSON": ([DOCS, member("a.json", b"{"), TOKENS], "a.json does not list"),
    "keys deep": ([DOCS, member("a.json", b"[" * 100_000), TOKENS], "a.json does not list"),
}


def read_whole(path: Path) -> None:
    with ShardFile(path) as shard:
        for chunk in shard.chunks():
            shard.content(chunk)


@pytest.mark.parametrize("case", FORGED)
def test_forged_tars_are_refused(tmp_path: Path, case: str) -> None:
    members, message = FORGED[case]
    path = tmp_path / "train-00000.tar"
    make_tar(path, [(replace_name(info), content) for info, content in members])
    with pytest.raises(CorpusError) as caught:
        read_whole(path)
    assert message in str(caught.value)
    assert f"Shard {path}, byte " in str(caught.value)


def replace_name(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """A copy: writing a tar sets sizes."""
    copy = tarfile.TarInfo(info.name)
    copy.type, copy.linkname = info.type, info.linkname
    return copy


def test_a_good_tar_is_read(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", [(replace_name(info), content) for info, content in GOOD])
    read_whole(tmp_path / "a.tar")


def test_headers_that_change_other_headers_are_refused(tmp_path: Path) -> None:
    info, content = member("a.docs.npy", pax_headers={"size": "3", "path": "../b"})
    make_tar(tmp_path / "pax.tar", [(info, content)], tarfile.PAX_FORMAT)
    with pytest.raises(CorpusError, match=r"byte 0: member .* is a pax header"):
        read_whole(tmp_path / "pax.tar")
    make_tar(tmp_path / "gnu.tar", [member("a" * 200 + ".json")], tarfile.GNU_FORMAT)
    with pytest.raises(CorpusError, match=r"byte 0: member .* is a GNU header for a long name"):
        read_whole(tmp_path / "gnu.tar")
    with tarfile.open(tmp_path / "global.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"path": "x"}) as tar:
        tar.addfile(replace_name(DOCS[0]))
    with pytest.raises(CorpusError, match="is a pax header"):
        read_whole(tmp_path / "global.tar")


@pytest.mark.parametrize("size", [-1, 1 << 40, 1 << 70])
def test_a_size_that_is_not_in_the_shard_is_refused(tmp_path: Path, size: int) -> None:
    info = tarfile.TarInfo("a.docs.npy")
    info.size = size
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(CorpusError, match="ends beyond the shard"):
        read_whole(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tar: tar[:-1024].rstrip(b"\0"), "a.tokens.npy of 132 bytes ends beyond the shard|no end"),
        (lambda tar: tar + b"more", "after the end"),
        (lambda tar: tar[:700] + b"!" + tar[701:], "between a.docs.npy and the next member"),
        (lambda tar: b"", "no end"),
        (lambda tar: b"no tar" * 200, "no tar header"),
    ],
)
def test_what_is_between_and_after_members(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "a.tar"
    make_tar(path, [(replace_name(info), content) for info, content in GOOD])
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CorpusError, match=message):
        read_whole(path)


def test_a_forged_member_is_found_though_all_hashes_fit(corpus: Path) -> None:
    """Whoever forges a shard can forge the manifest as well."""
    path = corpus / "validation-00000.tar"
    with tarfile.open(path, "a") as tar:
        tar.addfile(*[member("a.pyd")[0]])
    manifest = Manifest.load(corpus)
    info = manifest.split("validation")
    forged = replace(info.shards[0], bytes=path.stat().st_size, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    splits = {**manifest.splits, "validation": replace(info, shards=(forged,))}
    (corpus / "manifest.json").write_bytes(replace(manifest, splits=splits).render())
    (problem,) = verify_corpus(corpus)
    assert "member 'a.pyd' is none of" in problem


LOST: dict[str, tuple[tuple[str, ...], bool]] = {
    "an index": (("train.index",), True),
    "both indexes": (("train.index", "validation.index"), True),
    "the manifest": (("manifest.json",), False),
    "all but tars and tokenizer": (("manifest.json", "train.index", "validation.index"), False),
}


@pytest.mark.parametrize(("case", "workers"), [*((case, 1) for case in LOST), ("all but tars and tokenizer", 2)])
def test_lost_files_are_made_again(corpus: Path, pristine: Path, case: str, workers: int) -> None:
    names, build_is_known = LOST[case]
    for name in names:
        (corpus / name).unlink()
    rebuilt = rebuild_index(corpus, workers)
    expected = files_of(pristine)
    if not build_is_known:
        assert rebuilt.build == {"rebuilt": True}
        expected["manifest.json"] = replace(Manifest.load(pristine), build={"rebuilt": True}).render()
    assert files_of(corpus) == expected
    assert rebuilt == Manifest.load(corpus)
    assert verify_corpus(corpus) == []


def test_numbers_left_out_are_recorded(corpus: Path, pristine: Path) -> None:
    """A shard that would have been empty is not written, so a gap alone proves no loss."""
    for name in ("manifest.json", "train.index", "train-00001.tar"):
        (corpus / name).unlink()
    rebuilt = rebuild_index(corpus)
    assert rebuilt.build == {"rebuilt": True, "absent_shards": ["train-00001.tar"]}
    first, _, last = Manifest.load(pristine).split("train").shards
    assert tuple(rebuilt.split("train").shards) == (first, last)
    assert verify_corpus(corpus) == []
    assert main(["data", "index", str(corpus)]) == 0


@pytest.mark.parametrize("name", ["manifest.json", "train.index"])
def test_damaged_files_are_made_again(corpus: Path, pristine: Path, name: str) -> None:
    whole = (corpus / name).read_bytes()
    (corpus / name).write_bytes(whole[: len(whole) // 2])
    rebuild_index(corpus)
    assert (corpus / "train.index").read_bytes() == (pristine / "train.index").read_bytes()
    assert verify_corpus(corpus) == []


@pytest.mark.parametrize("tokenizer", ["bytes", "words"])
def test_the_bytes_of_text_are_counted_from_the_tokens(tmp_path: Path, tokenizer: str) -> None:
    if tokenizer == "bytes":
        made = CorpusTokenizer.of_bytes()
    else:
        # Not byte-level: every document is decoded.
        words = {word: number for number, word in enumerate(sorted({w for text in TEXTS for w in text.split()}))}
        hf = Tokenizer(models.WordLevel({**words, "</s>": len(words)}, unk_token="</s>"))
        hf.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        hf.add_special_tokens(["</s>"])
        made = CorpusTokenizer.parse(hf.to_str().encode(), "a test")
    texts = [" ".join(text.split()) for text in TEXTS]
    manifest = write_corpus(tmp_path / "c", made, {"train": [texts], "validation": []})
    for name in ("manifest.json", "train.index", "validation.index"):
        (tmp_path / "c" / name).unlink()
    assert rebuild_index(tmp_path / "c").splits == manifest.splits


def test_a_built_corpus_is_made_again(tmp_path: Path) -> None:
    """What `data build` writes, not the corpus of this file."""
    for number, text in enumerate(TEXTS):
        path = tmp_path / "sources" / f"{number}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    build_corpus([tmp_path / "sources"], tmp_path / "c", "train:300", chunk_tokens=1000, shard_bytes=4000)
    before = files_of(tmp_path / "c")
    assert len([name for name in before if name.endswith(".tar")]) > 3
    for name in ("train.index", "validation.index"):
        (tmp_path / "c" / name).unlink()
    rebuild_index(tmp_path / "c")
    assert files_of(tmp_path / "c") == before
    built = Manifest.load(tmp_path / "c")
    for name in ("manifest.json", "train.index", "validation.index"):
        (tmp_path / "c" / name).unlink()
    rebuilt = rebuild_index(tmp_path / "c")
    assert (rebuilt.tokenizer, rebuilt.dtype, rebuilt.splits) == (built.tokenizer, built.dtype, built.splits)
    assert verify_corpus(tmp_path / "c") == []


def damage_tar(corpus: Path) -> None:
    path = corpus / "train-00001.tar"
    bad = bytearray(path.read_bytes())
    bad[-20_000] ^= 1
    path.write_bytes(bad)


def damage_tar_without_manifest(corpus: Path) -> None:
    damage_token(corpus)
    (corpus / "manifest.json").unlink()


def damage_token(corpus: Path) -> None:
    """A flip that no structure shows: one token becomes another of the vocabulary."""
    path = corpus / "train-00001.tar"
    with ShardFile(path) as shard:
        chunk = next(shard.chunks())
    bad = bytearray(path.read_bytes())
    bad[chunk.tokens.data_offset + 128] ^= 1
    path.write_bytes(bad)


def other_tokenizer(corpus: Path) -> None:
    (corpus / "tokenizer.json").write_bytes(CorpusTokenizer.of_bytes().content)


def without_manifest(change: Callable[[Path], object]) -> Callable[[Path], object]:
    def both(corpus: Path) -> None:
        change(corpus)
        for name in ("manifest.json", "train.index", "validation.index"):
            (corpus / name).unlink()

    return both


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a damaged tar": (damage_tar, r"train-00001\.tar is not what manifest\.json says"),
    "a damaged token": (damage_token, r"train-00001\.tar is not what manifest\.json says"),
    "index against tar": (damage_tar_without_manifest, r"train\.index does not fit the tars"),
    "a missing tar": (lambda c: (c / "train-00002.tar").unlink(), r"train-00002\.tar is missing"),
    "a tar more": (lambda c: shutil.copy(c / "train-00000.tar", c / "train-00003.tar"), "not named by manifest"),
    "the same tar twice": (
        without_manifest(lambda c: shutil.copy(c / "train-00000.tar", c / "train-00003.tar")),
        "its key is train-00000-00000, not train-00003-00000",
    ),
    "a foreign tar": (lambda c: make_tar(c / "backup.tar", [member("x")]), r"backup\.tar is not a shard"),
    "a foreign tar of our name": (
        without_manifest(lambda c: make_tar(c / "train-00003.tar", [member("x.txt")])),
        "member 'x.txt' is none of",
    ),
    "no tars": (without_manifest(lambda c: [p.unlink() for p in c.glob("*.tar")]), "holds no shard"),
    "another tokenizer": (other_tokenizer, r"tokenizer\.json is not the tokenizer"),
    "another tokenizer, no manifest": (without_manifest(other_tokenizer), r"tokenizer\.json is not the tokenizer of"),
    "no tokenizer": (lambda c: (c / "tokenizer.json").unlink(), r"tokenizer\.json cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_index_is_not_made_of_doubtful_tars(corpus: Path, case: str) -> None:
    change, message = REFUSED[case]
    change(corpus)
    before = files_of(corpus)
    with pytest.raises(CorpusError, match=message):
        rebuild_index(corpus)
    assert files_of(corpus) == before


def test_the_commands(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "verify", str(corpus), "--workers", "2"]) == 0
    (corpus / "train.index").unlink()
    assert main(["data", "verify", str(corpus)]) == 1
    assert "train.index cannot be read" in capsys.readouterr().err
    assert main(["data", "index", str(corpus)]) == 0
    assert "made anew from 4 tars" in capsys.readouterr().out
    assert main(["data", "verify", str(corpus)]) == 0
    (corpus / "tokenizer.json").unlink()
    assert main(["data", "index", str(corpus)]) == 2


def test_show_decodes_documents_from_all_over(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = render_corpus(corpus, samples=3)
    assert text.count("sample train-") == 3
    assert "train-00000/0.txt" in text
    assert "| Document 0, é 漢字" in text
    assert main(["data", "show", str(corpus), "--split", "validation", "--samples", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("sample validation-00000/") == 2
    assert json.dumps(TEXTS[210].splitlines()[0], ensure_ascii=False).strip('"') in out


def test_show_does_not_let_text_steer_the_terminal(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", CorpusTokenizer.of_bytes(), {"train": [["red \x1b[31m and \x9b a bell\a"]]})
    text = render_corpus(tmp_path / "c")
    assert r"| red \x1b[31m and \x9b a bell\x07" in text
    assert "\x1b" not in text
