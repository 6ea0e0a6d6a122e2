"""Reads the documents of tars of text, such as WebDataset's, from front to back.

Knows tar members by name and content. Nothing is unpacked to disk, run or unpickled. A member is a text (.txt), a JSON
object (.json) or lines of them (.jsonl); others are passed over. A tar that breaks off at a member's end looks whole to
tarfile, hence the care about its end.
"""

import io
import tarfile
from collections.abc import Iterator
from posixpath import splitext
from typing import IO, Any, cast

from data_tools.sources.documents import BadDocument, Document
from data_tools.sources.fields import TextField
from data_tools.sources.files import SourceFile, is_refused
from data_tools.sources.lines import JsonPlace, Read, examined_json, line_documents
from data_tools.sources.remote import printable
from data_tools.sources.streams import MAX_DOCUMENT_BYTES, buffered, open_unpacked, read_whole
from data_tools.sources.texts import text_document
from gptdist.errors import CorpusError

_BLOCK_BYTES = 512
_SKIP_BYTES = 1 << 20
_MAX_READ_BYTES = 16 << 20  # of the tar's own headers; texts are read in smaller parts


def read_tar(file: SourceFile, field: TextField) -> Iterator[Read]:
    """The documents of a tar. Keys are KEY#MEMBER, and KEY#MEMBER@OFFSET for a line of a member.

    A .json beside a .txt of the same name describes that text, and is no document of its own.
    """
    text_stem = ""  # of the last .txt
    waiting: tuple[str, str, bytes | None] | None = None  # a .json whose .txt may come yet: stem, name, content
    first = True
    for name, stream in _members(file):
        stem, suffix = splitext(name)
        if waiting and waiting[0] != stem:
            yield file, _json_document(file, field, *waiting[1:], first)
            waiting, first = None, False
        if suffix.lower() == ".txt":
            text_stem, waiting = stem, None
            yield file, text_document(f"{file.key}#{name}", _where(file, name), stream)
        elif suffix.lower() == ".json" and stem != text_stem:
            waiting = (stem, name, read_whole(stream))
        elif suffix.lower() == ".jsonl":
            place = JsonPlace(file, f"{file.key}#{name}", _where(file, name), first)
            yield from line_documents(place, field, stream)
            first = False
    if waiting:
        yield file, _json_document(file, field, *waiting[1:], first)


def _json_document(
    file: SourceFile, field: TextField, name: str, content: bytes | None, first: bool
) -> Document | BadDocument:
    key, where = f"{file.key}#{name}", _where(file, name)
    if content is None:
        return BadDocument(key, f"{where} is one text of more than {MAX_DOCUMENT_BYTES:,} bytes")
    return examined_json(JsonPlace(file, key, where, first), key, field, content)


def _where(file: SourceFile, name: str) -> str:
    return f"{file.where} member {name!r}"


def _members(file: SourceFile) -> Iterator[tuple[str, io.BufferedReader]]:
    """(name, content) of each file in a tar. The content is to be read before the next one is asked for, if at all."""
    seen: set[str] = set()
    with open_unpacked(file) as stream:
        forward = _Forward(stream)
        try:
            opened = cast(IO[bytes], forward)
            tar: Any = tarfile.TarFile(fileobj=opened, mode="r", encoding="utf-8", errors="surrogateescape")
            while (member := tar.next()) is not None:
                tar.members.clear()  # or it keeps them all
                name = _checked_name(file, member)
                if name in seen:
                    raise CorpusError(f"{_where(file, name)} is there twice. Make the tar anew, with each name once.")
                if not member.isdir():
                    seen.add(name)
                    yield name, buffered(_Content(forward, member.size), member.size)
        except tarfile.TarError as error:
            raise OSError(0, f"it is no whole tar ({error})") from None
        forward.check_end()


def _checked_name(file: SourceFile, member: tarfile.TarInfo) -> str:
    """The name of a member that may be looked at. Raises CorpusError."""
    parts = printable(member.name).replace("\\", "/").split("/")
    name = "/".join(part for part in parts if part not in ("", "."))
    where = f"{file.where} member {printable(member.name)!r}"
    if parts[0] == "" or ".." in parts:
        raise CorpusError(f"{where} is refused: its name leads out of the tar. Make the tar anew, with relative names.")
    if member.issparse() or not (member.isreg() or member.isdir()):
        raise CorpusError(f"{where} is refused: it is a link, a device or sparse. Make the tar anew, of files alone.")
    if is_refused(name):
        raise CorpusError(f"{where} is refused: files of its kind can run code when they are opened.")
    return name


class _Forward:
    """A stream with a position, which tarfile may move forward only."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._at = 0
        self._last = b""  # what was read last: in the end, the block in which tarfile saw no member

    def read(self, size: int, /) -> bytes:
        if size > _MAX_READ_BYTES:
            raise OSError(0, f"it has a header of {size:,} bytes at byte {self._at:,}")
        self._last = self._stream.read(size)
        self._at += len(self._last)
        return self._last

    def tell(self) -> int:
        return self._at

    def seek(self, position: int) -> None:
        if position < self._at:
            raise OSError(0, f"it goes back from byte {self._at:,} to {position:,}")
        while self._at < position and self.read(min(position - self._at, _SKIP_BYTES)):
            pass

    def check_end(self) -> None:
        """Raises OSError where the tar did not stop at its end mark, or has more behind it."""
        if self._last != bytes(_BLOCK_BYTES):
            raise OSError(0, f"it breaks off or is damaged at byte {self._at:,}, where no member begins")
        while self.read(_SKIP_BYTES):
            if self._last.count(0) != len(self._last):
                raise OSError(0, "it goes on behind its end mark, as tars do that were joined by cat")


class _Content(io.RawIOBase):
    """The next `size` bytes of a tar, the content of a member."""

    def __init__(self, tar: _Forward, size: int) -> None:
        self._tar = tar
        self._left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._left)
        content = self._tar.read(wanted)
        if len(content) < wanted:
            raise EOFError(f"it ends {self._left - len(content):,} bytes before the end of a member")
        buffer[:wanted] = content
        self._left -= wanted
        return wanted
