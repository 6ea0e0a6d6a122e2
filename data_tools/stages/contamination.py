"""Finds passages of evaluation texts in training documents and cuts them out, as in appendix C of the GPT-3 paper.

Knows texts and word hashes, no files. After Brown et al. 2020, "Language models are few-shot learners": a run of 13
words that also stands in an evaluation text goes, with 200 characters on either side; the document falls into pieces,
of which those under 200 characters go too; a document in more than 10 pieces goes entirely; runs that stand in more
than 10 training documents are common phrases and are let be. An evaluation text of 8 to 12 words counts as one run; of
fewer, it is not looked for, since it would be met by chance.
"""

from collections.abc import Iterable
from typing import NamedTuple, Self

import numpy as np

from data_tools.stages.words import Words, gram_hashes, gram_hashes_of_sums, gram_sums, hash_words, longer_sums

DEFAULT_GRAM_WORDS = 13
MIN_GRAM_WORDS = 8
# A run of words in more training documents than this is a common phrase.
COMMON_DOCUMENTS = 10
MARGIN_CHARACTERS = 200
MIN_PIECE_CHARACTERS = 200
MAX_PIECES = 10

_FIRST_ROOM = 1 << 16
_PROBE_FACTORS = np.array([1, 0x9FB21C651E98DF25, 0xD6E8FEB86659FD93], dtype=np.uint64)
_PROBES = len(_PROBE_FACTORS)
_BYTE_SHIFT = np.uint64(3)
_NONE = np.zeros(0, dtype=np.int64)


class Hits(NamedTuple):
    """Runs of words found in a document, sorted by place: int64 each. `gram` is the row in `EvaluationGrams.grams`."""

    first_word: np.ndarray
    num_words: np.ndarray
    gram: np.ndarray


class EvaluationGrams:
    """Hashes of the runs of words to look for.

    grams: sorted and different, uint64. sizes: of how many words runs are, sorted. prefix_filter: a Bloom filter of the
    first MIN_GRAM_WORDS words of every run, at which most words of a clean document end; uint8 [a power of two].
    """

    def __init__(self, grams: np.ndarray, sizes: Iterable[int], prefix_filter: np.ndarray) -> None:
        self.grams = grams
        self.sizes = tuple(sorted(set(sizes)))
        self.prefix_filter = prefix_filter

    @classmethod
    def of_texts(cls, texts: Iterable[str], gram_words: int = DEFAULT_GRAM_WORDS) -> Self:
        """All runs of `gram_words` words of evaluation texts. For each different run 12 bytes are kept, 80 needed."""
        if gram_words < MIN_GRAM_WORDS:
            raise ValueError(f"gram_words is {gram_words}; it must be at least {MIN_GRAM_WORDS}")
        sizes: set[int] = set()
        grams, prefixes = _Different(), _Different()
        for text in texts:
            words = hash_words(text).hashes
            if len(words) >= MIN_GRAM_WORDS:
                size = min(gram_words, len(words))
                sizes.add(size)
                grams.add(gram_hashes(words, size))
                prefixes.add(gram_sums(words, MIN_GRAM_WORDS)[: len(words) - size + 1])
        return cls(grams.sorted(), sizes, _bloom_filter(prefixes.sorted()))

    def hits(self, word_hashes: np.ndarray) -> Hits:
        """Every run of the document's words that is an evaluation's too, overlapping ones as well."""
        sums = gram_sums(word_hashes, MIN_GRAM_WORDS)
        first_word = np.flatnonzero(_may_hold(self.prefix_filter, sums, 0))
        for probe in range(1, _PROBES):
            first_word = first_word[_may_hold(self.prefix_filter, sums[first_word], probe)]
        if not len(first_word) or not self.sizes:
            return Hits(_NONE, _NONE, _NONE)
        sums = sums[first_word]
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for size in range(MIN_GRAM_WORDS, self.sizes[-1] + 1):
            if size > MIN_GRAM_WORDS:
                # Of runs sorted by place those that reach beyond the end of the document are the last.
                first_word = first_word[: np.searchsorted(first_word, len(word_hashes) - size, side="right")]
                sums = longer_sums(sums[: len(first_word)], word_hashes[first_word + size - 1])
            if size in self.sizes:
                grams = gram_hashes_of_sums(sums, size)
                rows = np.minimum(np.searchsorted(self.grams, grams), len(self.grams) - 1)
                same = self.grams[rows] == grams
                found.append((first_word[same], np.full(np.count_nonzero(same), size), rows[same]))
        first_word, num_words, gram = (np.concatenate(column) for column in zip(*found, strict=True))
        by_place = np.argsort(first_word, kind="stable")
        return Hits(first_word[by_place], num_words[by_place], gram[by_place])

    def new_counts(self) -> np.ndarray:
        """How many documents each run stands in, yet none: int32 [grams]. Counts of parts of a corpus add up."""
        return np.zeros(len(self.grams), dtype=np.int32)

    def count_documents(self, hits: Hits, counts: np.ndarray) -> None:
        """Add one document's hits to `counts`: one for each run, however often it stands there."""
        counts[np.unique(hits.gram)] += 1

    def without_common(self, counts: np.ndarray, most_documents: int = COMMON_DOCUMENTS) -> Self:
        """The runs that stand in at most `most_documents` documents, by counts over all training documents."""
        return self.without(np.flatnonzero(counts > most_documents))

    def without(self, rows: np.ndarray) -> Self:
        """All runs but those of these rows of `grams`."""
        grams = np.delete(self.grams, rows)
        # The filter may let more through than it need.
        return type(self)(grams, self.sizes if len(grams) else (), self.prefix_filter)


