"""Every format read back as its own library wrote it, cut anywhere; what is broken is never left out in silence."""

import bz2
import gzip
import io
import json
import lzma
import sys
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.sources import lines, streams, texts
from data_tools.sources.documents import BadDocument, Document
from data_tools.sources.fields import choose_text_field
from data_tools.sources.files import SourceOptions, find_files
from data_tools.sources.formats import read_piece
from data_tools.sources.pieces import cut_pieces
from gptdist.errors import CorpusError

TEXTS = ["first", "naïve 漢字 🙂", "", "two\nlines\r\n", "\ufeffmark", "x" * 5000, " \t\u2028 "]


def read(path: Path, *fields: str, piece_bytes: int = 1 << 40) -> list[Document | BadDocument]:
    options = SourceOptions(text_fields=fields or ("text",))
    pieces = cut_pieces(find_files([path], options), piece_bytes)
    return [document for piece in pieces for _, document in read_piece(piece, options)]


def texts_of(path: Path, *fields: str, piece_bytes: int = 1 << 40) -> list[str]:
    documents = read(path, *fields, piece_bytes=piece_bytes)
    assert all(isinstance(document, Document) for document in documents), documents
    return [document[1] for document in documents]


def written(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def json_lines(values: list[str], **more: object) -> bytes:
    return b"".join(json.dumps({"id": 1, "text": value, **more}).encode() + b"\n" for value in values)


def zstd(content: bytes) -> bytes:
    compressed: bytes = pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(content)
    return compressed


def tar(members: dict[str, bytes], **header: Any) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return held.getvalue()


def parquet(values: list[Any], rows: int = 1000, **more: Any) -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    held = io.BytesIO()
    pq.write_table(pa.table({"text": values}), held, row_group_size=rows, write_page_checksum=True, **more)
    return held.getvalue()


def arrow(values: list[Any], rows: int = 1000, kind: str = "new_stream", options: Any = None) -> bytes:
    pa = pytest.importorskip("pyarrow")
    held = io.BytesIO()
    table = pa.table({"id": range(len(values)), "text": values})
    with getattr(pa.ipc, kind)(held, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return held.getvalue()


PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


# --- each format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", PACKED)
def test_whole_texts(tmp_path: Path, suffix: str) -> None:
    for number, text in enumerate(TEXTS):
        if not text.startswith("\ufeff"):
            path = written(tmp_path, f"{number}.txt{suffix}", PACKED[suffix](text.encode()))
            assert read(path) == [Document(path.name, text)]
    path = written(tmp_path, f"mark.txt{suffix}", PACKED[suffix](b"\xef\xbb\xbfthe text"))
    assert texts_of(path) == ["the text"], "a byte order mark is no part of the text"


@pytest.mark.parametrize("suffix", PACKED)
def test_lines(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, f"x.jsonl{suffix}", PACKED[suffix](json_lines(TEXTS)))
    offsets = [0]
    for text in TEXTS:
        offsets.append(offsets[-1] + len(json_lines([text])))
    assert read(path) == [Document(f"{path.name}@{at}", text) for at, text in zip(offsets, TEXTS, strict=False)]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_packed_parts_one_after_the_other(tmp_path: Path, suffix: str) -> None:
    content = b"".join(PACKED[suffix](json_lines([text])) for text in TEXTS)
    if suffix == ".zst":  # a frame to be passed over, as pzstd leaves them
        content = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + content
    assert texts_of(written(tmp_path, f"x.jsonl{suffix}", content)) == TEXTS


def test_zstd_with_a_long_window(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters.from_level(1, window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    content = packer.compress(json_lines(TEXTS)) + packer.flush()
    assert texts_of(written(tmp_path, "x.jsonl.zst", content)) == TEXTS


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_parquet(tmp_path: Path, rows: int, compression: str) -> None:
    path = written(tmp_path, "x.parquet", parquet(TEXTS, rows, compression=compression))
    expected = [Document(f"x.parquet#{row}", text) for row, text in enumerate(TEXTS)]
    for piece_bytes in (1 << 40, 3000, 1000, 100):
        assert read(path, piece_bytes=piece_bytes) == expected


@pytest.mark.parametrize("rows", [1, 3, 1000])
@pytest.mark.parametrize("kind", ["new_stream", "new_file"])
def test_arrow(tmp_path: Path, rows: int, kind: str) -> None:
    path = written(tmp_path, "x.arrow", arrow(TEXTS, rows, kind))
    expected = [Document(f"x.arrow#{row}", text) for row, text in enumerate(TEXTS)]
    for piece_bytes in (1 << 40, 3000, 1000, 100):
        assert read(path, piece_bytes=piece_bytes) == expected


def test_arrow_with_packed_buffers(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    content = arrow(TEXTS, 2, options=pa.ipc.IpcWriteOptions(compression="zstd"))
    assert texts_of(written(tmp_path, "x.arrow", content), piece_bytes=500) == TEXTS


@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "binary", "large_binary", "binary_view", "dictionary"]
)
def test_types_of_columns(tmp_path: Path, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    wanted = pa.dictionary(pa.int32(), pa.string()) if kind == "dictionary" else getattr(pa, kind)()
    values = pa.array([*TEXTS, None], pa.string()).cast(wanted)
    expected = [*TEXTS, f"{tmp_path}/x.arrow row 7 has no text in field 'text'; it is null"]
    assert [document[1] for document in read(written(tmp_path, "x.arrow", arrow(values, 3)))] == expected
    if "view" not in kind:  # not every pyarrow writes these to Parquet
        found = read(written(tmp_path, "y.parquet", parquet(values, 3)))
        assert [document[1] for document in found[:-1]] == TEXTS and isinstance(found[-1], BadDocument)


def test_rows_that_are_not_utf8(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    for name, content in {
        "x.arrow": arrow(pa.array([b"a", b"b\xff", b"c"], pa.binary()).view(pa.string())),
        "x.parquet": parquet(pa.array([b"a", b"b\xff", b"c"], pa.binary()).view(pa.string())),
        "y.parquet": parquet(pa.array([b"a", b"b\xff", b"c"], pa.binary())),
    }.items():
        path = written(tmp_path, name, content)
        reason = f"{path} row 1 field 'text' is not UTF-8 at byte offset 1 (byte 0xff)"
        assert read(path) == [
            Document(f"{name}#0", "a"),
            BadDocument(f"{name}#1", reason),
            Document(f"{name}#2", "c"),
        ]


def test_fields_within_structs(tmp_path: Path) -> None:
    rows = [
        {"title": "T", "meta": {"body": "B"}},
        None,
        {"title": None, "meta": None},
        {"title": "U", "meta": {"body": "C"}},
    ]
    for name, content in {"x.parquet": parquet(rows), "x.arrow": arrow(rows)}.items():
        path = written(tmp_path, name, content)
        null = f"{path} row %d has no text in field 'text.title'; it is null"
        assert read(path, "{text.title}: {text.meta.body}") == [
            Document(f"{name}#0", "T: B"),
            BadDocument(f"{name}#1", null % 1),
            BadDocument(f"{name}#2", null % 2),
            Document(f"{name}#3", "U: C"),
        ]
        assert [type(document) for document in read(path, "text.meta.body")] == [
            Document,
            BadDocument,
            BadDocument,
            Document,
        ]


def test_tars(tmp_path: Path) -> None:
    members = {
        "0.txt": "naïve".encode(),
        "./a/1.txt": b"dotted",
        "a/2.json": b'{"text": "object"}',
        "a/3.jsonl": json_lines(["x", "y"]),
        "4.json": b'{"width": 3}',  # of the picture's caption that follows
        "4.png": b"\x00",
        "4.txt": b"",
        "5.TXT": b"other",
        "6.txt": b"caption",
        "6.json": b'{"width": 4}',
        "7.json": b'{"text": "last"}',
    }
    found = read(written(tmp_path, "x.tar", tar(members)))
    second = len(json_lines(["x"]))
    assert found == [
        Document("x.tar#0.txt", "naïve"),
        Document("x.tar#a/1.txt", "dotted"),
        Document("x.tar#a/2.json", "object"),
        Document("x.tar#a/3.jsonl@0", "x"),
        Document(f"x.tar#a/3.jsonl@{second}", "y"),
        Document("x.tar#4.txt", ""),
        Document("x.tar#5.TXT", "other"),
        Document("x.tar#6.txt", "caption"),
        Document("x.tar#7.json", "last"),
    ]


@pytest.mark.parametrize("suffix", PACKED)
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_packed_tars_with_long_names(tmp_path: Path, suffix: str, form: int) -> None:
    name = "é" * 150 + "/" + "x" * 150 + ".txt"
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=form) as archive:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        info = tarfile.TarInfo(name)
        info.size = 3_000_000
        archive.addfile(info, io.BytesIO(b"x" * 3_000_000))
    path = written(tmp_path, f"x.tar{suffix}", PACKED[suffix](held.getvalue()))
    assert read(path) == [Document(f"{path.name}#{name}", "x" * 3_000_000)]


def test_tars_of_webdataset(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as sink:
        for number, text in enumerate(TEXTS):
            sink.write({"__key__": f"{number:05d}", "txt": text, "json": {"number": number}})
    assert texts_of(tmp_path / "x.tar") == [text.removeprefix("\ufeff") for text in TEXTS]


# --- lines, cut anywhere --------------------------------------------------------------------------------------------

_LINE = st.one_of(
    st.text(max_size=12).map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode("utf-8", "replace")),
    st.sampled_from(
        [b"", b" ", b"\t", b"{}", b"[]", b'{"text": "\\ud800"}', b"\xff", b'{"text": "' + b"y" * 300 + b'"}']
    ),
)


def expected_keys(content: bytes) -> list[int]:
    """Where each line begins that is not blank, found byte by byte."""
    starts = [0, *(at + 1 for at, byte in enumerate(content) if byte == 10)]
    ends = [*(at for at, byte in enumerate(content) if byte == 10), len(content)]
    return [start for start, end in zip(starts, ends, strict=True) if content[start:end].strip()]


@settings(max_examples=150)
@given(
    st.lists(st.tuples(_LINE, st.sampled_from([b"\n", b"\r\n"])), max_size=12),
    st.booleans(),
    st.integers(1, 400),
    st.sampled_from([1, 7, 256 * 1024]),
)
def test_lines_are_read_once_wherever_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory,
    raw: list[tuple[bytes, bytes]],
    ends: bool,
    piece_bytes: int,
    buffer_bytes: int,
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    content = b'{"text": "first"}\n' + b"".join(line + end for line, end in raw)
    path = written(folder, "x.jsonl", content if ends else content.removesuffix(b"\n"))
    whole = read(path)
    assert [document.key for document in whole] == [f"x.jsonl@{at}" for at in expected_keys(path.read_bytes())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "BUFFER_BYTES", buffer_bytes)
        patch.setattr(lines, "BUFFER_BYTES", buffer_bytes)
        assert read(path, piece_bytes=piece_bytes) == whole


@given(
    _LINE | st.binary(max_size=20) | st.sampled_from([b'{"text": NaN}', b'{"text": "a", "b": NaN}', b"1e999", b'"s"'])
)
def test_the_fast_parser_changes_nothing(tmp_path_factory: pytest.TempPathFactory, line: bytes) -> None:
    pytest.importorskip("orjson")
    content = b'{"text": "first"}\n' + line + b'\n{"text": "last", "x": [1, 2.5, null, "\\ud800"]}\n'
    path = written(tmp_path_factory.mktemp("parser"), "x.jsonl", content)
    fast = read(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "orjson", None)
        assert read(path) == fast
    assert fast[0][1] == "first" and fast[-1][1] == "last"


def test_a_line_or_text_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lines, streams, texts):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 100)
    content = json_lines(["a", "b" * 500, "c"])
    second = len(json_lines(["a"]))
    third = len(json_lines(["a", "b" * 500]))
    for name, packed in {"x.jsonl": content, "y.jsonl.gz": gzip.compress(content)}.items():
        path = written(tmp_path, name, packed)
        reason = f"{path} has a line of more than 100 bytes at byte offset {second}"
        assert read(path) == [
            Document(f"{name}@0", "a"),
            BadDocument(f"{name}@{second}", reason),
            Document(f"{name}@{third}", "c"),
        ]
    endless = read(written(tmp_path, "z.jsonl", json_lines(["a"]) + b"y" * 500))
    assert [document.key for document in endless] == ["z.jsonl@0", f"z.jsonl@{second}"]
    text = written(tmp_path, "x.txt", b"x" * 101)
    assert read(text) == [BadDocument("x.txt", f"{text} is one text of more than 100 bytes")]


def test_memory_does_not_grow_with_a_packed_file(tmp_path: Path) -> None:
    block = gzip.compress(json_lines([f"{number} " + "word " * 800 for number in range(500)]), 1)
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(block * 30)  # 60 MB when unpacked
    options = SourceOptions()
    (piece,) = cut_pieces(find_files([path], options), 1)
    tracemalloc.start()
    try:
        size = sum(len(document[1]) for _, document in read_piece(piece, options))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 60_000_000 and peak < 8_000_000


# --- fields ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("a", "A"),
        ("b.c", "BC"),
        ("d.e", "literal"),
        ("{a}\n\n{b.c}", "A\n\nBC"),
        (r"{a}\n\t{a}\\n\x", "A\n\tA\\n\\x"),
        ("{{{a}}}", "{A}"),
        ("{a}={b.c}", "A=BC"),
        ("x*=a", "A"),
        ("*.jsonl=Title: {a}", "Title: A"),
        ("{ a }", "spaced"),
        ("{a.__class__}", "no attribute"),
    ],
)
def test_text_fields(tmp_path: Path, field: str, text: str) -> None:
    record = {"a": "A", "b": {"c": "BC"}, "d.e": "literal", "d": {"e": "nested"}, " a ": "spaced"}
    record["a.__class__"] = "no attribute"
    path = written(tmp_path, "x.jsonl", json.dumps(record).encode())
    assert texts_of(path, field) == [text]
    archive = written(tmp_path, "x.jsonl.tar", tar({"x.json": json.dumps(record).encode()}))
    assert texts_of(archive, "a", field.replace("*.jsonl=", "*.tar=")) == [text]


