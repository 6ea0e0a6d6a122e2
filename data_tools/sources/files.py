"""Finds the files that the user's sources name: files, folders, globs, URLs, and datasets saved by Hugging Face.

Knows names, sizes and which format a name stands for; reads no text. Keys and order do not depend on the machine.
"""

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from posixpath import splitext

from data_tools.sources.fields import parse_text_field
from data_tools.sources.remote import Listing, list_url, printable, shown_url, url_bytes
from data_tools.sources.saved_datasets import saved_datasets
from gptdist.errors import CorpusError

DEFAULT_SUFFIXES = (
    *(".txt", ".jsonl", ".md", ".rst", ".py"),
    *(".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", ".tar"),
)
DEFAULT_EXCLUDE = ("site-packages", "dist-packages", "node_modules", "__pycache__")

# These can run what they say when they are opened by other programs; no file or member of such a name is touched.
REFUSED_SUFFIXES = (".pyd", ".pickle", ".pkl", ".pt", ".pth")

_FORMATS = {".jsonl": "jsonl", ".parquet": "parquet", ".arrow": "arrow", ".tar": "tar"}
_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}


@dataclass(frozen=True)
class SourceOptions:
    """How sources are read. `on_bad_text`: "error" stops at broken encoding or JSON, "skip" counts it and goes on.

    `text_fields`: see `fields.parse_text_field`; the last one that matches a file holds for it.
    """

    suffixes: tuple[str, ...] = DEFAULT_SUFFIXES
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    text_fields: tuple[str, ...] = ("text",)
    on_bad_text: str = "error"

    def __post_init__(self) -> None:
        if self.on_bad_text not in ("error", "skip"):
            raise CorpusError(f"on_bad_text is {self.on_bad_text!r}; it must be 'error' or 'skip'.")
        for suffix in self.suffixes:
            if not suffix.startswith(".") or suffix.lower().endswith(REFUSED_SUFFIXES):
                raise CorpusError(f"Suffix {suffix!r} is not for text: it must begin with a full stop, as in .txt.")
        for entry in self.text_fields:
            parse_text_field(entry)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read. `source` counts the user's sources from 0; `url` is an absolute path or a URL.

    A URL can hold credentials: show `where` instead.
    """

    key: str
    url: str = field(repr=False)
    bytes: int
    format: str  # text, jsonl, parquet, arrow or tar
    source: int
    compression: str = ""  # gzip, zstd, bz2 or xz

    @property
    def where(self) -> str:
        """The path or URL for messages."""
        return shown_url(self.url)

    @property
    def is_local(self) -> bool:
        """Whether it is a path on this machine."""
        return "://" not in self.url


def find_files(sources: Sequence[str | os.PathLike[str]], options: SourceOptions) -> list[SourceFile]:
    """Every file of the sources, by key: its path in the source, after the source's name if it is not alone.

    Folders are walked without links, hidden names and `options.exclude`. Raises CorpusError for a source that does not
    exist, holds nothing to read, or is of a kind that is not read.
    """
    files: dict[str, SourceFile] = {}
    for number, named in enumerate(sources):
        source = os.fspath(named)
        name, listing, single = _list_source(source, options)
        if not single:
            listing = _selected(listing, source, options)
        prefix = f"{name}/" if len(sources) > 1 and not single and name else ""
        for below, (url, size) in sorted(listing.items()):  # however the file system lists it
            kind, compression = _format_of(below, options, shown_url(url))
            key = _unique(printable(prefix + below), files)
            files[key] = SourceFile(key, url, url_bytes(url) if size is None else size, kind, number, compression)
    if not files:
        raise CorpusError("No document in no source. Name files or folders with text.")
    _check_member_keys(files)
    return sorted(files.values(), key=lambda file: file.key)


def is_refused(name: str) -> bool:
    """Whether a file or member of this name is refused, compressed or not."""
    stem, suffix = splitext(name.lower())
    return (stem if suffix in _COMPRESSIONS else stem + suffix).endswith(REFUSED_SUFFIXES)


def _list_source(source: str, options: SourceOptions) -> tuple[str, Listing, bool]:
    """What a source names: (its own name, what lies below it, whether it is one file)."""
    if source.startswith("pipe:") or source.strip().startswith("|") or source.endswith("|"):
        raise CorpusError(f"Source {source.split(':')[0]!r} is a command; commands are not run. Name files or folders.")
    if source.startswith("file://"):
        source = source.removeprefix("file://")
        if not source.startswith("/"):
            raise CorpusError(f"Source file://{source} names a host. Write file:///PATH with three slashes.")
    if "://" in source:
        return list_url(source)
    shown = printable(source)
    try:
        status = os.stat(source)
    except OSError as error:
        if not glob.has_magic(source):
            what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            raise CorpusError(f"Source {shown} {what}. Name a file, a folder, or a glob such as *.jsonl.") from None
        return _list_glob(source, options)
    path = Path(source).absolute()
    if stat.S_ISDIR(status.st_mode):
        return path.resolve().name, dict(_walk(path, path, options)), False
    if not stat.S_ISREG(status.st_mode):
        raise CorpusError(f"Source {shown} is neither a file nor a folder. Name a file, a folder, or a glob.")
    return path.name, {path.name: (str(path), status.st_size)}, True


def _list_glob(pattern: str, options: SourceOptions) -> tuple[str, Listing, bool]:
    """The files that a glob matches, and those in folders that it matches, below its part without wildcards."""
    fixed = PurePosixPath(pattern)
    while glob.has_magic(str(fixed)):
        fixed = fixed.parent
    root = Path(fixed).absolute()
    listing: Listing = {}
    for match in map(Path, glob.iglob(pattern, recursive=True)):
        path = match.absolute()
        if path.is_dir():
            listing.update(_walk(path, root, options))
        elif path.is_file():
            listing[path.relative_to(root).as_posix()] = (str(path), path.stat().st_size)
    return root.resolve().name, listing, False


def _walk(folder: Path, root: Path, options: SourceOptions) -> Iterator[tuple[str, tuple[str, int | None]]]:
    def fail(error: OSError) -> None:
        raise CorpusError(f"Folder {printable(str(error.filename))} cannot be read: {error.strerror}.") from None

    for current, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if name not in options.exclude and not name.startswith(".")]
        for name in names:
            path = os.path.join(current, name)
            try:
                status = os.stat(path)
            except OSError:  # a link to nothing
                continue
            if stat.S_ISREG(status.st_mode):
                yield Path(path).relative_to(root).as_posix(), (path, status.st_size)


def _selected(listing: Listing, source: str, options: SourceOptions) -> Listing:
    """What is to be read of a folder or glob. Raises CorpusError where that is nothing."""
    suffixes = tuple(suffix.lower() for suffix in options.suffixes)
    saved = saved_datasets(listing)
    # A suffix that a glob spells out is asked for, whatever is taken from folders.
    asked = PurePosixPath(source.lower()).name if glob.has_magic(source) else ""
    spelled = tuple(suffix for suffix in _known_suffixes() if asked.endswith(suffix))
    chosen: Listing = {}
    for below, entry in listing.items():
        folder, _, name = below.rpartition("/")
        if any(part in options.exclude or part.startswith(".") for part in folder.split("/")) or name.startswith("."):
            continue
        if folder in saved and name.endswith(".arrow"):
            wanted = name in saved[folder] and ".arrow" in suffixes
        else:
            wanted = name.lower().endswith((*suffixes, *spelled))
        if wanted:
            chosen[below] = entry
    if not chosen:
        held = f" ({len(listing):,} of other kinds)" if listing else ""
        raise CorpusError(
            f"No document in {shown_url(source)}{held}. Folders and globs are searched for {', '.join(suffixes)}; "
            "choose others with --suffixes."
        )
    return chosen


def _format_of(name: str, options: SourceOptions, shown: str) -> tuple[str, str]:
    """(format, compression) that a name stands for. Raises CorpusError where it is not one that is read."""
    if is_refused(name):
        raise CorpusError(f"Source {shown} is refused: files of its kind can run code when they are opened.")
    path = PurePosixPath(name.lower())
    compression = _COMPRESSIONS.get(path.suffix, "")
    inner = PurePosixPath(path.stem) if compression else path
    kind = _FORMATS.get(inner.suffix)
    if path.suffix == ".tgz":
        kind, compression = "tar", "gzip"
    if kind in ("parquet", "arrow") and compression:
        raise CorpusError(f"Source {shown} cannot be read compressed as a whole. Unpack it; {kind} compresses inside.")
    if kind is None and (not inner.suffix or path.name.endswith(tuple(map(str.lower, options.suffixes)))):
        kind = "text"
    if kind is None and inner.suffix in _text_suffixes(options):
        kind = "text"
    if kind is None:
        raise CorpusError(
            f"Source {shown} is of a kind that is not read ({''.join(path.suffixes[-2:])}). Read are "
            f"{', '.join(_FORMATS)} and plain text ({', '.join(_text_suffixes(options))}), each also as .gz, .zst, "
            ".bz2 or .xz but for .parquet and .arrow. If it is plain text, name its suffix with --suffixes; if not, "
            "convert it."
        )
    return kind, compression


def _text_suffixes(options: SourceOptions) -> list[str]:
    """Suffixes of plain text, without those of compressions."""
    bare = (PurePosixPath(f"x{suffix.lower()}") for suffix in options.suffixes)
    kinds = (PurePosixPath(path.stem).suffix if path.suffix in _COMPRESSIONS else path.suffix for path in bare)
    return [kind for kind in dict.fromkeys(kinds) if kind and kind not in _FORMATS]


def _known_suffixes() -> Iterator[str]:
    for suffix in (*_FORMATS, *DEFAULT_SUFFIXES):
        yield from (suffix, *(suffix + packed for packed in _COMPRESSIONS))


def _unique(key: str, taken: dict[str, SourceFile]) -> str:
    number, unique = 2, key
    while unique in taken:  # two sources of the same name
        unique, number = f"{key}~{number}", number + 1
    return unique


def _check_member_keys(files: dict[str, SourceFile]) -> None:
    """Raises CorpusError where a file's key could also be that of a tar's member."""
    for key in files:
        tar = key.partition(".tar#")[0] + ".tar"
        if ".tar#" in key and tar in files:
            raise CorpusError(f"Files {tar} and {key} can give documents of the same key. Rename the second.")
