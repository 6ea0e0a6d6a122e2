"""Makes manifest.json and the indexes of a corpus anew from its tars and tokenizer.json, where they were lost.

Reads tars and never changes one. What a tar cannot say for itself comes from the old manifest as long as that can be
read and fits the tars: how the corpus was built, and how many bytes of text. Without it, bytes are counted from what
the tokens decode to: exact for a byte-level tokenizer that takes text as it is, near it for one that normalises.
"""

import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_tools.building.team import Alone, LocalTeam, Team
from data_tools.corpus.shards import chunk_key
from data_tools.corpus.tar_members import ChunkContent, ShardFile
from data_tools.corpus.verify import content_problems
from gptdist.data.chunk_index import ChunkRecord, render_index
from gptdist.data.digest import chunk_digest, file_sha256
from gptdist.data.manifest import (
    MANIFEST_FILE,
    SPLITS,
    TOKENIZER_FILE,
    IndexInfo,
    Manifest,
    ShardInfo,
    SplitInfo,
    TokenizerInfo,
)
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.durable import write_durably
from gptdist.errors import CorpusError, StorageError

_SHARD_NAME = re.compile(rf"({'|'.join(SPLITS)})-(\d{{5,}})\.tar")


@dataclass(frozen=True)
class _Task:
    """A shard to read. `count_text`: whether its bytes of text are wanted."""

    path: Path
    number: int
    dtype: str
    end_of_text: int
    count_text: bool


@dataclass(frozen=True)
class _Scanned:
    info: ShardInfo
    records: list[ChunkRecord]
    text_bytes: int


def rebuild_index(corpus_dir: Path, workers: int = 1) -> Manifest:
    """Write manifest and indexes of the corpus at `corpus_dir`; byte for byte those it was built with.

    Only the manifest's `build` is `{"rebuilt": true}` where the old manifest cannot be read. Raises CorpusError for a
    tar that is not a shard, or that differs from what an old manifest or index says of it. Without an old manifest the
    loss of a whole shard cannot be told from one that was empty: the build record then lists the numbers left out.
    """
    corpus_dir = Path(corpus_dir)
    shards = _find_shards(corpus_dir)
    tokenizer, dtype = _find_tokenizer(corpus_dir, next(paths[0] for paths in shards.values() if paths))
    old = _old_manifest(corpus_dir, tokenizer)
    names = [name for name in SPLITS if old is None or name in old.splits]
    tasks = [
        _Task(path, number, dtype, tokenizer.end_of_text, count_text=old is None)
        for name in names
        for number, path in enumerate(shards[name])
    ]
    scanned = iter(_run(tasks, workers))
    contents: dict[str, bytes] = {}
    splits: dict[str, SplitInfo] = {}
    for name in names:
        of_split = [next(scanned) for _ in shards[name]]
        contents[f"{name}.index"] = render_index([record for shard in of_split for record in shard.records])
        splits[name] = _split_info(name, contents[f"{name}.index"], of_split, old)
    manifest = Manifest(
        tokenizer=TokenizerInfo(
            tokenizer.kind, TOKENIZER_FILE, tokenizer.sha256, tokenizer.vocab_size, tokenizer.end_of_text
        ),
        dtype=dtype,
        splits=splits,
        build=old.build if old else _rebuilt(shards),
    )
    if old is None:
        _check_old_indexes(corpus_dir, contents)
    _write(corpus_dir, {**contents, MANIFEST_FILE: manifest.render()})
    return manifest


def _find_shards(corpus_dir: Path) -> dict[str, list[Path]]:
    """The shards of each split, in order. Raises CorpusError for a tar of another name."""
    if not corpus_dir.is_dir():
        raise CorpusError(f"{corpus_dir} is not a folder.")
    found: dict[str, dict[int, Path]] = {name: {} for name in SPLITS}
    for path in sorted(corpus_dir.glob("*.tar")):
        named = _SHARD_NAME.fullmatch(path.name)
        if not named or path.name != f"{named[1]}-{int(named[2]):05d}.tar" or not path.is_file():
            raise CorpusError(
                f"{path} is not a shard of a corpus: those are called {SPLITS[0]}-00000.tar and so on. Move it away."
            )
        found[named[1]][int(named[2])] = path
    if not any(found.values()):
        raise CorpusError(f"{corpus_dir} holds no shard ({SPLITS[0]}-00000.tar): there is nothing to make an index of.")
    return {name: [paths[number] for number in sorted(paths)] for name, paths in found.items()}


