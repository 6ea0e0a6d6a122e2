"""What a corpus build counts: documents read, kept and dropped, their lengths and sources, and a few samples of each.

Counts of parts of a corpus add up to the counts of the whole in any order and any grouping, samples included, so that
a report does not depend on who worked on what. Knows no files and no stages; reasons and sources are only names.
"""

from bisect import insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

KEPT = "kept"
SAMPLES_PER_CLASS = 8
SAMPLE_CHARACTERS = 300
LENGTH_BINS = 64


@dataclass
class Counts:
    """Documents, their UTF-8 bytes and, where they were tokenized, their tokens with one end of text each."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0

    def add(self, documents: int, text_bytes: int, tokens: int = 0) -> None:
        """Add to each count."""
        self.documents += documents
        self.text_bytes += text_bytes
        self.tokens += tokens


@dataclass
class LengthHistogram:
    """Lengths by powers of two: bin 0 has length 0, bin b lengths from 2^(b-1) to 2^b - 1.

    `documents[b]` are in the bin; `totals[b]` is the sum of their lengths.
    """

    documents: list[int] = field(default_factory=lambda: [0] * LENGTH_BINS)
    totals: list[int] = field(default_factory=lambda: [0] * LENGTH_BINS)

    def add(self, lengths: np.ndarray) -> None:
        """Count documents of these lengths: int [documents], each below 2^53."""
        # The exponent of a double is the bit length of an integer below 2^53, and such sums are exact in doubles.
        exact = lengths.astype(np.float64)
        bins = np.frexp(exact)[1]
        self._add(np.bincount(bins).tolist(), np.bincount(bins, weights=exact).tolist())

    def merge(self, other: "LengthHistogram") -> None:
        """Add what `other` counted."""
        self._add(other.documents, other.totals)

    def _add(self, documents: Sequence[int], totals: Sequence[float]) -> None:
        for index, (count, total) in enumerate(zip(documents, totals, strict=True)):
            self.documents[index] += count
            self.totals[index] += int(total)


class Sample(NamedTuple):
    """The beginning of a document. `hash` is the document's own sample hash, 64 bits; the smallest are kept."""

    hash: int
    key: str
    text: str


@dataclass
class BuildStatistics:
    """Counts of any part of a build. `documents_read` = kept + dropped, once a whole build has been added up.

    `bytes_read` is text as it was read; `kept` (by split), `sources` and `source_drops` (by source) and `dropped` (by
    reason) count it as it was when that was decided: cleaned, where a stage cleans. Reasons are a few short fixed
    names ("too short"), not sentences, because a table and samples are kept for each.
    """

    documents_read: int = 0
    bytes_read: int = 0
    kept: dict[str, Counts] = field(default_factory=dict)
    dropped: dict[str, Counts] = field(default_factory=dict)
    sources: dict[str, Counts] = field(default_factory=dict)
    source_drops: dict[str, Counts] = field(default_factory=dict)
    byte_lengths: LengthHistogram = field(default_factory=LengthHistogram)
    token_lengths: LengthHistogram = field(default_factory=LengthHistogram)
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def add_read(self, documents: int, text_bytes: int) -> None:
        """Documents that a source held, usable or not, and the UTF-8 bytes of the texts."""
        self.documents_read += documents
        self.bytes_read += text_bytes

    def add_kept(self, split: str, source: str, byte_lengths: np.ndarray, token_lengths: np.ndarray) -> None:
        """Kept documents of one source: int [documents] each, tokens with the end of text."""
        self.add_kept_mixed(split, [source], np.zeros(len(byte_lengths), dtype=np.int64), byte_lengths, token_lengths)

    def add_kept_mixed(
        self,
        split: str,
        sources: Sequence[str],
        source_ids: np.ndarray,
        byte_lengths: np.ndarray,
        token_lengths: np.ndarray,
    ) -> None:
        """Kept documents of several sources: document i is from `sources[source_ids[i]]`."""
        if not len(source_ids) == len(byte_lengths) == len(token_lengths):
            raise ValueError(
                f"{len(source_ids)} sources, {len(byte_lengths)} byte lengths and {len(token_lengths)} token lengths; "
                "each document has one of each"
            )
        if not len(source_ids):
            return
        self.byte_lengths.add(byte_lengths)
        self.token_lengths.add(token_lengths)
        present, of_present = np.unique(source_ids, return_inverse=True)
        documents = np.bincount(of_present).tolist()
        text_bytes = np.bincount(of_present, weights=byte_lengths).tolist()
        tokens = np.bincount(of_present, weights=token_lengths).tolist()
        for place, source_id in enumerate(present.tolist()):
            counts = (documents[place], int(text_bytes[place]), int(tokens[place]))
            _counts(self.sources, sources[source_id]).add(*counts)
            _counts(self.kept, split).add(*counts)

    def add_dropped(self, reason: str, source: str, documents: int, text_bytes: int) -> None:
        """Documents of one source that do not go into the corpus, or bytes that were cut out of others."""
        if documents or text_bytes:
            _counts(self.dropped, reason).add(documents, text_bytes)
            _counts(self.source_drops, source).add(documents, text_bytes)

    def offer_sample(self, sample_class: str, sample_hash: int, key: str, text: str) -> None:
        """Keep the beginning of a document if its hash is among the smallest of its class: "kept", or a reason."""
        if sample_hash > self.sample_limit(sample_class):
            return
        excerpt = text[:SAMPLE_CHARACTERS] + ("…" if len(text) > SAMPLE_CHARACTERS else "")
        self._keep_sample(sample_class, Sample(int(sample_hash), _encodable(key), _encodable(excerpt)))

    def sample_limit(self, sample_class: str) -> int:
        """Hashes above this one need not be offered: compare a whole array of them before decoding any text."""
        kept = self.samples.get(sample_class, [])
        return kept[-1].hash if len(kept) == SAMPLES_PER_CLASS else (1 << 64) - 1

    def __iadd__(self, other: "BuildStatistics") -> "BuildStatistics":
        self.add_read(other.documents_read, other.bytes_read)
        for name in _TABLES:
            for key, counts in getattr(other, name).items():
                _counts(getattr(self, name), key).add(counts.documents, counts.text_bytes, counts.tokens)
        self.byte_lengths.merge(other.byte_lengths)
        self.token_lengths.merge(other.token_lengths)
        for sample_class, samples in other.samples.items():
            for sample in list(samples):
                self._keep_sample(sample_class, sample)
        return self

    def kept_in_all(self) -> Counts:
        """Kept documents of all splits."""
        return _sum(self.kept.values())

    def dropped_in_all(self) -> Counts:
        """Dropped documents, whatever the reason."""
        return _sum(self.dropped.values())

    def to_dict(self) -> dict[str, object]:
        """JSON values; the same counts always give the same ones in the same order."""
        tables = {name: _render_table(getattr(self, name)) for name in _TABLES}
        histograms = {name: _render_histogram(getattr(self, name)) for name in _HISTOGRAMS}
        samples = {
            sample_class: [{"hash": f"{sample.hash:016x}", "key": sample.key, "text": sample.text} for sample in kept]
            for sample_class, kept in sorted(self.samples.items())
        }
        read = {"documents_read": self.documents_read, "bytes_read": self.bytes_read}
        return {**read, **tables, **histograms, "samples": samples}

    @staticmethod
    def from_dict(raw: object) -> "BuildStatistics":
        """What `to_dict` gave. Raises ValueError where it is anything else."""
        try:
            return _parse(raw)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"these are not the statistics of a build: {error!r}") from None

    def _keep_sample(self, sample_class: str, sample: Sample) -> None:
        kept = self.samples.setdefault(sample_class, [])
        insort(kept, sample)
        del kept[SAMPLES_PER_CLASS:]


