"""Reads the documents of a piece, whatever the format of its files.

Knows which file has which reader and which text field; the readers know the formats. What is read is given on at once,
so that memory holds one block, batch or document, not a file.
"""

from collections.abc import Iterator

from data_tools.sources.archives import read_tar
from data_tools.sources.columnar import read_columnar
from data_tools.sources.documents import BadDocument, Document
from data_tools.sources.fields import choose_text_field
from data_tools.sources.files import SourceFile, SourceOptions
from data_tools.sources.lines import read_lines
from data_tools.sources.pieces import Piece
from data_tools.sources.streams import naming
from data_tools.sources.texts import read_text


def read_piece(piece: Piece, options: SourceOptions) -> Iterator[tuple[SourceFile, Document | BadDocument]]:
    """The documents of a piece in the order of its files, and for each place without a usable one what is wrong there.

    Keys: that of the file for a whole text, KEY@OFFSET (in the unpacked bytes) for a line, KEY#ROW, KEY#MEMBER. A text
    may be empty. Raises CorpusError where a file is broken or gone, or has no such field.
    """
    for file in piece.files:
        whole = len(piece.files) > 1
        start, stop = (0, file.bytes) if whole else (piece.start, piece.stop)
        with naming(file):
            yield from _documents(file, start, stop, options)


def _documents(
    file: SourceFile, start: int, stop: int, options: SourceOptions
) -> Iterator[tuple[SourceFile, Document | BadDocument]]:
    if file.format == "text":
        return read_text(file)
    field = choose_text_field(options.text_fields, file.key)
    if file.format == "jsonl":
        return read_lines(file, field, start, stop)
    if file.format == "tar":
        return read_tar(file, field)
    return read_columnar(file, field, start, stop)
