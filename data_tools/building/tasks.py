"""The tasks of a build, each a function of the job and a number: sample, count, read, find duplicates, write a shard.

A task reads what earlier stages left in the work folder, leaves its result there under its final name, whole, and
answers with it. It runs in any process of any node and gives the same bytes everywhere.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import xxhash

from data_tools.building.arrange import HASH_RANGE, Choice, order_hashes, shard_range, split_hashes
from data_tools.building.job import Job, OpenJob, open_job
from data_tools.building.runs import Batch, RunRows, RunSlice, sorted_rows, write_run
from data_tools.corpus.shards import write_shard
from data_tools.reporting.statistics import KEPT, SAMPLES_PER_CLASS, BuildStatistics
from data_tools.sources.documents import BadDocument
from data_tools.sources.formats import read_piece
from data_tools.sources.pieces import Piece
from data_tools.stages.clean import DropReason, clean, normalized_digest
from data_tools.stages.contamination import EvaluationGrams, cut
from data_tools.stages.near import DEFAULT_BINS, band_keys, signature
from data_tools.stages.words import hash_words
from gptdist.errors import CorpusError

# Documents that are tokenised at once.
BATCH_BYTES = 4 << 20
BATCH_DOCUMENTS = 4096

_SAMPLE_TOKENS = 160
_COLUMNS = ("order", "text_bytes", "source")


@dataclass(frozen=True)
class _Text:
    """A document that goes into the corpus, cleaned."""

    key: bytes
    text: str
    data: bytes  # the text in UTF-8
    source: int


def read_documents(job: Job, index: int) -> dict[str, Any]:
    """Piece `index`, cleaned and tokenised, as sorted runs. The result names them and counts what was left out."""
    build = open_job(job)
    dtype = build.dtype
    statistics = BuildStatistics()
    runs: list[str] = []
    pending: list[Batch] = []
    pending_bytes = documents = tokens = 0

    def write() -> None:
        name = f"run-{index:06d}-{len(runs):04d}.safetensors"
        write_run(build.work.path / name, pending, dtype, build.tokenizer.end_of_text)
        runs.append(name)
        pending.clear()

    grams = None if index >= build.plan.held_out_from else build.grams
    for texts in _batches(_clean_documents(build, build.pieces[index], grams, statistics)):
        pending.append(_batch(build, texts, dtype))
        documents += len(texts)
        tokens += len(pending[-1].tokens) + len(texts)
        pending_bytes += sum(len(text.data) for text in texts)
        if pending_bytes >= build.plan.piece_bytes:
            write()
            pending_bytes = 0
    if pending:
        write()
    build.check_unchanged(index)
    result: dict[str, Any] = {
        "encoder": build.encoder_said,
        "runs": runs,
        "documents": documents,
        "tokens": tokens,
        "statistics": statistics.to_dict(),
    }
    return build.save(f"read-{index:06d}.json", result)


def sample_documents(job: Job, index: int) -> dict[str, Any]:
    """Documents of sample piece `index` with an order below the sampling limit: [order, whether held out, text]."""
    build = open_job(job)
    options, limit = build.plan.options, int(build.load("sampling.json")["order_limit"])
    bound = np.uint64(int(options.validation_fraction * HASH_RANGE))
    chosen: list[tuple[int, bool, str]] = []
    piece = build.plan.sample_pieces()[index]
    for texts in _batches(_clean_documents(build, piece, build.grams, BuildStatistics())):
        order = order_hashes(options.seed, [text.key for text in texts])
        held_out = split_hashes(options.seed, _digests(texts)) < bound
        chosen.extend(
            (value, bool(out), text.text)
            for value, out, text in zip(order.tolist(), held_out, texts, strict=True)
            if value < limit
        )
    return build.save(f"sample-{index:06d}.json", {"documents": chosen})


def _clean_documents(
    build: OpenJob, piece: Piece, grams: EvaluationGrams | None, statistics: BuildStatistics
) -> Iterator[_Text]:
    """What of `piece` is tokenised, without what has `grams`; `statistics` counts it and what is dropped."""
    for file, document in read_piece(piece, build.reading):
        source = file.source
        if isinstance(document, BadDocument):
            if build.plan.options.on_bad_text == "error":
                raise CorpusError(f"{document.reason}. Mend it, or leave such documents out with --on-bad-text skip.")
            statistics.add_read(1, 0)
            _drop(build, statistics, "not readable", source, document.key, document.reason, 0)
            continue
        text = clean(document.text, build.cleaning)
        if isinstance(text, DropReason):
            size = len(document.text.encode())
            statistics.add_read(1, size)
            _drop(build, statistics, text.value, source, document.key, document.text, size)
            continue
        data = text.encode()
        statistics.add_read(1, len(data))
        parts: list[str] | None = [text]
        if grams is not None:
            words = hash_words(text)
            parts = cut(text, words, grams.hits(words.hashes))
        if not parts:
            _drop(build, statistics, "contaminated", source, document.key, text, len(data))
        elif parts[0] is text:
            yield _Text(document.key.encode(), text, data, source)
        else:
            pieces = [
                _Text(f"{document.key}~{number}".encode(), part, part.encode(), source)
                for number, part in enumerate(parts)
            ]
            statistics.add_read(len(pieces) - 1, 0)  # each is a document of its own from here on
            removed = len(data) - sum(len(piece.data) for piece in pieces)
            statistics.add_dropped("contaminated", build.plan.sources[source], 0, removed)
            yield from pieces


def _drop(
    build: OpenJob, statistics: BuildStatistics, reason: str, source: int, key: str, text: str, size: int
) -> None:
    statistics.add_dropped(reason, build.plan.sources[source], 1, size)
    sample_hash = int(order_hashes(build.plan.options.seed, [key.encode()])[0])
    statistics.offer_sample(reason, sample_hash, key, text)


def _batches(texts: Iterator[_Text]) -> Iterator[list[_Text]]:
    """Runs of documents that a tokenizer takes at once, bounded in bytes so that memory is too."""
    batch: list[_Text] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text.data)
        if size >= BATCH_BYTES or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _batch(build: OpenJob, texts: list[_Text], dtype: np.dtype) -> Batch:
    seed = build.plan.options.seed
    keys = [text.key for text in texts]
    tokens, ends = build.encoder.encode_flat([text.text for text in texts], [text.data for text in texts])
    columns = {
        "split": split_hashes(seed, _digests(texts)),
        "text_bytes": np.array([len(text.data) for text in texts], dtype=np.int64),
        "source": np.array([text.source for text in texts], dtype=np.uint32),
        **_fingerprints(build.plan.options.dedup, texts),
    }
    return Batch(keys, order_hashes(seed, keys), tokens.astype(dtype, copy=False), ends, columns)


def _fingerprints(dedup: str, texts: list[_Text]) -> dict[str, np.ndarray]:
    """The columns by which duplicates are found. Band key 0: a text without words, which is near nothing."""
    if dedup == "none":
        return {}
    same = b"".join([normalized_digest(text.text) for text in texts])
    columns = {"same": np.frombuffer(same, dtype="<u8").reshape(-1, 2)}
    if dedup == "near":
        signatures = [signature(hash_words(text.text).hashes) for text in texts]
        blank = np.zeros(DEFAULT_BINS, dtype=np.uint32)
        columns["signature"] = np.stack([blank if found is None else found for found in signatures])
        columns["bands"] = band_keys(columns["signature"])
        columns["bands"][[found is None for found in signatures]] = 0
    return columns


def _digests(texts: list[_Text]) -> np.ndarray:
    """uint64 [n, 2]: 128 bits that stand for a text."""
    # No cryptographic hash: it decides on a text's side only, and sha256 would take a fifteenth of the build's time.
    content = b"".join([xxhash.xxh3_128_digest(text.data) for text in texts])
    return np.frombuffer(content, dtype="<u8").reshape(-1, 2)


def write_one_shard(job: Job, index: int) -> dict[str, Any]:
    """Shard `index`, counted over all splits: its slice of every run, in order, without what was decided against."""
    build = open_job(job)
    decisions = build.decisions
    split, number, count = decisions.shard(index)
    low, high = shard_range(number, count)
    statistics = BuildStatistics()
    parts: list[RunRows] = []
    drops = build.drops(low, high)
    samples: list[list[Any]] = []
    for place, (run, held_out) in enumerate(build.runs):
        # One run after the other is open, and of it only what goes into this shard is kept: there may be thousands,
        # and a shard of the smaller split takes a wide range of each.
        part = RunSlice(build.work.path / run, low, high if held_out else min(high, decisions.order_limit))
        choice = Choice(decisions.order_limit, HASH_RANGE if held_out else decisions.split_bound)
        mine = choice.held_out(part.column("split")) == (split == "validation")
        for reason, dropped in drops.items():
            gone = mine & dropped.rows(place, part.first_row, len(part))
            _count_dropped(build, statistics, reason, part, gone)
            shown = part.take(np.flatnonzero(gone)[:SAMPLES_PER_CLASS], _COLUMNS)
            samples += [_sample(reason, shown, row) for row in range(len(shown.keys))]
            mine &= ~gone
        if mine.any():
            parts.append(part.take(np.flatnonzero(mine), _COLUMNS))
    name = f"{split}-{number:05d}"
    result: dict[str, Any] = {"split": split, "info": None, "chunks": [], "text_bytes": 0}
    if parts:
        documents = _merged(parts)
        _count_kept(build, statistics, split, parts)
        samples += [_sample(KEPT, parts[part], row) for part, row in documents[:SAMPLES_PER_CLASS]]
        tokens_of = ((parts[part].keys[row].decode(), _tokens(parts[part], row)) for part, row in documents)
        path = build.work.corpus / f"{name}.tar"
        written = write_shard(path, name, tokens_of, build.plan.options.chunk_tokens, build.dtype)
        text_bytes = sum(int(part.columns["text_bytes"].sum()) for part in parts)
        result |= {"info": asdict(written.info), "chunks": written.chunks.tolist(), "text_bytes": text_bytes}
    return build.save(f"shard-{index:06d}.json", result | {"statistics": statistics.to_dict(), "samples": samples})


def _merged(parts: list[RunRows]) -> list[tuple[int, int]]:
    """(part, row) of every document in the corpus's order."""
    part_of = np.repeat(np.arange(len(parts)), [len(part.keys) for part in parts])
    row_of = np.concatenate([np.arange(len(part.keys)) for part in parts])
    order = np.concatenate([part.columns["order"] for part in parts])
    sequence = sorted_rows(order, [key for part in parts for key in part.keys])
    return list(zip(part_of[sequence].tolist(), row_of[sequence].tolist(), strict=True))