def _rebuilt(shards: dict[str, list[Path]]) -> dict[str, object]:
    """The build record of a manifest that was lost.

    A number left out among the shards is named there: its shard was empty from the beginning, or it is lost.
    """
    absent = []
    for name, paths in shards.items():
        there = {path.name for path in paths}
        last = int(paths[-1].stem.rpartition("-")[2]) if paths else -1
        absent += [shard for number in range(last) if (shard := f"{name}-{number:05d}.tar") not in there]
    return {"rebuilt": True, "absent_shards": absent} if absent else {"rebuilt": True}


def _find_tokenizer(corpus_dir: Path, first_shard: Path) -> tuple[CorpusTokenizer, str]:
    """The tokenizer, with the id that ends the documents of `first_shard`, and the type of the tokens."""
    with ShardFile(first_shard) as shard:
        chunk = next(shard.chunks(), None)
        if chunk is None:
            raise CorpusError(f"Shard {first_shard} is empty.")
        content = shard.content(chunk)
    path = corpus_dir / TOKENIZER_FILE
    try:
        tokenizer_bytes = path.read_bytes()
    except OSError as error:
        raise CorpusError(f"Tokenizer {path} cannot be read: {error.strerror}. Put the corpus's own back.") from None
    end_of_text = int(content.tokens[-1]) if content.tokens.size else None
    tokenizer = CorpusTokenizer.parse(tokenizer_bytes, str(path), end_of_text)
    dtype = "uint16" if tokenizer.vocab_size < 1 << 16 else "uint32"
    if tokenizer.end_of_text != end_of_text or content.tokens.dtype != np.dtype(dtype):
        raise CorpusError(
            f"{path} is not the tokenizer of {first_shard}: with {tokenizer.vocab_size:,} ids and end of text "
            f"{tokenizer.end_of_text}, tokens would be {dtype}; the shard has {content.tokens.dtype} and ends its "
            f"documents with {end_of_text}. Put the corpus's own back."
        )
    return tokenizer, dtype


def _old_manifest(corpus_dir: Path, tokenizer: CorpusTokenizer) -> Manifest | None:
    """The manifest that is there, if it can be read. Raises CorpusError where the tars are not those it names."""
    try:
        manifest = Manifest.load(corpus_dir)
    except CorpusError:
        return None
    remedy = f"Put the right file back, or remove {corpus_dir / MANIFEST_FILE} to take the files as they are."
    if manifest.tokenizer.sha256 != tokenizer.sha256:
        raise CorpusError(f"{corpus_dir / TOKENIZER_FILE} is not the tokenizer that manifest.json names. {remedy}")
    named = {shard.file: shard for split in manifest.splits.values() for shard in split.shards}
    there = {path.name for path in corpus_dir.glob("*.tar")}
    for name in sorted(named.keys() ^ there):
        raise CorpusError(
            f"{corpus_dir / name} is {'not named by manifest.json' if name in there else 'missing'}. {remedy}"
        )
    for name, shard in named.items():
        path = corpus_dir / name
        if path.stat().st_size != shard.bytes or file_sha256(path) != shard.sha256:
            raise CorpusError(f"{path} is not what manifest.json says: it is damaged or another file. {remedy}")
    return manifest


def _run(tasks: Sequence[_Task], workers: int) -> list[_Scanned]:
    workers = min(workers, len(tasks))
    team: Team = LocalTeam(workers, ["data_tools.corpus.index"]) if workers > 1 else Alone()
    try:
        found = dict(team.run(_scan_shard, [(task,) for task in tasks]))
    finally:
        team.close()
    return [found[number] for number in range(len(tasks))]


