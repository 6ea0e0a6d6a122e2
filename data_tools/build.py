"""Builds a corpus folder from text: the stages in their order, and nothing half-written under the final name.

Knows which stage follows which and where the result goes; what a stage does is in its own file. All is written into a
hidden sibling folder, flushed to the disk, and renamed at the end.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_tools.arrange import limited, shuffled, split_documents
from data_tools.shards import SplitWriter, write_durably
from data_tools.sources import (
    DEFAULT_EXCLUDE,
    DEFAULT_SUFFIXES,
    Document,
    Progress,
    Scan,
    SourceOptions,
    read_document,
    scan_sources,
)
from data_tools.tokenizing import check_tokenizer, train_tokenizer
from gptdist.data.manifest import MANIFEST_FILE, TOKENIZER_FILE, Manifest, SplitInfo, TokenizerInfo
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.errors import CorpusError, StorageError

DEFAULT_CHUNK_TOKENS = 1 << 20
DEFAULT_SHARD_BYTES = 256 << 20
# Text that a tokenizer is trained on: more changes the merges little and takes minutes.
TOKENIZER_SAMPLE_BYTES = 32 << 20

_BATCH_BYTES = 4 << 20
_BATCH_DOCUMENTS = 1024
_LOCK_FILE = "building.lock"
# No tokenizer packs text tighter than this in practice: a bound that refuses only what cannot fit.
_MOST_BYTES_PER_TOKEN = 8


def build_corpus(
    sources: Sequence[Path],
    out_dir: Path,
    tokenizer: str,
    *,
    validation_sources: Sequence[Path] = (),
    validation_fraction: float = 0.05,
    seed: int = 1234,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    text_field: str = "text",
    max_bytes: int | None = None,
    suffixes: Sequence[str] = DEFAULT_SUFFIXES,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    on_bad_text: str = "error",
    end_of_text: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Make the corpus `out_dir` from `sources`; the same input gives the same bytes.

    `tokenizer`: a HF tokenizer.json or a folder with one, `train:SIZE`, or `bytes`. With `validation_sources` these
    validate and the fraction plays no part. `max_bytes` takes a keyed sample of at most so much text. `exclude` names
    folders that are not searched. `progress(stage, bytes done, bytes in all)` is called often. Raises CorpusError for
    what is wrong with the sources or the tokenizer, StorageError where `out_dir` cannot be written.
    """
    report = progress or (lambda stage, done, total: None)
    _check_numbers(validation_fraction, chunk_tokens, shard_bytes, max_bytes, on_bad_text)
    out_dir = Path(out_dir)
    _check_free(out_dir)
    ready = check_tokenizer(tokenizer, end_of_text)
    options = SourceOptions(tuple(suffixes), tuple(exclude), text_field, on_bad_text)
    scan = scan_sources(sources, options, report)
    train = limited(shuffled(scan.documents, seed), max_bytes)
    held_out = scan_sources(validation_sources, options, report) if validation_sources else Scan([], 0, 0)
    if validation_sources:
        validation = shuffled(held_out.documents, seed)
    else:
        train, validation = split_documents(train, seed, validation_fraction)
    build = {
        "tokenizer": tokenizer if ready is None or ready.kind == "bytes" else "file",
        "seed": seed,
        "validation_fraction": None if validation_sources else validation_fraction,
        "max_bytes": max_bytes,
        "chunk_tokens": chunk_tokens,
        "shard_bytes": shard_bytes,
        "skipped_documents": scan.skipped + held_out.skipped,
        "empty_documents": scan.empty + held_out.empty,
    }
    with _new_folder(out_dir, sum(document.text_bytes for document in train + validation)) as folder:
        if ready is None:
            ready = train_tokenizer(tokenizer, _sample(train, options, report))
        dtype = "uint16" if ready.vocab_size < 1 << 16 else "uint32"
        splits: dict[str, SplitInfo] = {}
        for name, documents in (("train", train), ("validation", validation)):
            with SplitWriter(folder, name, dtype, ready.end_of_text, chunk_tokens, shard_bytes) as writer:
                splits[name] = _write_split(writer, name, documents, ready, options, report)
        return _write_manifest(folder, ready, dtype, splits, build)