_TABLES = ("kept", "dropped", "sources", "source_drops")
_HISTOGRAMS = ("byte_lengths", "token_lengths")


def merge(first: BuildStatistics, second: BuildStatistics) -> BuildStatistics:
    """The sum of both, which stay as they are."""
    total = BuildStatistics()
    total += first
    total += second
    return total


def _counts(table: dict[str, Counts], name: str) -> Counts:
    name = _encodable(name)
    if name not in table:
        table[name] = Counts()
    return table[name]


def _encodable(text: str) -> str:
    """`text` without lone surrogates, which a name of a file or a JSON escape can hold and no UTF-8 file can."""
    return text.encode("utf-8", "replace").decode() if not text.isascii() else text


def _sum(table: Iterable[Counts]) -> Counts:
    total = Counts()
    for counts in table:
        total.add(counts.documents, counts.text_bytes, counts.tokens)
    return total


def _render_table(table: Mapping[str, Counts]) -> dict[str, list[int]]:
    return {name: [counts.documents, counts.text_bytes, counts.tokens] for name, counts in sorted(table.items())}


def _render_histogram(histogram: LengthHistogram) -> dict[str, list[int]]:
    used = max((index + 1 for index, count in enumerate(histogram.documents) if count), default=0)
    return {"documents": histogram.documents[:used], "totals": histogram.totals[:used]}


def _parse(raw: object) -> BuildStatistics:
    if not isinstance(raw, dict):
        raise ValueError(f"the statistics of a build are an object, not {type(raw).__name__}")
    return BuildStatistics(
        documents_read=_whole(raw["documents_read"]),
        bytes_read=_whole(raw["bytes_read"]),
        kept=_parse_table(raw["kept"]),
        dropped=_parse_table(raw["dropped"]),
        sources=_parse_table(raw["sources"]),
        source_drops=_parse_table(raw["source_drops"]),
        byte_lengths=_parse_histogram(raw["byte_lengths"]),
        token_lengths=_parse_histogram(raw["token_lengths"]),
        samples={
            str(sample_class): [Sample(int(sample["hash"], 16), sample["key"], sample["text"]) for sample in kept]
            for sample_class, kept in raw["samples"].items()
        },
    )


def _parse_table(raw: Mapping[str, Sequence[object]]) -> dict[str, Counts]:
    return {str(name): Counts(*(_whole(count) for count in counts)) for name, counts in raw.items()}


def _parse_histogram(raw: Mapping[str, Sequence[object]]) -> LengthHistogram:
    histogram = LengthHistogram()
    histogram._add([_whole(count) for count in raw["documents"]], [_whole(total) for total in raw["totals"]])
    return histogram


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