def _scan_shard(task: _Task) -> _Scanned:
    tokenizer, lengths = _open_tokenizer(task.path.parent, task.end_of_text)
    records: list[ChunkRecord] = []
    text_bytes = 0
    with ShardFile(task.path) as shard:
        for number, chunk in enumerate(shard.chunks()):
            content = shard.content(chunk)
            problems = list(content_problems(content, tokenizer.vocab_size, task.end_of_text))
            if chunk.docs.key != chunk_key(task.path.stem, number):
                problems.append(f"its key is {chunk.docs.key}, not {chunk_key(task.path.stem, number)}.")
            if content.tokens.dtype != np.dtype(task.dtype):
                problems.append(f"its tokens are {content.tokens.dtype}, those of other chunks {task.dtype}.")
            if problems:
                raise CorpusError(f"Shard {task.path}, byte {chunk.docs.offset:,}: chunk {number}: {problems[0]}")
            digest = chunk_digest(shard.read(chunk.docs.offset, chunk.end))
            places = (chunk.docs.offset, chunk.tokens.data_offset)
            records.append(ChunkRecord(content.tokens.size, content.ends.size, task.number, *places, digest))
            if task.count_text:
                text_bytes += _text_bytes(content, tokenizer, lengths)
        size = shard.bytes
    totals = (sum(record.tokens for record in records), sum(record.documents for record in records), len(records))
    return _Scanned(ShardInfo(task.path.name, size, file_sha256(task.path), *totals), records, text_bytes)


@lru_cache(maxsize=1)
def _open_tokenizer(corpus_dir: Path, end_of_text: int) -> tuple[CorpusTokenizer, np.ndarray | None]:
    """The tokenizer and the bytes of text behind each of its ids, where an id always stands for the same bytes."""
    path = corpus_dir / TOKENIZER_FILE
    tokenizer = CorpusTokenizer.parse(path.read_bytes(), str(path), end_of_text)
    lengths = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    if tokenizer.kind == "bytes":
        lengths[:256] = 1
        return tokenizer, lengths
    fields = json.loads(tokenizer.content)
    if (fields.get("decoder") or {}).get("type") != "ByteLevel" or fields["model"].get("type") != "BPE":
        return tokenizer, None
    for token, index in fields["model"]["vocab"].items():
        lengths[index] = len(token)  # a byte-level token spells each byte as one character
    for added in fields.get("added_tokens") or ():
        lengths[added["id"]] = 0 if added.get("special") else len(added["content"].encode())
    lengths[end_of_text] = 0
    return tokenizer, lengths


def _text_bytes(content: ChunkContent, tokenizer: CorpusTokenizer, lengths: np.ndarray | None) -> int:
    if lengths is not None:
        return int(lengths[content.tokens].sum())
    return sum(
        len(tokenizer.decode(content.tokens[start : end - 1].tolist()).encode())
        for start, end in pairwise([0, *content.ends.tolist()])
    )


def _split_info(name: str, index: bytes, scanned: Sequence[_Scanned], old: Manifest | None) -> SplitInfo:
    return SplitInfo(
        tokens=sum(shard.info.tokens for shard in scanned),
        documents=sum(shard.info.documents for shard in scanned),
        text_bytes=old.split(name).text_bytes if old else sum(shard.text_bytes for shard in scanned),
        index=IndexInfo(f"{name}.index", len(index), hashlib.sha256(index).hexdigest()),
        shards=tuple(shard.info for shard in scanned),
    )


def _check_old_indexes(corpus_dir: Path, contents: dict[str, bytes]) -> None:
    """Without a manifest an index is all that says what the tars should be: where they differ, a person decides."""
    for name, content in contents.items():
        path = corpus_dir / name
        if path.is_file() and path.read_bytes() != content:
            raise CorpusError(
                f"{path} does not fit the tars, and without manifest.json nothing says which of them is damaged. "
                f"Remove {path} to take the tars as they are."
            )


def _write(corpus_dir: Path, contents: dict[str, bytes]) -> None:
    """Replace each file whole or not at all; the manifest comes last."""
    for name, content in contents.items():
        path = corpus_dir / name
        try:
            write_durably(path, content)
        except OSError as error:
            raise StorageError(f"{path} could not be written: {error.strerror}.") from error
    folder = os.open(corpus_dir, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
