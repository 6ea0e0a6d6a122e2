"""Reads the documents of JSON lines, the format in which most text comes, about as fast as the JSON parser runs.

Knows bytes, lines and JSON; does not know where the bytes come from. A line is one document; blank lines are none.
"""

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_tools.sources.documents import BadDocument, Document
from data_tools.sources.fields import NoText, TextField
from data_tools.sources.files import SourceFile
from data_tools.sources.streams import BUFFER_BYTES, MAX_DOCUMENT_BYTES, open_unpacked
from data_tools.sources.texts import BOM, not_utf8
from gptdist.errors import CorpusError

Read = tuple[SourceFile, Document | BadDocument]


@dataclass(frozen=True, slots=True)
class JsonPlace:
    """A file or member of JSON. `first`: a field that its very first record lacks is the user's mistake."""

    file: SourceFile
    key: str
    where: str
    first: bool = True


def read_lines(file: SourceFile, field: TextField, start: int, stop: int) -> Iterator[Read]:
    """The documents of the lines that begin in bytes [start, stop) of the file; of all where it is compressed."""
    place = JsonPlace(file, file.key, file.where)
    with open_unpacked(file) as stream:
        if file.compression:
            yield from line_documents(place, field, stream)
            return
        first = _seek_line(stream, start, stop)
        if first < stop:
            yield from line_documents(place, field, stream, first, stop)


def line_documents(
    place: JsonPlace, field: TextField, stream: io.BufferedReader, start: int = 0, stop: int | None = None
) -> Iterator[Read]:
    """The documents of the lines that begin in [start, stop), from a stream that goes on at `start`.

    Keys are KEY@OFFSET. Raises EOFError where the stream ends before `stop`.
    """
    file, key = place.file, place.key
    loads, pick = _parser(field)
    make = tuple.__new__  # a third of the time of Document(...)
    offset = start
    end = sys.maxsize if stop is None else stop
    for line in iter(partial(stream.readline, MAX_DOCUMENT_BYTES), b""):
        try:
            text = pick(loads(line))
            usable = text.__class__ is str
        except Exception:
            usable = False
        if usable:
            yield file, make(Document, (f"{key}@{offset}", text))
        elif len(line) == MAX_DOCUMENT_BYTES:
            limit = f"a line of more than {MAX_DOCUMENT_BYTES:,} bytes"
            yield file, BadDocument(f"{key}@{offset}", f"{place.where} has {limit} at byte offset {offset:,}")
            while line and not line.endswith(b"\n"):
                offset += len(line)
                line = stream.readline(BUFFER_BYTES)
        elif not line.isspace():
            yield file, examined_json(place, f"{key}@{offset}", field, line, offset)
        offset += len(line)
        if offset >= end:
            return
    if offset < (stop or 0):
        raise EOFError(f"it ends at byte {offset:,}, before byte {stop:,}")


def examined_json(
    place: JsonPlace, key: str, field: TextField, content: bytes, offset: int = 0
) -> Document | BadDocument:
    """The document of one JSON object, or what is wrong with it. `offset`: of its first byte.

    Raises CorpusError where the field is missing in the very first record.
    """
    at = f"{place.where} at byte offset {offset:,}"
    skip = len(BOM) if offset == 0 and content.startswith(BOM) else 0
    try:
        record = json.loads(content[skip:].decode())
        if not isinstance(record, dict):
            kind = type(record).__name__
            return BadDocument(key, f"{at} is a JSON {kind}, not an object with a field {field.names[0]!r}")
        text = field.text_of(record)
        text.encode()
    except UnicodeDecodeError as error:
        return BadDocument(key, not_utf8(place.where, content[skip:], error, offset + skip))
    except UnicodeEncodeError:
        return BadDocument(key, f"{at} spells half of a surrogate pair, which is no Unicode text")
    except json.JSONDecodeError as error:
        return BadDocument(key, f"{at} is not JSON: {error.msg} at character {error.pos + 1:,}")
    except (ValueError, RecursionError) as error:  # a number of too many digits, brackets too deep
        return BadDocument(key, f"{at} is not JSON: {error}")
    except NoText as error:
        if error.missing and place.first and offset == 0:
            raise CorpusError(f"{at} {error}. Name the field with --text-field.") from None
        return BadDocument(key, f"{at} {error}")
    return Document(key, text)


def _seek_line(stream: io.BufferedReader, start: int, stop: int) -> int:
    """Go to the first line that begins at or after `start`, or to somewhere from `stop` on if none does before."""
    if start == 0:
        return 0
    at = start - 1  # a line end there is one before `start`
    stream.seek(at)
    while at < stop:
        part = stream.readline(BUFFER_BYTES)
        at += len(part)
        if not part or part.endswith(b"\n"):
            break
    return at


def _parser(field: TextField) -> tuple[Callable[[bytes], Any], Callable[[Any], Any]]:
    """(a line's record, a record's text). Either raises for what `examined_json` is to look at again."""
    pick = field.picker()
    try:
        import orjson
    except ImportError:

        def encodable(record: Any) -> str:
            text: str = pick(record)
            text.encode()  # orjson refuses half a surrogate pair by itself
            return text

        return lambda line: json.loads(line.decode()), encodable
    return orjson.loads, pick
