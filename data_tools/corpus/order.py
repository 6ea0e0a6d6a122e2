"""What a run reads when: the documents of a step, the steps of a document, and the proof that an epoch is exactly once.

Asks the same orders and readers as training. Knows no engine and no schedule: how many samples a number of steps
consumes is handed in. The answers are the same for any number of ranks.
"""

import io
import json
import tarfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from gptdist.config.sections import RunConfig
from gptdist.data.corpora import build_source, open_corpora, open_stores
from gptdist.data.reader import TokenReader
from gptdist.data.samples import Place, SampleSource
from gptdist.errors import ConfigError, CorpusError

SamplesAtStep = Callable[[int], int]
"""Samples consumed once so many steps are done."""


@dataclass(frozen=True)
class ChunkDocuments:
    """The documents of a chunk: their keys, and the end of each in tokens of the chunk."""

    keys: list[str]
    ends: np.ndarray


@dataclass(frozen=True)
class Found:
    """Where a document lies: tokens `start` to `stop` - 1 of the split."""

    chunk: int
    start: int
    stop: int


class RunOrder:
    """The order of the run that `config` describes, but for the `gaps` of its source, which may be set.

    Samples have their numbers in the whole order; the schedule counts those that are trained on.
    """

    def __init__(self, config: RunConfig, samples_at_step: SamplesAtStep) -> None:
        self.config = config
        self.length = config.model.sequence_length
        self._stores = open_stores(config.data)
        self.readers = open_corpora(config.data, "train", self._stores)
        self.source: SampleSource = build_source(config.data, self.readers, self.length)
        self._samples_at_step = samples_at_step
        self._documents = lru_cache(maxsize=32)(lambda name, chunk: chunk_documents(self.readers[name], chunk))

    def close(self) -> None:
        """Stop fetching."""
        for store in self._stores.values():
            store.close()

    @property
    def trained_samples(self) -> int:
        """How many samples the run trains on."""
        return self._samples_at_step(self.config.train.steps)

    @property
    def total_samples(self) -> int:
        """The sample number behind the run's last."""
        return self.source.gaps.stop(self.trained_samples)

    def step_lines(self, step: int) -> Iterator[str]:
        """Each sample of optimizer step `step`, counted from 1, with the documents it touches."""
        steps = self.config.train.steps
        if not 1 <= step <= steps:
            raise ConfigError(f"step {step} is not one of this run's 1 to {steps} (train.steps).")
        counts = np.arange(self._samples_at_step(step - 1), self._samples_at_step(step), dtype=np.int64)
        samples = self.source.gaps.numbers(counts).tolist()
        yield f"step {step:,} of {steps:,}: samples {samples[0]:,} to {samples[-1]:,}, {len(samples):,} in all"
        for sample in samples:
            place = self.source.place(sample)
            chunks, keys = self._touched(place)
            yield (
                f"sample {sample}  {self._shown(place.corpus)}  epoch {place.epoch}  window {place.window}  chunk "
                f"{'-'.join(dict.fromkeys((str(chunks[0]), str(chunks[-1]))))}  {', '.join(keys)}"
            )

    def document_lines(self, key: str) -> Iterator[str]:
        """The samples and steps of this run, up to train.steps, that have a token of the document `key`."""
        found = 0
        for name, reader in self.readers.items():
            for document in find_document(reader, key):
                found += 1
                yield from self._uses(name, document, key)
        for reader in open_corpora(self.config.data, "validation", self._stores).values():
            for _ in find_document(reader, key):
                found += 1
                yield f"{key} is in {reader.corpus}, held out (its validation split): no step trains on it"
        if not found:
            raise CorpusError(
                f"There is no document {key!r} in {', '.join(map(self._shown, self.readers))}. "
                "`gptdist data order CONFIG --step 1` shows what keys look like."
            )

    def step_of(self, sample: int) -> int | None:
        """The optimizer step, counted from 1, that trains on a sample; None where the run passes over it."""
        count = self.source.gaps.count(sample)
        return (
            count
            if count is None
            else bisect_right(range(self.config.train.steps + 1), count, key=self._samples_at_step)
        )

    def _shown(self, name: str) -> str:
        """What may be shown of a corpus's name: a URL may hold a secret."""
        return self.readers[name].corpus

    def _touched(self, place: Place) -> tuple[list[int], list[str]]:
        """The chunks and the documents of a window: its inputs and its targets, so sequence_length + 1 tokens."""
        index = self.readers[place.corpus].index
        start = place.window * self.length
        stop = start + self.length + 1
        chunks = list(range(index.chunk_of(start), index.chunk_of(stop - 1) + 1))
        keys = []
        for chunk in chunks:
            # Reading tokens checks the chunk, so that a damaged one is named and not answered from.
            self.readers[place.corpus].chunk_tokens(chunk)
            documents, offset = self._documents(place.corpus, chunk), int(index.token_start[chunk])
            # A document touches where it ends after the window's start and begins before its stop.
            first = int(np.searchsorted(documents.ends, start - offset, side="right"))
            last = int(np.searchsorted(documents.ends, stop - 1 - offset, side="right"))
            keys += documents.keys[first : last + 1]
        return chunks, keys

    def _uses(self, name: str, document: Found, key: str) -> Iterator[str]:
        windows = self.readers[name].num_windows(self.length)
        first = max(0, -(-(document.start - self.length) // self.length))
        last = min(windows - 1, (document.stop - 1) // self.length)
        tokens = f"tokens {document.start:,} to {document.stop - 1:,}, chunk {document.chunk}"
        where = f"{key} is in {self._shown(name)}: {tokens}"
        if first > last:
            yield f"{where}; after the last whole window, so no step trains on it"
            return
        yield f"{where}, windows {first} to {last}"
        total = self.total_samples
        count = self.source.blend.counts(total)[self.source.blend.corpora.index(name)]
        uses = []
        for epoch in range(-(-count // windows)):
            for window in range(first, last + 1):
                place = Place(name, epoch, window)
                sample = self.source.sample(place)
                if sample is not None and sample < total:
                    uses.append((sample, place))
        steps = [self.step_of(sample) for sample, _ in uses]
        for (sample, place), step in sorted(zip(uses, steps, strict=True), key=lambda use: use[0][0]):
            when = "passed over" if step is None else f"step {step}"
            yield f"{when}  sample {sample}  epoch {place.epoch}  window {place.window}"
        trained = [step for step in steps if step is not None]
        yield f"{len(trained)} samples in {len(set(trained))} of {self.config.train.steps} steps"


def chunk_documents(reader: TokenReader, chunk: int) -> ChunkDocuments:
    """Keys and ends of a chunk's documents, read from its shard. Raises CorpusError where they cannot be."""
    content = _before_tokens(reader, chunk)
    members: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            while len(members) < 2 and (member := tar.next()):
                file = tar.extractfile(member)
                members[member.name.partition(".")[2]] = file.read() if file else b""
        ends = np.load(io.BytesIO(members["docs.npy"]), allow_pickle=False)
        keys = json.loads(members["json"])["documents"]
    except (tarfile.TarError, KeyError, ValueError, TypeError) as error:
        raise CorpusError(
            f"Chunk {chunk} of the {reader.split} split of {reader.corpus} cannot be read: {error}. "
            "`gptdist data verify` lists all damage."
        ) from None
    return ChunkDocuments(keys, ends)


def find_document(reader: TokenReader, key: str) -> Iterator[Found]:
    """Where the document `key` is; reads what the shards say of every chunk, but no tokens."""
    written = {json.dumps(key, ensure_ascii=ascii_only).encode() for ascii_only in (True, False)}
    for chunk in range(len(reader.index)):
        content = _before_tokens(reader, chunk)
        if not any(form in content for form in written):
            continue
        documents, offset = chunk_documents(reader, chunk), int(reader.index.token_start[chunk])
        starts = np.concatenate([[0], documents.ends[:-1]])
        for number, own in enumerate(documents.keys):
            if own == key:
                yield Found(chunk, offset + int(starts[number]), offset + int(documents.ends[number]))


def _before_tokens(reader: TokenReader, chunk: int) -> bytes:
    """The bytes of a chunk in its shard up to its tokens: the ends of its documents and their keys."""
    index = reader.index
    path = reader.store.path(reader.manifest.split(reader.split).shards[int(index.shard[chunk])])
    first, stop = int(index.sample_offset[chunk]), int(index.tokens_offset[chunk])
    try:
        with path.open("rb") as file:
            file.seek(first)
            return file.read(stop - first)
    except OSError as error:
        raise CorpusError(f"Shard {path} cannot be read: {error.strerror}.") from None