def _check_numbers(
    validation_fraction: float, chunk_tokens: int, shard_bytes: int, max_bytes: int | None, on_bad_text: str
) -> None:
    if not 0 <= validation_fraction < 1:
        raise CorpusError(f"The validation fraction is {validation_fraction}; it must be at least 0 and below 1.")
    for name, value in (("chunk_tokens", chunk_tokens), ("shard_bytes", shard_bytes), ("max_bytes", max_bytes)):
        if value is not None and value < 1:
            raise CorpusError(f"{name} is {value}; it must be at least 1.")
    if on_bad_text not in ("error", "skip"):
        raise CorpusError(f"on_bad_text is {on_bad_text!r}; it must be 'error' or 'skip'.")


def _check_free(out_dir: Path) -> None:
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise CorpusError(f"{out_dir} exists and is not an empty folder. Remove it, or name another with --out.")


@contextmanager
def _new_folder(out_dir: Path, text_bytes: int) -> Iterator[Path]:
    """A locked hidden folder beside `out_dir` that takes its name when the block ends well, and goes when it does not.

    A killed build leaves only the hidden folder, which the next build of the same name clears away.
    """
    target = out_dir.absolute()
    folder = target.parent / f".{target.name}.building"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / _LOCK_FILE).open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CorpusError(
                    f"Another build of {out_dir} is running. Wait for it, or name another --out."
                ) from None
            _clear(folder)
            _check_room(folder, text_bytes)
            try:
                yield folder
                _sync_folder(folder)
                os.rename(folder, target)
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise
            (out_dir / _LOCK_FILE).unlink()
        _sync_folder(out_dir)
        _sync_folder(target.parent)
    except OSError as error:
        raise _storage_error(error, out_dir) from error


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name != _LOCK_FILE:
            entry.unlink()


def _check_room(folder: Path, text_bytes: int) -> None:
    needed = 2 * text_bytes // _MOST_BYTES_PER_TOKEN
    free = shutil.disk_usage(folder).free
    if free < needed:
        shutil.rmtree(folder, ignore_errors=True)
        raise StorageError(
            f"No room for the corpus in {folder.parent}: {text_bytes:,} bytes of text need at least {needed:,} bytes, "
            f"{free:,} are free. Free some, or name another --out."
        )


def _storage_error(error: OSError, out_dir: Path) -> StorageError:
    try:
        free = f" ({shutil.disk_usage(out_dir.absolute().parent).free:,} bytes are free)"
    except OSError:
        free = ""
    remedy = "Free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "Check the path"
    return StorageError(
        f"The corpus could not be written to {out_dir}: {error.strerror}{free}. {remedy}, or name another --out. "
        "Nothing was left behind."
    )


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sample(documents: Sequence[Document], options: SourceOptions, report: Progress) -> Iterator[str]:
    """Texts to train a tokenizer on: training documents only, in their keyed order, so they are a fair sample."""
    chosen = limited(documents, TOKENIZER_SAMPLE_BYTES)
    total = sum(document.text_bytes for document in chosen)
    done = 0
    for document in chosen:
        yield read_document(document, options)
        done += document.text_bytes
        report("train tokenizer", done, total)


def _write_split(
    writer: SplitWriter,
    name: str,
    documents: Sequence[Document],
    tokenizer: CorpusTokenizer,
    options: SourceOptions,
    report: Progress,
) -> SplitInfo:
    total = sum(document.text_bytes for document in documents)
    done = 0
    for batch in _batches(documents):
        texts = [read_document(document, options) for document in batch]
        for document, ids in zip(batch, tokenizer.encode_documents(texts), strict=True):
            writer.add(document.key, ids, document.text_bytes)
            done += document.text_bytes
        report(f"tokenize {name}", done, total)
    return writer.close()


def _batches(documents: Sequence[Document]) -> Iterator[list[Document]]:
    """Runs of documents that a tokenizer takes at once, bounded in bytes so that memory is too."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        if batch and (size + document.text_bytes > _BATCH_BYTES or len(batch) == _BATCH_DOCUMENTS):
            yield batch
            batch, size = [], 0
        batch.append(document)
        size += document.text_bytes
    if batch:
        yield batch


def _write_manifest(
    folder: Path, tokenizer: CorpusTokenizer, dtype: str, splits: dict[str, SplitInfo], build: dict[str, object]
) -> Manifest:
    write_durably(folder / TOKENIZER_FILE, tokenizer.content)
    manifest = Manifest(
        tokenizer=TokenizerInfo(
            tokenizer.kind, TOKENIZER_FILE, tokenizer.sha256, tokenizer.vocab_size, tokenizer.end_of_text
        ),
        dtype=dtype,
        splits=splits,
        build=build,
    )
    write_durably(folder / MANIFEST_FILE, manifest.render())
    return manifest