def test_the_last_field_that_matches_holds(tmp_path: Path) -> None:
    entries = ("text", "wiki/*=body", "*.parquet={title}", "wiki/x.*=abstract")
    for key, name in {
        "a.jsonl": "text",
        "wiki/a.jsonl": "body",
        "wiki/a.parquet": "title",
        "wiki/x.a": "abstract",
    }.items():
        assert choose_text_field(entries, key).names == (name,)
    with pytest.raises(CorpusError, match=r"No text field is given for a\.jsonl: only wiki/\*=body\. Add one"):
        choose_text_field(("wiki/*=body",), "a.jsonl")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("", "'' names no field"),
        ("wiki=", "has nothing after its '='"),
        ("=a", "has nothing before its '='"),
        ("{a", "a single brace at character 1"),
        ("a}", "a single brace at character 2"),
        ("{a{b}}", "a single brace at character 1"),
        ("{}", "a pair of braces without a name at character 1"),
        ("{{a}}", "names no field"),
    ],
)
def test_text_fields_that_say_nothing(entry: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        SourceOptions(text_fields=(entry,))


# --- bad documents --------------------------------------------------------------------------------------------------

BAD_LINES = {
    b'{"text": "\xe9"}': "is not UTF-8 at byte offset 28 (byte 0xe9)",
    b'{"text": ': "at byte offset 18 is not JSON: Expecting value at character 11",
    b"[" * 100_000: "at byte offset 18 is not JSON: maximum recursion depth exceeded while decoding a JSON array",
    b"[1]": "at byte offset 18 is a JSON list, not an object with a field 'text'",
    b'"text"': "at byte offset 18 is a JSON str, not an object with a field 'text'",
    b'{"body": "a", "id": 3}': "at byte offset 18 has no text in field 'text'; its fields are 'body', 'id'",
    b"{}": "at byte offset 18 has no text in field 'text'; it has no field",
    b'{"text": 3}': "at byte offset 18 has no text in field 'text'; it is int",
    b'{"text": null}': "at byte offset 18 has no text in field 'text'; it is null",
    b'{"text": "\\ud800"}': "at byte offset 18 spells half of a surrogate pair, which is no Unicode text",
    b'{"text": "a"} {"text": "b"}': "at byte offset 18 is not JSON: Extra data at character 15",
}


@pytest.mark.parametrize("number", range(len(BAD_LINES)))
@pytest.mark.parametrize("fast", [True, False])
def test_bad_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fast: bool) -> None:
    if not fast:
        monkeypatch.setitem(sys.modules, "orjson", None)
    line, reason = list(BAD_LINES.items())[number]
    path = written(tmp_path, "x.jsonl", b'{"text": "first"}\n' + line + b'\n{"text": "last"}')
    first, bad, last = read(path)
    assert isinstance(bad, BadDocument) and bad.key == "x.jsonl@18"
    assert bad.reason.startswith(f"{path} {reason}")
    assert (first[1], last[1]) == ("first", "last")


