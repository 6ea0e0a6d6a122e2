"""What the user's sources name: files, folders, globs, URLs, saved datasets; and how files are cut into pieces."""

import functools
import http.server
import json
import logging
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_tools.sources.documents import BadDocument, Document
from data_tools.sources.files import SourceFile, SourceOptions, find_files
from data_tools.sources.formats import read_piece
from data_tools.sources.pieces import cut_pieces
from gptdist.errors import CorpusError

LINE = b'{"text": "hello"}\n'


def write(folder: Path, *names: str, content: bytes = b"text") -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def keys(sources: list[str | Path], **options: object) -> list[str]:
    return [file.key for file in find_files(sources, SourceOptions(**options))]  # type: ignore[arg-type]


def texts(sources: list[str], piece_bytes: int = 1 << 20) -> dict[str, str]:
    found = {}
    options = SourceOptions()
    for piece in cut_pieces(find_files(sources, options), piece_bytes):
        for _, document in read_piece(piece, options):
            assert isinstance(document, Document)
            assert document.key not in found
            found[document.key] = document.text
    return found


# --- files, folders, globs ------------------------------------------------------------------------------------------


def test_folders_are_searched_for_known_kinds(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "b.PY", "c.png", ".git/d.txt", "site-packages/e.py", "deep/er/f.rst", "g.log", ".h.txt")
    write(tmp_path, "i.jsonl.gz", "j.jsonl.zst", "k.parquet", "l.arrow", "m.tar", "n.txt.zst", "o.pkl", "p.pt", "q.gz")
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "gone")
    (tmp_path / "again").symlink_to(tmp_path / "deep")
    expected = ["a.txt", "b.PY", "deep/er/f.rst", "i.jsonl.gz", "j.jsonl.zst", "k.parquet", "l.arrow", "m.tar"]
    assert keys([tmp_path]) == [*expected, "n.txt.zst"]
    assert keys([tmp_path], suffixes=(".log", ".py"), exclude=()) == ["b.PY", "g.log", "site-packages/e.py"]
    assert keys([tmp_path], suffixes=(".gz",)) == ["i.jsonl.gz", "q.gz"]


@pytest.mark.parametrize(
    ("name", "format_", "compression"),
    [
        ("a.txt", "text", ""),
        ("a.md.gz", "text", "gzip"),
        ("a.TXT.XZ", "text", "xz"),
        ("enwik8", "text", ""),
        ("enwik8.bz2", "text", "bz2"),
        ("a.jsonl", "jsonl", ""),
        ("a.b.jsonl.zst", "jsonl", "zstd"),
        ("a.parquet", "parquet", ""),
        ("a.arrow", "arrow", ""),
        ("a.tar", "tar", ""),
        ("a.tar.zst", "tar", "zstd"),
        ("a.tgz", "tar", "gzip"),
    ],
)
def test_a_name_stands_for_a_format(tmp_path: Path, name: str, format_: str, compression: str) -> None:
    write(tmp_path, name)
    file = SourceFile(name, str(tmp_path / name), 4, format_, 0, compression)
    assert find_files([tmp_path / name], SourceOptions()) == [file]


def test_several_sources_are_told_apart_by_name(tmp_path: Path) -> None:
    write(tmp_path, "one/x.txt", "two/x.txt", "other/two/x.txt", "x.txt")
    sources = [
        tmp_path / "one",
        tmp_path / "two",
        tmp_path / "other/two",
        tmp_path / "x.txt",
        tmp_path / "one" / "x.txt",
    ]
    files = find_files(sources, SourceOptions())
    assert [(file.key, file.source) for file in files] == [
        ("one/x.txt", 0),
        ("two/x.txt", 1),
        ("two/x.txt~2", 2),
        ("x.txt", 3),
        ("x.txt~2", 4),
    ]
    assert all(Path(file.url).is_absolute() and file.bytes == 4 for file in files)


