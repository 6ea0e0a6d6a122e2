"""Finds the documents in the given files and folders, and reads one when asked.

Knows .txt-like files (one document each) and .jsonl (one a line); nothing of tokens, splits or shards. A scan keeps
where each document lies, not its text, so memory grows with the number of documents only. Keys and order do not depend
on the machine.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptdist.errors import CorpusError

DEFAULT_SUFFIXES = (".txt", ".jsonl", ".md", ".rst", ".py")
DEFAULT_EXCLUDE = ("site-packages", "dist-packages", "node_modules", "__pycache__")

# Told apart from text only to give a better message than "not UTF-8".
_NOT_TEXT = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".parquet", ".arrow", ".npy", ".bin")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SourceOptions:
    """How sources are read. `on_bad_text`: "error" stops at broken encoding or JSON, "skip" counts it and goes on."""

    suffixes: tuple[str, ...] = DEFAULT_SUFFIXES
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    text_field: str = "text"
    on_bad_text: str = "error"


@dataclass(frozen=True, slots=True)
class Document:
    """Where a document is. `line` counts from 1 in a .jsonl file, 0: the whole file. `digest` is of its text."""

    key: str
    path: Path
    offset: int
    length: int
    line: int
    text_bytes: int
    digest: bytes


@dataclass(frozen=True)
class Scan:
    """What the sources hold: documents by key, and how many were left out as broken or as having no text."""

    documents: list[Document]
    skipped: int
    empty: int


class _BadText(Exception):
    """Text that cannot be decoded or parsed; the message says where and why."""


def scan_sources(sources: Sequence[Path], options: SourceOptions, progress: Progress) -> Scan:
    """Read every document once, to find and check it. Raises CorpusError for what is missing, broken or empty."""
    files = find_files(sources, options)
    total = sum(path.stat().st_size for _, path in files)
    documents: list[Document] = []
    skipped = empty = done = 0
    for key, path in files:
        for found in _file_documents(key, path, options):
            if found is None:
                skipped += 1
            elif found.text_bytes == 0:
                empty += 1
            else:
                documents.append(found)
        done += path.stat().st_size
        progress("read", done, total)
    if not documents:
        left_out = f" ({empty} had no text, {skipped} were broken and skipped)" if files else ""
        raise CorpusError(
            f"No document in {', '.join(str(source) for source in sources) or 'no source'}{left_out}. Name files or "
            f"folders with text; folders are searched for {', '.join(options.suffixes)}."
        )
    return Scan(documents, skipped, empty)


def read_document(document: Document, options: SourceOptions) -> str:
    """The text of a document found by `scan_sources`. Raises CorpusError where it has changed since."""
    try:
        with document.path.open("rb") as file:
            file.seek(document.offset)
            content = file.read(document.length)
        text = _json_text(content, document, options) if document.line else content.decode()
    except (OSError, UnicodeDecodeError, _BadText):
        text = ""
    if text_digest(text) != document.digest:
        raise CorpusError(f"{document.path} changed while the corpus was being built. Build again when it is at rest.")
    return text


def text_digest(text: str) -> bytes:
    """128 bits that stand for a text: equal texts, equal digests."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def find_files(sources: Sequence[Path], options: SourceOptions) -> list[tuple[str, Path]]:
    """(key, path) of every file, by key: its path in the source, after the source's name if it is not alone."""
    files: dict[str, Path] = {}
    for source in sources:
        source = Path(source)
        if source.is_dir():
            prefix = f"{source.resolve().name}/" if len(sources) > 1 else ""
            found = {prefix + path.relative_to(source).as_posix(): path for path in _walk(source, options)}
        elif source.exists():
            if source.suffix.lower() in _NOT_TEXT:
                raise CorpusError(f"Source {source} is not text. Unpack or convert it to .txt or .jsonl first.")
            found = {source.name: source}
        else:
            raise CorpusError(f"Source {source} does not exist. Name a .txt or .jsonl file, or a folder of them.")
        for key, path in found.items():
            number = 2
            unique = key
            while unique in files:  # two sources of the same name
                unique, number = f"{key}~{number}", number + 1
            files[unique] = path
    return sorted(files.items())


def _walk(folder: Path, options: SourceOptions) -> Iterator[Path]:
    for current, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in options.exclude and not name.startswith(".")]
        for name in names:
            path = Path(current, name)
            if path.suffix.lower() in options.suffixes and path.is_file():
                yield path


def _file_documents(key: str, path: Path, options: SourceOptions) -> Iterator[Document | None]:
    """The documents of one file; None for each that is broken and to be skipped."""
    try:
        if path.suffix.lower() == ".jsonl":
            yield from _line_documents(key, path, options)
        else:
            content = path.read_bytes()
            yield _checked(Document(key, path, 0, len(content), 0, 0, b""), content, options)
    except OSError as error:
        raise CorpusError(f"Source {path} cannot be read: {error.strerror}.") from None


def _line_documents(key: str, path: Path, options: SourceOptions) -> Iterator[Document | None]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _checked(Document(f"{key}#{number}", path, offset, len(line), number, 0, b""), line, options)
            offset += len(line)


def _checked(document: Document, content: bytes, options: SourceOptions) -> Document | None:
    """The document with its digest and size; None where it is broken and broken ones are skipped."""
    try:
        try:
            text = _json_text(content, document, options) if document.line else content.decode()
        except UnicodeDecodeError as error:
            raise _BadText(
                f"{document.path} is not UTF-8 at byte offset {document.offset + error.start:,} (byte "
                f"0x{content[error.start]:02x})"
            ) from None
    except _BadText as error:
        if options.on_bad_text == "skip":
            return None
        raise CorpusError(f"{error}. Mend it, or leave such documents out with --on-bad-text skip.") from None
    text_bytes = len(text.encode()) if text.strip() else 0
    return Document(
        document.key, document.path, document.offset, document.length, document.line, text_bytes, text_digest(text)
    )


def _json_text(content: bytes, document: Document, options: SourceOptions) -> str:
    """The text in one line of a .jsonl file."""
    where = f"{document.path}:{document.line}"
    line = content.decode()
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _BadText(f"{where} is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _BadText(f"{where} is a JSON {type(fields).__name__}, not an object with a field {options.text_field!r}")
    text = fields.get(options.text_field)
    if not isinstance(text, str):
        have = f"its fields are {', '.join(map(repr, fields))}" if text is None else f"it is {type(text).__name__}"
        raise CorpusError(
            f"{where} has no text in field {options.text_field!r}; {have}. Name the field with --text-field."
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _BadText(f"{where} spells half of a surrogate pair, which is no Unicode text") from None
    return text