def _tokens(part: RunRows, row: int) -> np.ndarray:
    return part.tokens[part.token_ends[row - 1] if row else 0 : part.token_ends[row]]


def _count_kept(build: OpenJob, statistics: BuildStatistics, split: str, parts: list[RunRows]) -> None:
    for part in parts:
        lengths = np.diff(part.token_ends, prepend=0)
        sources, text_bytes = part.columns["source"], part.columns["text_bytes"]
        statistics.add_kept_mixed(split, build.plan.sources, sources, text_bytes, lengths)


def _count_dropped(build: OpenJob, statistics: BuildStatistics, reason: str, part: RunSlice, gone: np.ndarray) -> None:
    sources, text_bytes = part.column("source")[gone], part.column("text_bytes")[gone]
    for source in np.unique(sources).tolist():
        mine = sources == source
        statistics.add_dropped(reason, build.plan.sources[source], int(mine.sum()), int(text_bytes[mine].sum()))


def _sample(sample_class: str, part: RunRows, row: int) -> list[Any]:
    """What the report is to show of a document: the class, its sample hash, its key, and the ids of its beginning."""
    ids = _tokens(part, row)[:_SAMPLE_TOKENS].tolist()
    return [sample_class, int(part.columns["order"][row]), part.keys[row].decode(), ids]