def cut(
    text: str,
    words: Words,
    hits: Hits,
    margin: int = MARGIN_CHARACTERS,
    min_piece: int = MIN_PIECE_CHARACTERS,
    max_pieces: int = MAX_PIECES,
) -> list[str] | None:
    """What is left of `text`, in its order; `words` are its words and `hits` those of them that are an evaluation's.

    Without hits the text itself, untouched whatever its length. Of a text with hits the pieces between the holes; those
    shorter than `min_piece` characters, or blank, are left out, so that the list may be empty. None where there are
    more than `max_pieces`, the short ones counted: the whole document is too close to an evaluation.
    """
    if not len(hits.first_word):
        return [text]
    begins = np.maximum(words.starts[hits.first_word] - margin, 0)
    finishes = np.minimum(words.ends[hits.first_word + hits.num_words - 1] + margin, len(text))
    # A hole ends where everything that began before the next one has ended.
    finishes = np.maximum.accumulate(finishes)
    opens = np.flatnonzero(begins[1:] > finishes[:-1]) + 1
    hole_begins = begins[np.concatenate([[0], opens])]
    hole_ends = finishes[np.concatenate([opens - 1, [len(finishes) - 1]])]
    bounds = zip([0, *hole_ends.tolist()], [*hole_begins.tolist(), len(text)], strict=True)
    pieces = [text[start:stop] for start, stop in bounds if stop > start]
    if len(pieces) > max_pieces:
        return None
    return [piece for piece in pieces if len(piece) >= min_piece and not piece.isspace()]


class _Different:
    """Collects hashes in one array and forgets repeats whenever it is full."""

    def __init__(self) -> None:
        self._hashes = np.empty(_FIRST_ROOM, dtype=np.uint64)
        self._count = 0

    def add(self, hashes: np.ndarray) -> None:
        if self._count + len(hashes) > len(self._hashes):
            kept = self.sorted()
            self._hashes = np.empty(max(_FIRST_ROOM, 2 * (len(kept) + len(hashes))), dtype=np.uint64)
            self._hashes[: len(kept)] = kept
            self._count = len(kept)
        self._hashes[self._count : self._count + len(hashes)] = hashes
        self._count += len(hashes)

    def sorted(self) -> np.ndarray:
        # Several times as fast as np.unique, which goes by a hash table.
        ordered = np.sort(self._hashes[: self._count])
        is_new = np.ones(len(ordered), dtype=bool)
        np.not_equal(ordered[1:], ordered[:-1], out=is_new[1:])
        return ordered[is_new]


def _bloom_filter(hashes: np.ndarray) -> np.ndarray:
    # 16 to 32 bits for each hash: of other hashes the probes together let 1 in 200 or fewer through.
    num_bytes = 1 << max(10, (2 * len(hashes)).bit_length())
    bits = np.zeros(num_bytes, dtype=np.uint8)
    for probe in range(_PROBES):
        places = _filter_places(num_bytes, hashes, probe)
        np.bitwise_or.at(bits, places >> _BYTE_SHIFT, _bit_in_byte(places))
    return bits


def _may_hold(prefix_filter: np.ndarray, hashes: np.ndarray, probe: int) -> np.ndarray:
    places = _filter_places(len(prefix_filter), hashes, probe)
    held: np.ndarray = (prefix_filter[places >> _BYTE_SHIFT] & _bit_in_byte(places)) != 0
    return held


def _filter_places(num_bytes: int, hashes: np.ndarray, probe: int) -> np.ndarray:
    """Multiply-shift hashing: the upper bits of a product with an odd number, another for each probe."""
    shift = np.uint64(64 - (8 * num_bytes - 1).bit_length())
    places: np.ndarray = hashes * _PROBE_FACTORS[probe] >> shift
    return places


def _bit_in_byte(places: np.ndarray) -> np.ndarray:
    return np.left_shift(np.uint8(1), (places & np.uint64(7)).astype(np.uint8))
