"""Checks a corpus against its manifest and index, byte for byte and chunk for chunk, in a folder or behind a URL.

Reads everything, from a URL one shard a worker at a time; changes nothing. What it finds is returned as sentences, the
first bad thing first, the same for any number of workers. Memory: a worker holds one chunk of a shard.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from data_tools.building.team import Alone, LocalTeam, Team
from data_tools.corpus.shards import chunk_key
from data_tools.corpus.tar_members import ChunkContent, ShardFile, TarChunk
from gptdist.data.chunk_index import ChunkIndex
from gptdist.data.digest import chunk_digest, file_sha256
from gptdist.data.manifest import Manifest, ShardInfo, SplitInfo
from gptdist.data.store import Store, StoreSettings, open_store
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.errors import CorpusError
from gptdist.remote import is_url

# What is not as it was built does not become so by waiting long.
_FETCH_ATTEMPTS = 3


@dataclass(frozen=True)
class _ShardTask:
    """A shard to check, with all that a worker must know of the corpus. What a URL gives is put into the folder
    `fetched`; `index_path` is None where the index is damaged.
    """

    corpus: Path | str
    fetched: str
    split: str
    number: int
    info: ShardInfo
    chunks: range
    index_path: Path | None
    index_totals: tuple[int, int, int]
    dtype: str
    vocab_size: int
    end_of_text: int


def verify_corpus(corpus: Path | str, workers: int = 1) -> list[str]:
    """Every problem found in the corpus at a folder or URL; an empty list means that all is as it was built."""
    # The node's own cache may hold what is no longer behind the URL.
    with TemporaryDirectory(prefix="gptdist-verify-") as fetched, closing(_open(corpus, fetched)) as store:
        return _problems(corpus, store, fetched, workers)


def _open(corpus: Path | str, fetched: str) -> Store:
    return open_store(corpus, StoreSettings(fetched, fetch_attempts=_FETCH_ATTEMPTS))


def _problems(corpus: Path | str, store: Store, fetched: str, workers: int) -> list[str]:
    try:
        manifest = Manifest.load(store)
    except CorpusError as error:
        return [str(error)]
    problems = list(_tokenizer_problems(store, manifest))
    tasks: list[_ShardTask] = []
    places: list[int] = []  # how many problems go before those of a shard
    for name, split in manifest.splits.items():
        index, found = _check_index(store, name, split)
        problems.extend(found)
        new = _shard_tasks(corpus, fetched, manifest, name, split, index)
        tasks.extend(new)
        places.extend([len(problems)] * len(new))
    of_shards = _run(tasks, workers)
    for place, found in reversed(list(zip(places, of_shards, strict=True))):
        problems[place:place] = found
    return problems if is_url(corpus) else [*problems, *_strangers(Path(corpus), manifest)]


def _run(tasks: list[_ShardTask], workers: int) -> list[list[str]]:
    """The problems of each shard, in the order of `tasks`."""
    workers = min(workers, len(tasks))
    team: Team = LocalTeam(workers, ["data_tools.corpus.verify"]) if workers > 1 else Alone()
    results: list[list[str]] = [[] for _ in tasks]
    try:
        for number, found in team.run(_shard_problems, [(task,) for task in tasks]):
            results[number] = found
    finally:
        team.close()
    return results


def _tokenizer_problems(store: Store, manifest: Manifest) -> Iterator[str]:
    try:
        tokenizer = CorpusTokenizer.of_corpus(store, manifest)
    except CorpusError as error:
        yield str(error)
        return
    said = (manifest.tokenizer.kind, manifest.tokenizer.vocab_size, manifest.tokenizer.end_of_text)
    found = (tokenizer.kind, tokenizer.vocab_size, tokenizer.end_of_text)
    if said != found:
        yield f"manifest.json says tokenizer (kind, ids, end of text) {said}; {manifest.tokenizer.file} has {found}."


def _check_index(store: Store, name: str, split: SplitInfo) -> tuple[Path | None, list[str]]:
    """The path of the index where it can be trusted, and the problems of index and totals."""
    problems = []
    try:
        path = store.path(split.index, keep=True)
    except CorpusError as error:
        return None, [f"Index {error}"]
    if problem := _file_problem(path, store.shown(split.index.file), split.index.bytes, split.index.sha256):
        problems.append(f"Index {problem}")
    else:
        try:
            index = ChunkIndex.open(path, split.chunks, split.tokens, split.documents)
            problems.extend(_order_problems(path, index))
        except CorpusError as error:
            problems.append(str(error))
    trusted = None if problems else path
    totals = {key: sum(getattr(shard, key) for shard in split.shards) for key in ("tokens", "documents")}
    if totals != {"tokens": split.tokens, "documents": split.documents}:
        problems.append(f"manifest.json: the totals of split {name} are not the sums of its shards.")
    return trusted, problems


def _order_problems(path: Path, index: ChunkIndex) -> Iterator[str]:
    """Starts that do not rise from 0 would send a reader to the wrong chunk."""
    for column in ("token_start", "document_start"):
        starts = getattr(index, column)
        if starts[0] != 0 or (starts[1:] <= starts[:-1]).any():
            yield f"Index {path}: {column} does not rise from 0."


def _shard_tasks(
    corpus: Path | str, fetched: str, manifest: Manifest, name: str, split: SplitInfo, index_path: Path | None
) -> list[_ShardTask]:
    tasks: list[_ShardTask] = []
    first_chunk = 0
    for number, shard in enumerate(split.shards):
        chunks = range(first_chunk, first_chunk + shard.chunks)
        first_chunk = chunks.stop
        tasks.append(
            _ShardTask(
                corpus,
                fetched,
                name,
                number,
                shard,
                chunks,
                index_path,
                (split.chunks, split.tokens, split.documents),
                manifest.dtype,
                manifest.tokenizer.vocab_size,
                manifest.tokenizer.end_of_text,
            )
        )
    return tasks


def _shard_problems(task: _ShardTask) -> list[str]:
    with closing(_open(task.corpus, task.fetched)) as store:
        try:
            path = store.path(task.info)
        except CorpusError as error:
            return [f"Shard {error}"]
        problems = _file_problems(task, path, store.shown(task.info.file))
        store.refetch(task.info)  # a copy is of no further use
        return problems


def _file_problems(task: _ShardTask, path: Path, shown: str) -> list[str]:
    index = ChunkIndex.open(task.index_path, *task.index_totals) if task.index_path else None
    problem = _file_problem(path, shown, task.info.bytes, task.info.sha256)
    try:
        if problem:
            where = _first_bad_chunk(task, path, index) if index is not None else ""
            return [f"Shard {problem}{where}"]
        return list(_content_problems(task, path, shown, index)) if index is not None else []
    except CorpusError as error:
        return [f"Shard {problem}"] if problem else [str(error)]


def _file_problem(path: Path, shown: str, expected_bytes: int, expected_sha256: str) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected_bytes:
            what = "truncated" if size < expected_bytes else "too long"
            return f"{shown} is {what}: {size:,} bytes, not {expected_bytes:,}."
        if file_sha256(path) != expected_sha256:
            return f"{shown} is damaged: its sha256 is not the one in manifest.json."
    except OSError as error:
        return f"{shown} cannot be read: {error.strerror}."
    return None


def _first_bad_chunk(task: _ShardTask, path: Path, index: ChunkIndex) -> str:
    """A sentence on the first chunk of a damaged shard whose bytes are not what was built, or nothing."""
    with ShardFile(path) as shard:
        for chunk in task.chunks:
            start, end = int(index.sample_offset[chunk]), index.sample_end(chunk, task.info.bytes)
            if chunk_digest(shard.read(start, end)) != int(index.digest[chunk]):
                there = f"bytes {start:,} to {end:,}"
                return f" The first bad chunk is {chunk} ({_key(task, chunk)}, {there})."
    return ""


def _content_problems(task: _ShardTask, path: Path, shown: str, index: ChunkIndex) -> Iterator[str]:
    """What an undamaged shard and the index say differently: a fault of whatever built them."""
    with ShardFile(path) as shard:
        in_tar = 0
        for chunk, found in enumerate(shard.chunks(), task.chunks.start):
            in_tar += 1
            if chunk in task.chunks:
                for problem in _chunk_problems(task, index, chunk, shard, found):
                    yield f"Shard {shown}, byte {found.docs.offset:,}: chunk {chunk}: {problem}"
    first, stop = task.chunks.start, task.chunks.stop
    tokens = int(index.token_start[stop] - index.token_start[first])
    documents = int(index.document_start[stop] - index.document_start[first])
    if (in_tar, tokens, documents) != (task.info.chunks, task.info.tokens, task.info.documents):
        yield (
            f"Shard {shown} holds {in_tar:,} chunks, {tokens:,} tokens, {documents:,} documents; manifest.json "
            f"says {task.info.chunks:,}, {task.info.tokens:,}, {task.info.documents:,}."
        )


def _chunk_problems(
    task: _ShardTask, index: ChunkIndex, chunk: int, shard: ShardFile, found: TarChunk
) -> Iterator[str]:
    if found.docs.key != _key(task, chunk):
        yield f"its key is {found.docs.key}, not {_key(task, chunk)}."
    places = (int(index.shard[chunk]), int(index.sample_offset[chunk]), int(index.tokens_offset[chunk]))
    actual = (task.number, found.docs.offset, found.tokens.data_offset)
    if places != actual:
        yield f"the index has it at (shard, start, tokens) {places}, the tar at {actual}."
        return
    if chunk_digest(shard.read(found.docs.offset, found.end)) != int(index.digest[chunk]):
        yield "the index has another digest for it."
        return
    num_tokens = int(index.token_start[chunk + 1] - index.token_start[chunk])
    num_documents = int(index.document_start[chunk + 1] - index.document_start[chunk])
    content = shard.content(found)
    if content.tokens.dtype != np.dtype(task.dtype) or content.tokens.shape != (num_tokens,):
        held = f"{content.tokens.dtype} {content.tokens.shape}"
        yield f"holds {held}, the index says {task.dtype} ({num_tokens},)."
    elif content.ends.shape != (num_documents,):
        yield f"has {content.ends.size} document ends, the index says {num_documents} documents."
    else:
        yield from content_problems(content, task.vocab_size, task.end_of_text)


def _key(task: _ShardTask, chunk: int) -> str:
    return chunk_key(Path(task.info.file).stem, chunk - task.chunks.start)


def content_problems(content: ChunkContent, vocab_size: int, end_of_text: int) -> Iterator[str]:
    """What is wrong with the documents of a chunk by themselves."""
    tokens, ends = content.tokens, content.ends
    if tokens.size and int(tokens.max()) >= vocab_size:
        place = int(np.argmax(tokens >= vocab_size))
        yield f"token {int(tokens[place])} is not among the tokenizer's {vocab_size} ids (number {place:,})."
    if not ends.size or len(content.keys) != ends.size:
        yield f"has {ends.size} document ends and {len(content.keys)} keys."
    elif ends[-1] != tokens.size or (np.diff(ends, prepend=0) < 1).any():
        yield "its document ends do not rise to the number of its tokens."
    elif (tokens[ends - 1] != end_of_text).any():
        document = int(np.argmax(tokens[ends - 1] != end_of_text))
        yield f"a document does not end with the end-of-text id {end_of_text} ({content.keys[document]!r})."
    elif int((tokens == end_of_text).sum()) != ends.size:
        yield f"the end-of-text id {end_of_text} stands inside a document."


def _strangers(corpus_dir: Path, manifest: Manifest) -> Iterator[str]:
    """Tars that look like shards of the corpus and are not."""
    known = {shard.file for split in manifest.splits.values() for shard in split.shards}
    for path in sorted(corpus_dir.glob("*.tar")):
        if path.name not in known:
            yield f"{path} is not a shard of this corpus: manifest.json does not name it."