def test_a_mark_before_the_first_line(tmp_path: Path) -> None:
    assert read(written(tmp_path, "x.jsonl", b"\xef\xbb\xbf" + json_lines(["a"]))) == [Document("x.jsonl@0", "a")]


def test_bad_texts_and_members(tmp_path: Path) -> None:
    path = written(tmp_path, "x.txt", b"hello\xff")
    assert read(path) == [BadDocument("x.txt", f"{path} is not UTF-8 at byte offset 5 (byte 0xff)")]
    path = written(tmp_path, "x.txt", b"\xef\xbb\xbf\xff")
    assert read(path) == [BadDocument("x.txt", f"{path} is not UTF-8 at byte offset 3 (byte 0xff)")]
    members = {"a.json": b'{"text": "a"}', "b.json": b'{"title": "b"}', "c.json": b"[]", "d.txt": b"\xff"}
    path = written(tmp_path, "x.tar", tar(members))
    _, *bad = read(path)
    assert [document.key for document in bad] == ["x.tar#b.json", "x.tar#c.json", "x.tar#d.txt"]
    assert all(isinstance(document, BadDocument) for document in bad)
    assert bad[0][1].startswith(f"{path} member 'b.json' at byte offset 0 has no text in field 'text'; its fields are")
    assert bad[2][1] == f"{path} member 'd.txt' is not UTF-8 at byte offset 0 (byte 0xff)"


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.tar", "y.tar", "x.parquet", "x.arrow"])
def test_a_field_that_the_first_record_lacks_is_the_users_mistake(tmp_path: Path, name: str) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    record = b'{"body": "a", "id": 3}\n'
    table = pa.table({"body": ["a"], "id": [3]})
    path = tmp_path / name
    if name == "x.parquet":
        pq.write_table(table, path)
    elif name == "x.arrow":
        with pa.ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        contents = {"x.jsonl": record, "x.jsonl.gz": gzip.compress(record)}
        contents |= {"x.tar": tar({"a.json": record}), "y.tar": tar({"a.jsonl": record})}
        path.write_bytes(contents[name])
    with pytest.raises(
        CorpusError, match=r"has no .*'text'; its .* are 'body', 'id'\. Name the field with --text-field"
    ):
        read(path)
    assert texts_of(path, "body") == ["a"]