def test_globs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "d/a.jsonl.zst", "d/b.jsonl.zst", "d/c.txt", "d/e/f.txt", "d/.g/h.txt", "d/e/node_modules/i.txt")
    write(tmp_path, "d/j.tar.xz", "d/[k].txt", "d/l.png")
    assert keys([f"{tmp_path}/d/*.jsonl.zst"]) == ["a.jsonl.zst", "b.jsonl.zst"]
    assert keys([f"{tmp_path}/d/*.zst"]) == ["a.jsonl.zst", "b.jsonl.zst"]
    everything = ["[k].txt", "a.jsonl.zst", "b.jsonl.zst", "c.txt", "e/f.txt"]
    assert keys([f"{tmp_path}/d/**"]) == keys([f"{tmp_path}/d/*"]) == keys([f"{tmp_path}/d"]) == everything
    assert keys([f"{tmp_path}/d/**/*.txt"]) == ["[k].txt", "c.txt", "e/f.txt"]
    assert keys([f"{tmp_path}/*/e/*.txt"]) == ["d/e/f.txt"]
    assert keys([f"{tmp_path}/d/?.txt"]) == ["c.txt"]
    assert keys([f"{tmp_path}/d/*.tar.xz"]) == ["j.tar.xz"], "a suffix that is spelled out is asked for"
    assert keys([f"{tmp_path}/d/[k].txt"]) == ["[k].txt"], "a file of that very name comes first"
    assert keys([f"{tmp_path}/d/*.tx?", f"{tmp_path}/d/e"]) == ["d/[k].txt", "d/c.txt", "e/f.txt"]
    monkeypatch.chdir(tmp_path / "d")
    assert keys(["*.txt"]) == keys(["./*.txt"]) == ["[k].txt", "c.txt"]
    assert keys(["e"]) == keys(["../d/e"]) == ["f.txt"]


def test_names_that_are_not_utf8_make_keys_that_are(tmp_path: Path) -> None:
    write(tmp_path, os.fsdecode(b"caf\xe9.txt"))
    (file,) = find_files([tmp_path], SourceOptions())
    assert file.key == "caf\\xe9.txt" and file.where.endswith("caf\\xe9.txt")
    assert texts([str(tmp_path)]) == {"caf\\xe9.txt": "text"}


def test_order_and_keys_do_not_depend_on_the_file_system(tmp_path: Path) -> None:
    names = ["b.txt", "a/z.txt", "a.txt", "B.txt", "a-b/c.txt", "é.txt"]
    write(tmp_path / "one", *names)
    write(tmp_path / "two" / "one", *reversed(names))
    assert keys([tmp_path / "one"]) == keys([tmp_path / "two" / "one"]) == sorted(names)


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED = {
    "missing": ("nope.txt", r"Source .*nope\.txt does not exist\. Name a file, a folder"),
    "no match": ("*.nix", r"No document in .*\*\.nix\. Folders and globs are searched for \.txt, .*--suffixes"),
    "nothing to read": ("pictures", r"No document in .*pictures \(1 of other kinds\)\."),
    "unknown kind": ("x.pdf", r"x\.pdf is of a kind that is not read \(\.pdf\)\. Read are .*\.parquet.*--suffixes"),
    "unknown compressed": ("x.csv.gz", r"x\.csv\.gz is of a kind that is not read \(\.csv\.gz\)"),
    "packed parquet": ("x.parquet.gz", r"x\.parquet\.gz cannot be read compressed as a whole\. Unpack it"),
    "pickle": ("x.pickle", r"x\.pickle is refused: files of its kind can run code"),
    "packed pickle": ("x.pkl.gz", r"x\.pkl\.gz is refused"),
    "torch": ("x.pt", r"x\.pt is refused"),
    "extension module": ("x.pyd", r"x\.pyd is refused"),
    "pipe": ("pipe:cat /etc/passwd", r"Source 'pipe' is a command; commands are not run"),
    "shell pipe": ("| cat /etc/passwd", r"is a command"),
    "shell pipe at the end": ("cat x |", r"is a command"),
    "scheme": ("ftp://host/x.txt", r"scheme is 'ftp', which is not read\. Known are file://, s3://"),
    "chain": ("simplecache::s3://b/x.txt", r"scheme is 'simplecache::s3', which is not read"),
    "local command": ("local-cmd://x", r"scheme is 'local-cmd'"),
    "host in file URL": ("file://host/x.txt", r"names a host\. Write file:///PATH"),
    "keys in S3 URL": ("s3://AKIA:se/cret@bucket/x.txt", r"scheme s3:// holds credentials\. Give them by"),
    "bad host": ("https://me:hun/ter2@host/x.txt", r"no valid host and port\. Quote / and @"),
    "device": ("/dev/null", r"is neither a file nor a folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "pictures/x.png", "x.pdf", "x.csv.gz", "x.parquet.gz", "x.pickle", "x.pkl.gz", "x.pt", "x.pyd")
    source, message = REFUSED[case]
    with pytest.raises(CorpusError, match=message) as error:
        find_files([source], SourceOptions())
    assert "se/cret" not in str(error.value) and "hun" not in str(error.value)


def test_no_source_is_an_error() -> None:
    with pytest.raises(CorpusError, match="No document in no source"):
        find_files([], SourceOptions())


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.txt", "locked/b.txt")
    real = os.scandir

    def scandir(path: str) -> object:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(CorpusError, match=r"Folder .*locked cannot be read: Permission denied"):
        find_files([tmp_path], SourceOptions())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_text": "ignore"}, "'ignore'; it must be 'error' or 'skip'"),
        ({"suffixes": ("txt",)}, r"Suffix 'txt' .* must begin with a full stop"),
        ({"suffixes": (".pkl",)}, r"Suffix '\.pkl' is not for text"),
        ({"text_fields": ("{a",)}, r"'\{a' has a single brace at character 1"),
    ],
)
def test_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        SourceOptions(**options)  # type: ignore[arg-type]


