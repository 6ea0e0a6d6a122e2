"""Cuts the list of source files into pieces of bounded size, the units of parallel work.

A pure function of the list: no file is opened, nothing depends on how many workers there are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from data_tools.sources.files import SourceFile

# Opening a file costs about as much as reading this many bytes; so that a piece never holds a million empty files.
_OPENING_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Piece:
    """Several whole files, or bytes [start, stop) of one: what begins there belongs to the piece.

    A line of .jsonl and a record batch of an Arrow stream begin at their first byte. Rows of the others have no such
    place: those of a row group begin at the same share of the file's bytes as their first row is of the file's rows.
    """

    number: int
    files: tuple[SourceFile, ...]
    start: int
    stop: int


def cut_pieces(files: Sequence[SourceFile], piece_bytes: int) -> list[Piece]:
    """Every byte of the files in exactly one piece, in their order.

    A piece is at most `piece_bytes` of files as they are stored, or one file that cannot be cut.
    """
    if piece_bytes < 1:
        raise ValueError(f"piece_bytes is {piece_bytes}; a piece holds at least 1 byte")
    pieces: list[Piece] = []
    group: list[SourceFile] = []
    cost = 0

    def close_group() -> None:
        if group:
            pieces.append(Piece(len(pieces), tuple(group), 0, sum(file.bytes for file in group)))
            group.clear()

    for file in files:
        if file.bytes > piece_bytes and _can_be_cut(file):
            close_group()
            count = -(-file.bytes // piece_bytes)
            bounds = [file.bytes * number // count for number in range(count + 1)]
            pieces += [
                Piece(len(pieces) + number, (file,), start, stop)
                for number, (start, stop) in enumerate(pairwise(bounds))
            ]
            continue
        file_cost = max(file.bytes, _OPENING_BYTES)
        if cost + file_cost > piece_bytes or not group:
            close_group()
            cost = 0
        group.append(file)
        cost += file_cost
    close_group()
    return pieces


def _can_be_cut(file: SourceFile) -> bool:
    """Whether reading a part costs about that part of reading the whole."""
    if file.format == "parquet":
        return True
    if file.format == "arrow":  # batches before the part are passed over without reading them, in mapped memory only
        return file.is_local
    # Not every web server gives a file from its middle.
    return file.format == "jsonl" and not file.compression and not file.url.startswith(("http://", "https://"))
