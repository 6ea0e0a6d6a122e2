"""What a build is asked to do and from which files: checked, listed, and named by a fingerprint.

Knows options and file lists; does no work. Two builds with one fingerprint give the same bytes, so one may go on where
the other stopped.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from data_tools.sources.files import DEFAULT_EXCLUDE, DEFAULT_SUFFIXES, SourceFile, SourceOptions, find_files
from data_tools.sources.pieces import Piece, cut_pieces
from gptdist.errors import CorpusError

# Raised when the same sources and options come to give other bytes: older unfinished work is then of no use.
BUILD_VERSION = 2

# A piece is what one task reads, a run what it holds in memory. Larger corpora take larger ones, so that shards, which
# take a slice of every run, do not meet too many of them.
SMALLEST_PIECE_BYTES = 32 << 20
LARGEST_PIECE_BYTES = 256 << 20
MOST_PIECES = 8192

MOST_SOURCES = 1000
OTHER_SOURCES = "other"


@dataclass(frozen=True)
class BuildOptions:
    """Everything that decides the bytes of a corpus, but the text itself."""

    tokenizer: str
    end_of_text: str | None = None
    validation_fraction: float = 0.05
    seed: int = 1234
    chunk_tokens: int = 1 << 20
    shard_bytes: int = 128 << 20
    max_bytes: int | None = None
    text_fields: tuple[str, ...] = ("text",)
    suffixes: tuple[str, ...] = DEFAULT_SUFFIXES
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    on_bad_text: Literal["error", "skip"] = "error"
    normalize: Literal["none", "nfc", "nfkc"] = "none"
    min_document_bytes: int = 1
    max_document_bytes: int | None = None
    dedup: Literal["none", "exact", "near"] = "none"
    near_threshold: float = 0.8

    def check(self) -> None:
        """Raises CorpusError for the first value that cannot be."""
        if not 0 <= self.validation_fraction < 1:
            raise CorpusError(f"The validation fraction is {self.validation_fraction}; it must be at least 0, below 1.")
        if not 0 < self.near_threshold <= 1:
            raise CorpusError(f"The near-duplicate threshold is {self.near_threshold}; it must be above 0, at most 1.")
        for name in ("chunk_tokens", "shard_bytes", "max_bytes", "min_document_bytes", "max_document_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CorpusError(f"{name} is {value}; it must be at least 1.")
        if self.max_document_bytes is not None and self.max_document_bytes < self.min_document_bytes:
            raise CorpusError(
                f"max_document_bytes ({self.max_document_bytes}) is below min_document_bytes "
                f"({self.min_document_bytes}): no document could be kept."
            )
        choices = {"on_bad_text": ("error", "skip"), "normalize": ("none", "nfc", "nfkc"), "dedup": _DEDUP}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise CorpusError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}.")

    def reading(self) -> SourceOptions:
        """The part that readers of sources need."""
        return SourceOptions(
            suffixes=self.suffixes,
            exclude=self.exclude,
            text_fields=self.text_fields,
            on_bad_text=self.on_bad_text,
        )


_DEDUP = ("none", "exact", "near")


@dataclass(frozen=True)
class Plan:
    """Options, files and pieces. `held_out`, `evaluation`: files that validate, and files to decontaminate against."""

    options: BuildOptions
    files: tuple[SourceFile, ...]
    held_out: tuple[SourceFile, ...]
    evaluation: tuple[SourceFile, ...]
    sources: tuple[str, ...]  # what a report calls the places texts come from, by SourceFile.source
    piece_bytes: int  # what one task reads and holds; the corpus does not depend on it

    @property
    def text_bytes(self) -> int:
        """Bytes of the files that become the corpus, as they lie on the disk."""
        return sum(file.bytes for file in (*self.files, *self.held_out))

    def pieces(self) -> list[Piece]:
        """What is read, in the order of keys; those from `held_out_from` on are held-out text."""
        return [*self._own_pieces, *cut_pieces(self.held_out, self.piece_bytes)]

    def sample_pieces(self) -> list[Piece]:
        """What a tokenizer may be trained on, cut the same whatever `piece_bytes` is: the corpus depends on these."""
        return cut_pieces(self.files, SMALLEST_PIECE_BYTES)

    @property
    def held_out_from(self) -> int:
        return len(self._own_pieces)

    @cached_property
    def _own_pieces(self) -> list[Piece]:
        return cut_pieces(self.files, self.piece_bytes)  # of millions of files, asked for in every task

    def identity(self) -> dict[str, Any]:
        """What the corpus is made from, whatever the machine: part of the manifest."""
        files = {
            name: hashlib.sha256(json.dumps([(file.key, file.bytes) for file in files]).encode()).hexdigest()
            for name, files in (("sources", self.files), ("held_out", self.held_out), ("evaluation", self.evaluation))
            if files
        }
        options = json.loads(json.dumps(dataclasses.asdict(self.options)))  # lists, as a manifest holds them
        return {"version": BUILD_VERSION, "options": options, "files": files}

    def to_dict(self) -> dict[str, Any]:
        """JSON, with the fingerprint."""
        raw: dict[str, Any] = {
            **{
                name: [dict(zip(_FIELDS, _values(file), strict=True)) for file in getattr(self, name)]
                for name in _FILES
            },
            "options": dataclasses.asdict(self.options),
            "sources": list(self.sources),
            "piece_bytes": self.piece_bytes,
        }
        local = (file for name in _FILES for file in getattr(self, name) if file.is_local)
        raw["changed"] = {file.url: changed_at(file) for file in local}
        content = json.dumps([BUILD_VERSION, raw]).encode()
        return {**raw, "fingerprint": hashlib.sha256(content).hexdigest()}

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "Plan":
        """The inverse of `to_dict`."""
        options: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in raw["options"].items()
        }
        files = {name: tuple(SourceFile(**file) for file in raw[name]) for name in _FILES}
        return Plan(
            BuildOptions(**options), sources=tuple(raw["sources"]), piece_bytes=int(raw["piece_bytes"]), **files
        )


_FILES = ("files", "held_out", "evaluation")
_FIELDS = tuple(field.name for field in dataclasses.fields(SourceFile))
_values = attrgetter(*_FIELDS)  # dataclasses.asdict takes thirty times as long, and there may be millions


def make_plan(
    sources: Sequence[str],
    held_out: Sequence[str],
    evaluation: Sequence[str],
    options: BuildOptions,
    piece_bytes: int | None = None,
) -> Plan:
    """List what the sources hold. Raises CorpusError for what is missing, unknown or empty."""
    options.check()
    reading = options.reading()
    files = find_files(sources, reading)
    kept_aside = find_files(held_out, reading) if held_out else []
    names = {name: number for number, name in enumerate(_source_names([*files, *kept_aside]))}
    plan = Plan(
        options,
        tuple(_labelled(file, names) for file in files),
        tuple(_labelled(file, names) for file in kept_aside),
        tuple(find_files(evaluation, reading)) if evaluation else (),
        tuple(names),
        piece_bytes or _piece_bytes(sum(file.bytes for file in (*files, *kept_aside))),
    )
    for given, found in ((sources, plan.files), (held_out, plan.held_out), (evaluation, plan.evaluation)):
        if (given and not found) or not sources:
            raise CorpusError(
                f"No document in {', '.join(map(str, given)) or 'no source'}. Name files or folders with text; folders "
                f"are searched for {', '.join(options.suffixes)}."
            )
    return plan


def _piece_bytes(text_bytes: int) -> int:
    return min(max(text_bytes // MOST_PIECES, SMALLEST_PIECE_BYTES), LARGEST_PIECE_BYTES)


def _source_names(files: Sequence[SourceFile]) -> list[str]:
    """What a report tells sources apart by, the largest first: the outermost folder of a key, or the kind of file."""
    totals: dict[str, int] = {}
    for file in files:
        name = _source_name(file)
        totals[name] = totals.get(name, 0) + file.bytes
    names = sorted(totals, key=lambda name: (-totals[name], name))
    return names if len(names) <= MOST_SOURCES else [*names[: MOST_SOURCES - 1], OTHER_SOURCES]


def _source_name(file: SourceFile) -> str:
    folder, slash, _ = file.key.partition("/")
    return folder if slash else f"*{''.join(Path(file.key).suffixes[-2:])}"


def _labelled(file: SourceFile, names: Mapping[str, int]) -> SourceFile:
    return dataclasses.replace(file, source=names.get(_source_name(file), len(names) - 1))


def changed_at(file: SourceFile) -> int | None:
    """When a local file was last changed, in ns; None where it is not there."""
    try:
        return Path(file.url).stat().st_mtime_ns
    except OSError:
        return None
