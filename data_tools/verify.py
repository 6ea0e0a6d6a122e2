"""Checks a corpus folder against its manifest and index, byte for byte and chunk for chunk.

Reads everything; changes nothing. What it finds is returned as sentences, the first bad thing first.
"""

import io
import json
import mmap
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_tools.shards import chunk_key
from gptdist.data.chunk_index import ChunkIndex
from gptdist.data.digest import chunk_digest, file_sha256
from gptdist.data.manifest import Manifest, ShardInfo, SplitInfo
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.errors import CorpusError


def verify_corpus(corpus_dir: Path) -> list[str]:
    """Every problem found in the corpus at `corpus_dir`; an empty list means that all is as it was built."""
    corpus_dir = Path(corpus_dir)
    try:
        manifest = Manifest.load(corpus_dir)
    except CorpusError as error:
        return [str(error)]
    problems = list(_tokenizer_problems(corpus_dir, manifest))
    for name, split in manifest.splits.items():
        problems.extend(_split_problems(corpus_dir, manifest, name, split))
    return problems


def _tokenizer_problems(corpus_dir: Path, manifest: Manifest) -> Iterator[str]:
    try:
        tokenizer = CorpusTokenizer.load(corpus_dir)
    except CorpusError as error:
        yield str(error)
        return
    said = (manifest.tokenizer.kind, manifest.tokenizer.vocab_size, manifest.tokenizer.end_of_text)
    found = (tokenizer.kind, tokenizer.vocab_size, tokenizer.end_of_text)
    if said != found:
        yield f"manifest.json says tokenizer (kind, ids, end of text) {said}; {manifest.tokenizer.file} has {found}."


def _split_problems(corpus_dir: Path, manifest: Manifest, name: str, split: SplitInfo) -> Iterator[str]:
    path = corpus_dir / split.index.file
    problem = _file_problem(path, split.index.bytes, split.index.sha256)
    index = None
    if problem:
        yield f"Index {problem}"
    else:
        try:
            index = ChunkIndex.open(path, split.chunks, split.tokens, split.documents)
        except CorpusError as error:
            yield str(error)
    totals = {key: sum(getattr(shard, key) for shard in split.shards) for key in ("tokens", "documents")}
    if totals != {"tokens": split.tokens, "documents": split.documents}:
        yield f"manifest.json: the totals of split {name} are not the sums of its shards."
    first_chunk = 0
    for number, shard in enumerate(split.shards):
        chunks = range(first_chunk, first_chunk + shard.chunks)
        first_chunk = chunks.stop
        problem = _file_problem(corpus_dir / shard.file, shard.bytes, shard.sha256)
        if problem:
            bad = _bad_chunks(corpus_dir / shard.file, shard, index, chunks) if index else []
            first = f" The first bad chunk is {bad[0]} ({chunk_key(name, bad[0])})." if bad else ""
            yield f"Shard {problem}{first}"
        elif index is not None:
            yield from _content_problems(corpus_dir / shard.file, manifest, name, number, index, chunks)


def _file_problem(path: Path, expected_bytes: int, expected_sha256: str) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected_bytes:
            what = "truncated" if size < expected_bytes else "too long"
            return f"{path} is {what}: {size:,} bytes, not {expected_bytes:,}."
        if file_sha256(path) != expected_sha256:
            return f"{path} is damaged: its sha256 is not the one in manifest.json."
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}."
    return None


def _bad_chunks(path: Path, shard: ShardInfo, index: ChunkIndex, chunks: range) -> list[int]:
    """The chunks of a damaged shard whose bytes are not what was built."""
    try:
        content = path.read_bytes()
    except OSError:
        return []
    return [
        chunk
        for chunk in chunks
        if chunk_digest(content[int(index.sample_offset[chunk]) : index.sample_end(chunk, shard.bytes)])
        != int(index.digest[chunk])
    ]


def _content_problems(
    path: Path, manifest: Manifest, split: str, shard_number: int, index: ChunkIndex, chunks: range
) -> Iterator[str]:
    """What an undamaged shard and the index say differently: a fault of whatever built them."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        try:
            with tarfile.open(fileobj=mapped, mode="r:") as tar:
                members = tar.getmembers()
        except tarfile.TarError as error:
            yield f"Shard {path} is not a tar: {error}."
            return
        names = [f"{chunk_key(split, chunk)}.{kind}" for chunk in chunks for kind in ("docs.npy", "json", "tokens.npy")]
        if [member.name for member in members] != names:
            yield f"Shard {path} does not hold the chunks {chunks.start} to {chunks.stop - 1} and nothing else."
            return
        for chunk, docs, sources, tokens in zip(chunks, members[::3], members[1::3], members[2::3], strict=True):
            contents = [
                mapped[member.offset_data : member.offset_data + member.size] for member in (docs, sources, tokens)
            ]
            places = (int(index.shard[chunk]), int(index.sample_offset[chunk]), int(index.tokens_offset[chunk]))
            if places != (shard_number, docs.offset, tokens.offset_data):
                yield f"Shard {path}: the index has chunk {chunk} at {places}, the tar elsewhere."
            elif chunk_digest(mapped[places[1] : index.sample_end(chunk, len(mapped))]) != int(index.digest[chunk]):
                yield f"Shard {path}: the index has another digest for chunk {chunk}."
            else:
                for problem in _chunk_problems(manifest, index, chunk, contents):
                    yield f"Shard {path}: chunk {chunk}: {problem}"


def _chunk_problems(manifest: Manifest, index: ChunkIndex, chunk: int, contents: list[bytes]) -> Iterator[str]:
    try:
        ends = np.load(io.BytesIO(contents[0]), allow_pickle=False)
        keys = json.loads(contents[1])["documents"]
        tokens = np.load(io.BytesIO(contents[2]), allow_pickle=False)
    except (ValueError, KeyError, TypeError) as error:
        yield f"cannot be read: {error}."
        return
    num_tokens = int(index.token_start[chunk + 1] - index.token_start[chunk])
    num_documents = int(index.document_start[chunk + 1] - index.document_start[chunk])
    if tokens.dtype != np.dtype(manifest.dtype) or tokens.shape != (num_tokens,):
        yield f"holds {tokens.dtype} {tokens.shape}, the index says {manifest.dtype} ({num_tokens},)."
        return
    if int(tokens.max()) >= manifest.tokenizer.vocab_size:
        yield f"token {int(tokens.max())} is not among the tokenizer's {manifest.tokenizer.vocab_size} ids."
    if ends.shape != (num_documents,) or len(keys) != num_documents:
        yield f"has {ends.size} document ends and {len(keys)} keys, the index says {num_documents} documents."
    elif ends[-1] != num_tokens or (np.diff(ends, prepend=0) < 1).any():
        yield "its document ends do not rise to the number of its tokens."
    elif (tokens[ends - 1] != manifest.tokenizer.end_of_text).any():
        yield "a document does not end with the end-of-text id."
