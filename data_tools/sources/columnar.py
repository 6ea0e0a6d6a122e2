"""Reads the documents of Parquet and Arrow files, some batches of rows at a time.

The only place in the build that knows pyarrow. Reads no more columns than the text needs, and of a Parquet file no more
row groups. Arrow files are those of the file format as well as streams, which is what Hugging Face datasets are.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_tools.sources.documents import BadDocument, Document
from data_tools.sources.fields import TextField
from data_tools.sources.files import SourceFile
from data_tools.sources.lines import Read
from data_tools.sources.streams import open_raw
from data_tools.sources.texts import not_utf8
from gptdist.errors import CorpusError

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_BYTES = 8 << 20
_MAX_BATCH_ROWS = 4096
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
_FILE_MAGIC = b"ARROW1\x00\x00"


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of text, or one within structs: the names that lead to it."""

    name: str
    path: tuple[str, ...]


_Batches = Iterator[tuple[int, "pa.RecordBatch"]]


def read_columnar(file: SourceFile, field: TextField, start: int, stop: int) -> Iterator[Read]:
    """The documents of the row groups or record batches that begin in [start, stop) of the file; see `pieces.Piece`.

    Keys are KEY#ROW. Raises CorpusError where the field is no column of text, OSError where the file is broken.
    """
    try:
        import pyarrow as pa
    except ImportError:
        raise CorpusError(
            f"Reading {file.where} needs pyarrow, which is not installed: pip install 'gptdist[data]'."
        ) from None
    with open_raw(file) as raw:
        try:
            if file.format == "parquet":
                yield from _parquet_documents(raw, file, field, start, stop)
            else:
                yield from _arrow_documents(raw, file, field, start, stop)
        except (pa.ArrowException, ValueError, LookupError) as error:  # of broken metadata too
            raise OSError(0, str(error).splitlines()[0].rstrip(". ")) from None


