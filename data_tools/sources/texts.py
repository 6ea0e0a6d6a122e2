"""Reads a stream that is one text as a whole.

Knows UTF-8; nothing of records or fields.
"""

import io
from collections.abc import Iterator

from data_tools.sources.documents import BadDocument, Document
from data_tools.sources.files import SourceFile
from data_tools.sources.streams import MAX_DOCUMENT_BYTES, open_unpacked, read_whole

BOM = b"\xef\xbb\xbf"  # says UTF-8 at the beginning of a file, and is no part of its text


def read_text(file: SourceFile) -> Iterator[tuple[SourceFile, Document | BadDocument]]:
    """The file's one document."""
    with open_unpacked(file) as stream:
        yield file, text_document(file.key, file.where, stream)


def text_document(key: str, where: str, stream: io.BufferedReader) -> Document | BadDocument:
    """All that the stream holds, as a document."""
    content = read_whole(stream)
    if content is None:
        return BadDocument(key, f"{where} is one text of more than {MAX_DOCUMENT_BYTES:,} bytes")
    skip = len(BOM) if content.startswith(BOM) else 0
    try:
        return Document(key, content[skip:].decode() if skip else content.decode())
    except UnicodeDecodeError as error:
        return BadDocument(key, not_utf8(where, content[skip:], error, skip))


def not_utf8(where: str, content: bytes, error: UnicodeDecodeError, offset: int = 0) -> str:
    """Says which byte of what is no UTF-8; `offset`: where `content` begins."""
    return f"{where} is not UTF-8 at byte offset {offset + error.start:,} (byte 0x{content[error.start]:02x})"
