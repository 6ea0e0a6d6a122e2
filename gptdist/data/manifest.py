"""What a corpus says about itself: `manifest.json`, read into frozen values and written from them.

Knows the names and types of the fields and nothing of tokens, tars or ranks. The file carries a sha256 of itself, so
that a damaged or hand-edited manifest is noticed before its numbers are believed. A shard is one line of text in it,
understood when it is asked for: 100,000 shards open in a few hundredths of a second.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, overload

from gptdist.data.store import MANIFEST_FILE, Store, open_store
from gptdist.errors import CorpusError

FORMAT = "gptdist-corpus"
VERSION = 2
TOKENIZER_FILE = "tokenizer.json"
SPLITS = ("train", "validation")
SHARD_LINE = "file bytes sha256 tokens documents chunks"

_NO_CHECKSUM = "0" * 64
# So many shards are looked at when a manifest is opened, the others when they are asked for.
_CHECKED_AT_ONCE = 1000
_COUNT = "(0|[1-9][0-9]{0,17})"
_SHARD = re.compile(rf"((?!\.\.? )[^/\\\s]+) {_COUNT} ([0-9a-f]{{64}}) {_COUNT} {_COUNT} {_COUNT}")
_Fields = TypeVar("_Fields")


@dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the tokens; `sha256` is of the file beside the manifest and is its identity."""

    kind: str
    file: str
    sha256: str
    vocab_size: int
    end_of_text: int


@dataclass(frozen=True)
class IndexInfo:
    """The binary index of a split (`chunk_index.py`)."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardInfo:
    """One WebDataset tar; its chunks are the next `chunks` of the split's index."""

    file: str
    bytes: int
    sha256: str
    tokens: int
    documents: int
    chunks: int


class ShardLines(Sequence[ShardInfo]):
    """The shards of a split from their lines in the manifest. Asking for one raises CorpusError where it is damaged."""

    def __init__(self, lines: Sequence[str], chunks: int) -> None:
        self.lines = lines
        self.chunks = chunks

    @staticmethod
    def of(shards: Iterable[ShardInfo]) -> "ShardLines":
        shards = list(shards)
        return ShardLines([_shard_line(shard) for shard in shards], sum(shard.chunks for shard in shards))

    def largest_bytes(self) -> int:
        """Size of the largest shard; quick for any number of them."""
        try:
            return max((int(line.split(" ", 2)[1]) for line in self.lines), default=0)
        except (ValueError, IndexError):
            return max(shard.bytes for shard in self)  # says which line is damaged

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> ShardInfo: ...
    @overload
    def __getitem__(self, index: slice) -> "tuple[ShardInfo, ...]": ...
    def __getitem__(self, index: int | slice) -> "ShardInfo | tuple[ShardInfo, ...]":
        if isinstance(index, slice):
            return tuple(_shard(line) for line in self.lines[index])
        return _shard(self.lines[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self.lines))

    def __repr__(self) -> str:
        return f"<{len(self.lines)} shards>"


@dataclass(frozen=True)
class SplitInfo:
    """Totals of a split. `tokens` counts one end-of-text per document; `text_bytes` is UTF-8, without them."""

    tokens: int
    documents: int
    text_bytes: int
    index: IndexInfo
    shards: Sequence[ShardInfo]

    @property
    def chunks(self) -> int:
        return self.shard_lines.chunks

    @property
    def shard_lines(self) -> ShardLines:
        return self.shards if isinstance(self.shards, ShardLines) else ShardLines.of(self.shards)


@dataclass(frozen=True)
class Manifest:
    """A corpus. `build` records what it was built with: seed, fractions, what was left out."""

    tokenizer: TokenizerInfo
    dtype: str
    splits: Mapping[str, SplitInfo]
    build: Mapping[str, object]

    @staticmethod
    def load(corpus: "Path | str | Store") -> "Manifest":
        """Read the manifest of a corpus folder, of a corpus behind a URL, or of an open store.

        Raises CorpusError where it is missing, damaged or of another format.
        """
        store = open_store(corpus) if isinstance(corpus, Path | str) else corpus
        return _parse(store.read(MANIFEST_FILE), store.shown(MANIFEST_FILE))

    def split(self, name: str) -> SplitInfo:
        """The split called `name`. Raises CorpusError with the names there are."""
        if name not in self.splits:
            raise CorpusError(f"The corpus has no split {name!r}; it has {', '.join(self.splits)}.")
        return self.splits[name]

    def render(self) -> bytes:
        """The file's bytes: the same manifest always gives the same bytes."""
        fields = {
            "format": FORMAT,
            "version": VERSION,
            "checksum": _NO_CHECKSUM,
            "tokenizer": dataclasses.asdict(self.tokenizer),
            "dtype": self.dtype,
            "splits": {name: _split_fields(split) for name, split in self.splits.items()},
            "build": dict(self.build),
        }
        blank = (json.dumps(fields, indent=1) + "\n").encode()
        return blank.replace(_NO_CHECKSUM.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)


