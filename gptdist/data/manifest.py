"""What a corpus folder says about itself: `manifest.json`, read into frozen values and written from them.

Knows the names and types of the fields and nothing of tokens, tars or ranks. The file carries a sha256 of itself, so
that a damaged or hand-edited manifest is noticed before its numbers are believed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gptdist.errors import CorpusError

FORMAT = "gptdist-corpus"
VERSION = 1
MANIFEST_FILE = "manifest.json"
TOKENIZER_FILE = "tokenizer.json"
SPLITS = ("train", "validation")

_NO_CHECKSUM = "0" * 64
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


@dataclass(frozen=True)
class SplitInfo:
    """Totals of a split. `tokens` counts one end-of-text per document; `text_bytes` is UTF-8, without them."""

    tokens: int
    documents: int
    text_bytes: int
    index: IndexInfo
    shards: tuple[ShardInfo, ...]

    @property
    def chunks(self) -> int:
        return sum(shard.chunks for shard in self.shards)


@dataclass(frozen=True)
class Manifest:
    """A corpus. `build` records what it was built with: seed, fractions, what was left out."""

    tokenizer: TokenizerInfo
    dtype: str
    splits: Mapping[str, SplitInfo]
    build: Mapping[str, object]

    @staticmethod
    def load(corpus_dir: Path) -> "Manifest":
        """Read `corpus_dir/manifest.json`. Raises CorpusError where it is missing, damaged or of another format."""
        path = Path(corpus_dir) / MANIFEST_FILE
        return _parse(_read_bytes(path), path)

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
            "splits": {name: dataclasses.asdict(split) for name, split in self.splits.items()},
            "build": dict(self.build),
        }
        blank = (json.dumps(fields, indent=1) + "\n").encode()
        return blank.replace(_NO_CHECKSUM.encode(), hashlib.sha256(blank).hexdigest().encode(), 1)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        what = "has no manifest.json" if path.parent.is_dir() else "does not exist"
        raise CorpusError(
            f"{path.parent} is not a corpus: it {what}. Build one with `gptdist data build SOURCE... --out "
            f"{path.parent}`, or set data.corpus to a folder that was built so."
        ) from None
    except OSError as error:
        raise CorpusError(f"{path} cannot be read: {error.strerror}.") from None


def _parse(content: bytes, path: Path) -> Manifest:
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
    blank = content.replace(checksum.encode(), _NO_CHECKSUM.encode(), 1)
    if hashlib.sha256(blank).hexdigest() != checksum:
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


def _split(raw: dict[str, object]) -> SplitInfo:
    shards = raw["shards"]
    if not isinstance(shards, list):
        raise ValueError("shards is not a list")
    totals = {name: raw[name] for name in ("tokens", "documents", "text_bytes")}
    for name, value in totals.items():
        _check_value(name, value, int)
    return SplitInfo(
        **totals,  # type: ignore[arg-type]
        index=_fields(IndexInfo, raw["index"]),
        shards=tuple(_fields(ShardInfo, shard) for shard in shards),
    )


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