def test_keys_of_tar_members_stay_unique(tmp_path: Path) -> None:
    write(tmp_path, "a.tar", "a.tar#b.txt")
    with pytest.raises(CorpusError, match=r"Files a\.tar and a\.tar#b\.txt can give documents of the same key"):
        find_files([tmp_path], SourceOptions())
    (tmp_path / "a.tar").unlink()
    assert keys([tmp_path]) == ["a.tar#b.txt"]


# --- datasets saved on disk -----------------------------------------------------------------------------------------


def save_dataset(folder: Path, shards: list[list[str]], **state: object) -> None:
    """What `datasets` leaves, made by pyarrow alone, with a cache of the same rows beside it."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, rows in zip([*names, "cache-0123.arrow"], [*shards, ["cached"]], strict=True):
        table = pa.table({"id": range(len(rows)), "text": rows})
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names], **state}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_dataset_is_its_listed_files(tmp_path: Path) -> None:
    save_dataset(tmp_path / "d", [["a", "b"], ["c"]])
    first, second = "data-00000-of-00002.arrow", "data-00001-of-00002.arrow"
    assert texts([str(tmp_path / "d")]) == {f"{first}#0": "a", f"{first}#1": "b", f"{second}#0": "c"}
    write(tmp_path, "e.txt")
    assert keys([tmp_path]) == [f"d/{first}", f"d/{second}", "e.txt"]


def test_a_saved_dict_is_all_its_splits(tmp_path: Path) -> None:
    save_dataset(tmp_path / "train", [["a"]])
    save_dataset(tmp_path / "test", [["b"]])
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    name = "data-00000-of-00001.arrow#0"
    assert texts([str(tmp_path)]) == {f"test/{name}": "b", f"train/{name}": "a"}
    assert texts([str(tmp_path / "train")]) == {name: "a"}


def test_a_dataset_of_the_library_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    split = datasets.Dataset.from_dict({"text": [f"text {number}" for number in range(2500)], "n": list(range(2500))})
    datasets.DatasetDict({"train": split, "more": split.select(range(3))}).save_to_disk(
        str(tmp_path / "d"), num_shards={"train": 3, "more": 1}
    )
    found = texts([str(tmp_path / "d")], piece_bytes=5000)
    assert [text for key, text in found.items() if key.startswith("train/")] == split["text"][:]
    assert [text for key, text in found.items() if key.startswith("more/")] == ["text 0", "text 1", "text 2"]


def test_broken_datasets_are_refused(tmp_path: Path) -> None:
    save_dataset(tmp_path / "a", [["a"], ["b"]])
    (tmp_path / "a" / "data-00001-of-00002.arrow").unlink()
    save_dataset(tmp_path / "b", [["a"]], _data_files=[{"filename": "../../x.arrow"}])
    save_dataset(tmp_path / "c", [["a"]], _indices_data_files=[{"filename": "indices.arrow"}])
    save_dataset(tmp_path / "d", [["a"]])
    (tmp_path / "d" / "state.json").write_text("[]")
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    for name, message in {
        "a": r"Dataset .*/a lacks 'data-00001-of-00002\.arrow', which its state\.json lists",
        "b": r"state\.json names '\.\./\.\./x\.arrow', which is outside its folder",
        "c": r"Dataset .*/c was saved by an old release, with an index of its rows\. Load it and save it again",
        "d": r"d/state\.json is not what a dataset saved on disk has \(TypeError\)",
        "e": r"Dataset .*/e lacks its split 'train'",
    }.items():
        with pytest.raises(CorpusError, match=message):
            find_files([tmp_path / name], SourceOptions())


# --- URLs -----------------------------------------------------------------------------------------------------------


def test_file_urls_are_paths_and_need_no_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    write(tmp_path, "a b.jsonl", content=LINE)
    assert texts([f"file://{tmp_path}"]) == texts([f"file://{tmp_path}/*.jsonl"]) == {"a b.jsonl@0": "hello"}
    assert find_files([f"file://{tmp_path}/a b.jsonl"], SourceOptions())[0].url == str(tmp_path / "a b.jsonl")
    with pytest.raises(CorpusError, match=r"Reading s3:// needs s3fs, .*pip install 'gptdist\[data\]'"):
        find_files(["s3://bucket/x.txt"], SourceOptions())


@pytest.fixture
def memory() -> Iterator[object]:
    filesystem = pytest.importorskip("fsspec").filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


def test_urls_name_what_paths_name(memory: object, tmp_path: Path) -> None:
    names = ["a.jsonl", "deep/b.txt", "deep/c.jsonl", ".h/d.txt", "node_modules/e.txt", "f.png"]
    write(tmp_path / "r", *names, content=LINE)
    for name in names:
        memory.pipe(f"/r/{name}", LINE)  # type: ignore[attr-defined]
    save_dataset(tmp_path / "r" / "ds", [["a"], ["b"]])
    memory.put(str(tmp_path / "r" / "ds"), "/r/ds", recursive=True)  # type: ignore[attr-defined]
    for below in ("", "/", "/*", "/**", "/*.jsonl", "/**/*.jsonl", "/deep", "/d*", "/deep/c.jsonl", "/ds"):
        assert keys([f"memory://r{below}"]) == keys([f"{tmp_path}/r{below}"]), below
        assert texts([f"memory://r{below}"], 10) == texts([f"{tmp_path}/r{below}"], 10), below
    assert keys(["memory://r/deep", "memory://r/ds"])[0] == "deep/b.txt"
    with pytest.raises(CorpusError, match=r"Source memory://r/none does not exist"):
        find_files(["memory://r/none"], SourceOptions())


def test_an_object_that_vanished_or_changed(memory: object) -> None:
    memory.pipe("/r/a.txt", b"abc")  # type: ignore[attr-defined]
    pieces = cut_pieces(find_files(["memory://r"], SourceOptions()), 100)
    memory.pipe("/r/a.txt", b"abcd")  # type: ignore[attr-defined]
    with pytest.raises(CorpusError, match=r"memory:///r/a\.txt changed .* it has 4 bytes, and had 3"):
        list(read_piece(pieces[0], SourceOptions()))
    memory.rm("/r/a.txt")  # type: ignore[attr-defined]
    with pytest.raises(CorpusError, match=r"memory:///r/a\.txt vanished"):
        list(read_piece(pieces[0], SourceOptions()))


@pytest.fixture(scope="module")
def s3() -> Iterator[object]:
    """A bucket `corpus` behind a server of the S3 protocol on loopback."""
    server_module = pytest.importorskip("moto.server", reason="moto[server] is not installed")
    s3fs = pytest.importorskip("s3fs")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        filesystem = s3fs.S3FileSystem(skip_instance_cache=True)
        filesystem.mkdir("corpus")
        yield filesystem
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_objects_in_s3(s3: object, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    rows = [f"row {number}" for number in range(1000)]
    pq.write_table(pa.table({"text": rows}), tmp_path / "r.parquet", row_group_size=100)
    s3.pipe("corpus/data/a b.jsonl", LINE * 1000)  # type: ignore[attr-defined]
    s3.pipe("corpus/data/deep/c.txt", "naïve".encode())  # type: ignore[attr-defined]
    s3.put(str(tmp_path / "r.parquet"), "corpus/data/r.parquet")  # type: ignore[attr-defined]
    save_dataset(tmp_path / "ds", [["a"], ["b"]])
    s3.put(str(tmp_path / "ds"), "corpus/ds", recursive=True)  # type: ignore[attr-defined]
    assert keys(["s3://corpus/data"]) == keys(["s3://corpus/data/"]) == ["a b.jsonl", "deep/c.txt", "r.parquet"]
    assert keys(["s3://corpus/data/*.parquet", "s3://corpus/data/deep/c.txt"]) == ["c.txt", "data/r.parquet"]
    found = texts(["s3://corpus/data"], piece_bytes=4000)
    assert [found.pop(f"a b.jsonl@{number * len(LINE)}") for number in range(1000)] == ["hello"] * 1000
    assert [found.pop(f"r.parquet#{number}") for number in range(1000)] == rows
    assert found == {"deep/c.txt": "naïve"}
    assert list(texts(["s3://corpus/ds"]).values()) == ["a", "b"]
    for missing in ("s3://corpus/none", "s3://no-such-bucket/x.txt"):
        with pytest.raises(CorpusError, match=f"Source {missing} does not exist"):
            find_files([missing], SourceOptions())


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server of tmp_path/web on loopback that cannot send parts of files; its host and port."""
    pytest.importorskip("aiohttp")
    pytest.importorskip("fsspec")
    handler = functools.partial(_Quiet, directory=str(tmp_path / "web"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_web_servers_and_their_credentials(web: str, tmp_path: Path) -> None:
    write(tmp_path / "web", "a.jsonl", "sub dir/b.jsonl", content=LINE)
    write(tmp_path / "web", "bad.txt", content=b"\xff")
    secret = f"http://me:hunter2@{web}"
    assert texts([f"{secret}/a.jsonl?signature=hunter3"], piece_bytes=5) == {"a.jsonl@0": "hello"}
    assert texts([f"{secret}/*.jsonl"]) == {"a.jsonl@0": "hello"}
    options = SourceOptions()
    files = find_files([f"{secret}/", f"{secret}/sub%20dir/"], options)
    assert [file.key for file in files] == [
        f"{web}/a.jsonl",
        f"{web}/bad.txt",
        f"{web}/sub dir/b.jsonl",
        "sub dir/b.jsonl",
    ]
    read = [document for piece in cut_pieces(files, 100) for _, document in read_piece(piece, options)]
    assert [type(document) for document in read] == [Document, BadDocument, Document, Document]
    assert f"http://{web}/bad.txt is not UTF-8" in read[1][1]
    said = [repr(files), repr(cut_pieces(files, 100)), repr(read)]
    (tmp_path / "web" / "a.jsonl").unlink()
    for source in (f"{secret}/none.txt?signature=hunter3", f"{secret}/none/?x=hunter3"):
        with pytest.raises(CorpusError) as error:
            find_files([source], options)
        said.append(str(error.value))
    with pytest.raises(CorpusError, match=rf"http://{web}/a\.jsonl") as error:
        list(read_piece(cut_pieces(files, 100)[0], options))
    assert not [text for text in [*said, str(error.value)] if "hunter" in text]


# --- pieces ---------------------------------------------------------------------------------------------------------

FORMATS = [("text", ""), ("jsonl", ""), ("jsonl", "gzip"), ("parquet", ""), ("arrow", ""), ("tar", ""), ("tar", "zstd")]
SIZES = st.one_of(st.integers(0, 300), st.integers(0, 1 << 20))
FILES = st.lists(st.tuples(SIZES, st.sampled_from(FORMATS), st.booleans()), max_size=20).map(
    lambda raw: [
        SourceFile(f"k{number:02d}", f"{'/' if local else 's3://b/'}k{number:02d}", size, *kind[:1], 0, kind[1])
        for number, (size, kind, local) in enumerate(raw)
    ]
)


@given(FILES, st.integers(1000, 1 << 21))
def test_every_byte_is_in_one_piece(files: list[SourceFile], piece_bytes: int) -> None:
    pieces = cut_pieces(files, piece_bytes)
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    assert pieces == cut_pieces(tuple(files), piece_bytes)
    covered: dict[str, list[tuple[int, int]]] = {}
    for piece in pieces:
        if len(piece.files) > 1:
            assert piece.start == 0 and piece.stop == sum(file.bytes for file in piece.files) <= piece_bytes
            for file in piece.files:
                covered[file.key] = [(0, file.bytes)]
        else:
            covered.setdefault(piece.files[0].key, []).append((piece.start, piece.stop))
    assert list(covered) == [file.key for file in files]
    for file in files:
        ranges = covered[file.key]
        assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
        assert ranges[-1][1] == file.bytes
        can_be_cut = file.format in ("jsonl", "parquet") or (file.format == "arrow" and file.is_local)
        if can_be_cut and not file.compression:
            assert all(stop - start <= piece_bytes for start, stop in ranges)
            assert len(ranges) == max(-(-file.bytes // piece_bytes), 1)
        else:
            assert len(ranges) == 1


def test_a_piece_does_not_hold_a_million_empty_files() -> None:
    files = [SourceFile(f"{number:07d}", f"/{number}", 0, "text", 0) for number in range(20_000)]
    pieces = cut_pieces(files, 64 << 20)
    assert [file for piece in pieces for file in piece.files] == files
    assert max(len(piece.files) for piece in pieces) == 4096


def test_web_files_of_lines_are_not_cut() -> None:
    files = [SourceFile(f"{at}x.jsonl", f"{at}x.jsonl", 1000, "jsonl", 0) for at in ("https://h/", "s3://b/", "/")]
    assert [len(cut_pieces([file], 100)) for file in files] == [1, 10, 10]


def test_piece_bytes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="piece_bytes is 0"):
        cut_pieces([], 0)