def test_columns_that_hold_no_text(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    path = written(tmp_path, "x.parquet", parquet([["a"], ["b"]]))
    with pytest.raises(CorpusError, match=r"x\.parquet has no text in column 'text'; it is list<.*--text-field"):
        read(path)
    with pytest.raises(CorpusError, match=r"x\.parquet has no column 'text\.body'"):
        read(path, "text.body")
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pa.ipc.new_stream(str(tmp_path / "x.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(CorpusError, match=r"x\.arrow has several columns 'text'"):
        read(tmp_path / "x.arrow")


# --- tars that are refused ------------------------------------------------------------------------------------------


def member(name: str, **header: Any) -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo(name)
        for field, value in header.items():
            setattr(info, field, value)
        archive.addfile(info)
    return held.getvalue()


REFUSED_TARS: dict[str, tuple[Callable[[], bytes], str]] = {
    "absolute": (lambda: member("/etc/x.txt"), r"member '/etc/x\.txt' is refused: its name leads out of the tar"),
    "parent": (lambda: member("a/../../x.txt"), r"is refused: its name leads out"),
    "parent of Windows": (lambda: member("a\\..\\x.txt"), r"is refused: its name leads out"),
    "parent folder": (lambda: member("..", type=tarfile.DIRTYPE), r"is refused: its name leads out"),
    "link": (lambda: member("x.txt", type=tarfile.SYMTYPE, linkname="y"), r"'x\.txt' is refused: it is a link"),
    "hard link": (lambda: member("x.txt", type=tarfile.LNKTYPE, linkname="y"), r"is refused: it is a link"),
    "device": (lambda: member("x.txt", type=tarfile.CHRTYPE), r"is refused: it is a link, a device"),
    "pipe": (lambda: member("x.txt", type=tarfile.FIFOTYPE), r"is refused: it is a link, a device"),
    "pickle": (lambda: member("x.pickle"), r"'x\.pickle' is refused: files of its kind can run code"),
    "extension module": (lambda: member("x.pyd"), r"is refused: files of its kind"),
    "packed pickle": (lambda: member("x.pkl.gz"), r"is refused: files of its kind"),
    "repeated": (
        lambda: member("x.txt")[:512] + member("./x.txt"),
        r"x\.tar member 'x\.txt' is there twice",
    ),
    "joined": (lambda: tar({"a.txt": b"a"}) + tar({"b.txt": b"b"}), r"goes on behind its end mark"),
    "no tar": (lambda: b"hello " * 1000, r"x\.tar cannot be read: it is no whole tar"),
    "empty": (lambda: b"", r"x\.tar cannot be read: it is no whole tar"),
}


@pytest.mark.parametrize("case", REFUSED_TARS)
def test_tars_that_are_refused(tmp_path: Path, case: str) -> None:
    make, message = REFUSED_TARS[case]
    path = written(tmp_path, "x.tar", make())
    with pytest.raises(CorpusError, match=message):
        read(path)
    assert sorted(tmp_path.iterdir()) == [path], "nothing is unpacked"


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, 1 << 32
    path = written(tmp_path, "x.tar", info.tobuf() + bytes(4096))
    with pytest.raises(CorpusError, match=r"it has a header of 4,294,967,296 bytes at byte 512"):
        read(path)


# --- files that break off or change ---------------------------------------------------------------------------------


def short_tar(members: dict[str, bytes]) -> bytes:
    """A tar with the end mark and no more."""
    content = tar(members)
    return content[: -(-len(content.rstrip(b"\0")) // 512) * 512 + 1024]


def breakable() -> Iterator[tuple[str, bytes]]:
    content = json_lines([f"{number} {text}" for number in range(20) for text in TEXTS[:4]])
    members = short_tar({f"{number}.txt": text.encode() for number, text in enumerate(TEXTS)})
    for suffix, pack in PACKED.items():
        if suffix:
            yield f"x.jsonl{suffix}", pack(content)
            yield f"x.txt{suffix}", pack(content)
        yield f"x.tar{suffix}", pack(members)
    yield "x.parquet", parquet(TEXTS * 20, 50)
    yield "x.arrow", arrow(TEXTS * 20, 50)
    yield "y.arrow", arrow(TEXTS * 20, 50, "new_file")


def test_no_truncation_goes_unseen(tmp_path: Path) -> None:
    for name, content in breakable():
        whole = read(written(tmp_path, name, content))
        assert len(whole) in (1, len(TEXTS), 80, 140)
        step = 512 if name == "x.tar" else max(len(content) // 40, 1)
        for length in {*range(0, len(content), step), len(content) - 1}:
            path = written(tmp_path, name, content[:length])
            if name == "x.tar" and length >= len(content) - 512:  # one block of the end mark will do
                assert read(path) == whole
                continue
            with pytest.raises(CorpusError, match=rf"Source .*{name} cannot be read: .*copy it again"):
                read(path)


def test_flipped_bits_are_seen_or_harmless(tmp_path: Path) -> None:
    """What has checksums gives no other text, and nothing ends otherwise than by documents or a CorpusError."""
    for name, content in breakable():
        whole = read(written(tmp_path, name, content))
        for number in range(40):
            at = (number * 7919 * 31) % len(content)
            flipped = bytearray(content)
            flipped[at] ^= 1 << number % 8
            path = written(tmp_path, name, bytes(flipped))
            try:
                found = read(path)
            except CorpusError as error:
                assert name in str(error)
                continue
            if name.endswith((".gz", ".bz2", ".xz", ".zst")):
                assert found == whole, (name, at)


def test_files_that_vanish_or_change(tmp_path: Path) -> None:
    options = SourceOptions()
    for name, content in (("x.jsonl", json_lines(TEXTS)), ("x.txt", b"text"), ("x.parquet", parquet(TEXTS))):
        path = written(tmp_path, name, content)
        pieces = cut_pieces(find_files([path], options), 1000)
        path.write_bytes(content + b"\n")
        with pytest.raises(CorpusError, match=rf"{name} changed while .* has {len(content) + 1:,} bytes, and had"):
            list(read_piece(pieces[-1], options))
        path.unlink()
        with pytest.raises(CorpusError, match=rf"{name} vanished while the corpus was being built"):
            list(read_piece(pieces[0], options))


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path: Path) -> None:
    path = written(tmp_path, "x.jsonl", json_lines(["x" * 1000] * 2000))
    options = SourceOptions()
    (piece,) = cut_pieces(find_files([path], options), 1 << 40)
    documents = read_piece(piece, options)
    next(documents)
    with path.open("r+b") as file:
        file.truncate(1_000_000)
    with pytest.raises(CorpusError, match=r"x\.jsonl cannot be read: it ends at byte 1,000,000, before byte"):
        list(documents)


@pytest.mark.parametrize(
    ("module", "name", "content"),
    [("zstandard", "x.jsonl.zst", b"x"), ("pyarrow", "x.parquet", b"x"), ("pyarrow", "x.arrow", b"x")],
)
def test_a_missing_library_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str, content: bytes
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    path = written(tmp_path, name, content)
    with pytest.raises(CorpusError, match=rf"needs {module}, which is not installed: pip install 'gptdist\[data\]'"):
        read(path)