def _parquet_documents(raw: io.RawIOBase, file: SourceFile, field: TextField, start: int, stop: int) -> Iterator[Read]:
    import pyarrow.parquet as pq

    source = file.url if file.is_local else raw
    with pq.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as parquet:
        columns = [_column(file, parquet.schema_arrow, name) for name in field.names]
        leaves = [".".join(column.path) for column in columns]
        groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
        rows = parquet.metadata.num_rows
        if sum(group.num_rows for group in groups) != rows:
            raise OSError(0, f"its row groups do not add up to its {rows:,} rows")
        row = 0
        for number, group in enumerate(groups):
            first, row = row, row + group.num_rows
            if start * rows <= first * file.bytes < stop * rows:
                size = _batch_rows(group.num_rows * _BATCH_BYTES // max(group.total_byte_size, 1))
                for batch in parquet.iter_batches(size, [number], leaves, use_threads=False):
                    yield from _documents(file, field, columns, first, batch)
                    first += batch.num_rows
                if first != row:
                    raise OSError(0, f"row group {number} ends at row {first:,}, not {row:,}")


def _arrow_documents(raw: io.RawIOBase, file: SourceFile, field: TextField, start: int, stop: int) -> Iterator[Read]:
    """A file on this machine is mapped, so that no byte of another column or batch is read."""
    import pyarrow as pa

    is_file_format = raw.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    if not is_file_format:
        raw.seek(max(file.bytes - len(_STREAM_END), 0))
        if raw.read(len(_STREAM_END)) != _STREAM_END:
            raise EOFError("it lacks the end mark of an Arrow stream")
    raw.seek(0)
    with pa.memory_map(file.url) if file.is_local else pa.PythonFile(raw, "r") as source:
        reader = pa.ipc.open_file(source) if is_file_format else pa.ipc.open_stream(source)
        columns = [_column(file, reader.schema, name) for name in field.names]
        row = 0
        for at, batch in _file_batches(reader, file.bytes) if is_file_format else _stream_batches(reader, source):
            if start <= at < stop:
                size = _batch_rows(batch.num_rows * _BATCH_BYTES // max(batch.nbytes, 1))
                for first in range(0, batch.num_rows, size):
                    yield from _documents(file, field, columns, row + first, batch.slice(first, size))
            row += batch.num_rows


def _stream_batches(reader: Any, source: Any) -> _Batches:
    """(where it begins, batch)."""
    while True:
        at = source.tell()
        try:
            batch = reader.read_next_batch()
        except StopIteration:
            return
        yield at, batch


def _file_batches(reader: Any, size: int) -> _Batches:
    """(where it would begin if all were equal, batch): the footer knows where, but pyarrow does not tell."""
    count = reader.num_record_batches
    for number in range(count):
        yield number * size // count, reader.get_batch(number)


def _batch_rows(rows: int) -> int:
    return min(max(rows, 1), _MAX_BATCH_ROWS)


def _column(file: SourceFile, schema: "pa.Schema", name: str) -> _Column:
    """Where a field is; as it is written first, then as fields within fields. Raises CorpusError."""
    import pyarrow as pa

    path = (name,) if name in schema.names else tuple(name.split("."))
    fields: Any = list(schema)
    kind: Any = None
    for part in path:
        matching = [field.type for field in fields if field.name == part]
        if len(matching) != 1:
            have = ", ".join(repr(field.name) for field in fields)
            raise CorpusError(
                f"{file.where} has {'several columns' if matching else 'no column'} {name!r}; its columns are {have}. "
                "Name the field with --text-field."
            )
        kind = matching[0]
        fields = list(kind) if pa.types.is_struct(kind) else []
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null(), *_binary_kinds()):
        raise CorpusError(
            f"{file.where} has no text in column {name!r}; it is {kind}. Name another field with --text-field."
        )
    return _Column(name, path)


def _binary_kinds() -> tuple[Any, ...]:
    """Types without an encoding, in which some writers store text."""
    import pyarrow as pa

    return pa.binary(), pa.large_binary(), pa.binary_view()


def _documents(
    file: SourceFile, field: TextField, columns: list[_Column], row: int, batch: "pa.RecordBatch"
) -> Iterator[Read]:
    """The documents of rows `row` and on."""
    values = [_values(batch, column) for column in columns]
    key, make = file.key, tuple.__new__
    if field.plain is not None:
        for number, text in enumerate(values[0], row):
            if text.__class__ is str:
                yield file, make(Document, (f"{key}#{number}", text))
            else:
                yield file, _joined(file, field, number, (text,))
        return
    for number, parts in enumerate(zip(*values, strict=True), row):
        yield file, _joined(file, field, number, parts)


def _joined(
    file: SourceFile, field: TextField, row: int, parts: tuple[str | bytes | None, ...]
) -> Document | BadDocument:
    key, place = f"{file.key}#{row}", f"{file.where} row {row:,}"
    pieces = [field.literals[0]]
    for name, part, literal in zip(field.names, parts, field.literals[1:], strict=True):
        if part is None:
            return BadDocument(key, f"{place} has no text in field {name!r}; it is null")
        if isinstance(part, bytes):
            try:
                pieces.append(part.decode())
            except UnicodeDecodeError as error:
                return BadDocument(key, not_utf8(f"{place} field {name!r}", part, error))
        else:
            pieces.append(part)
        pieces.append(literal)
    return Document(key, "".join(pieces))


def _values(batch: "pa.RecordBatch", column: _Column) -> list[str | bytes | None]:
    """A column's values; bytes where any of it is not UTF-8. Raises ArrowException where its offsets are broken."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array: Any = batch.column(column.path[0])
    for part in column.path[1:]:
        array = pc.struct_field(array, part)
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        if array.type not in (pa.string(), pa.large_string(), pa.string_view()):
            raise
        array = array.view(_binary_kinds()[(pa.string(), pa.large_string(), pa.string_view()).index(array.type)])
        array.validate(full=True)
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    values: list[str | bytes | None] = array.to_numpy(zero_copy_only=False).tolist()
    return values