def _parse(content: bytes, path: str) -> Manifest:
    damaged = f"{path} is damaged or was edited by hand"
    remedy = "Build the corpus again, or copy it again from where it came."
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{damaged}: it is not JSON ({error}). {remedy}") from None
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        raise CorpusError(f"{path} does not describe a gptdist corpus: format is {found!r}, not {FORMAT!r}.")
    if raw.get("version") != VERSION:
        raise CorpusError(
            f"{path} is of format version {raw.get('version')!r}; this gptdist reads version {VERSION}. "
            "Use the gptdist that built it, or build it again."
        )
    checksum = str(raw.get("checksum"))
    before, _, after = content.partition(checksum.encode() or b"?")
    digest = hashlib.sha256(before + _NO_CHECKSUM.encode())
    digest.update(after)
    if digest.hexdigest() != checksum:
        raise CorpusError(f"{damaged}: its checksum does not fit its content. {remedy}")
    try:
        return _manifest(raw)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorpusError(f"{damaged}: {error}. {remedy}") from None


def _manifest(raw: dict[str, object]) -> Manifest:
    splits = raw["splits"]
    dtype = raw["dtype"]
    build = raw["build"]
    if not isinstance(splits, dict) or not isinstance(build, dict) or dtype not in ("uint16", "uint32"):
        raise ValueError(f"splits, build or dtype ({dtype!r}) is not what it must be")
    return Manifest(
        tokenizer=_fields(TokenizerInfo, raw["tokenizer"]),
        dtype=str(dtype),
        splits={str(name): _split(split) for name, split in splits.items()},
        build=build,
    )


def _split_fields(split: SplitInfo) -> dict[str, object]:
    return {
        "tokens": split.tokens,
        "documents": split.documents,
        "text_bytes": split.text_bytes,
        "chunks": split.chunks,
        "index": dataclasses.asdict(split.index),
        "shard_line": SHARD_LINE,
        "shards": list(split.shard_lines.lines),
    }


def _split(raw: dict[str, object]) -> SplitInfo:
    lines = raw["shards"]
    if not isinstance(lines, list) or set(map(type, lines)) - {str} or raw["shard_line"] != SHARD_LINE:
        raise ValueError("shards is not a list of lines of text")
    totals = {name: raw[name] for name in ("tokens", "documents", "text_bytes", "chunks")}
    for name, value in totals.items():
        _check_value(name, value, int)
    shards = ShardLines(lines, totals.pop("chunks"))  # type: ignore[arg-type]
    if len(shards) <= _CHECKED_AT_ONCE:
        tuple(shards)
    return SplitInfo(index=_fields(IndexInfo, raw["index"]), shards=shards, **totals)  # type: ignore[arg-type]


def _shard_line(shard: ShardInfo) -> str:
    return f"{shard.file} {shard.bytes} {shard.sha256} {shard.tokens} {shard.documents} {shard.chunks}"


def _shard(line: str) -> ShardInfo:
    match = _SHARD.fullmatch(line)
    if not match:
        raise CorpusError(
            f"The manifest of the corpus is damaged: a shard is {line[:200]!r}, not {SHARD_LINE!r} with a "
            "plain name of a file. Build the corpus again, or copy it again from where it came."
        )
    file, size, sha256, *counts = match.groups()
    return ShardInfo(file, int(size), sha256, *map(int, counts))


def _fields(kind: type[_Fields], raw: object) -> _Fields:
    if not isinstance(raw, dict):
        raise ValueError(f"{kind.__name__} is {type(raw).__name__}, not an object")
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        _check_value(field.name, raw.get(field.name), field.type)
    return kind(**raw)


def _check_value(name: str, value: object, kind: object) -> None:
    if kind is int and (type(value) is not int or value < 0):
        raise ValueError(f"{name} is {value!r}, not a count")
    if kind is str and not isinstance(value, str):
        raise ValueError(f"{name} is {value!r}, not text")
    if name == "file" and (value in ("", ".", "..") or "/" in str(value) or "\\" in str(value)):
        raise ValueError(f"file {value!r} is not a plain name inside the corpus folder")
