"""MinHash signatures of texts, how alike two texts are by them, and the keys under which likely pairs meet.

Knows word hashes and arrays; which document of a pair goes is decided in duplicates.py. The likeness of two texts is
the Jaccard similarity of their sets of shingles, runs of a few words. One-permutation hashing (Li, Owen & Zhang 2012,
"One permutation hashing") makes a signature in one pass; bins that stay empty borrow from others (Shrivastava 2017,
"Optimal densification for fast and accurate minwise hashing").
"""

from functools import lru_cache

import numpy as np

from data_tools.stages.words import gram_hashes, mixed

DEFAULT_BINS = 128
# 16 bands of 8 bins: of pairs with a similarity of 0.8, 95 % meet in a band; of 0.9, all but 1 in 10,000; of 0.5, 6 %.
DEFAULT_BANDS = 16
DEFAULT_SHINGLE_WORDS = 5

_LOW_32 = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
_BAND_BASE = np.uint64(0xF1357AEA2E62A9C5)


def signature(
    word_hashes: np.ndarray, bins: int = DEFAULT_BINS, shingle_words: int = DEFAULT_SHINGLE_WORDS
) -> np.ndarray | None:
    """uint32 [bins] of a text's words. None for a text without words, which is like no other.

    A text of fewer than `shingle_words` words is one shingle. Memory and time grow with the words, not the bins.
    """
    if not len(word_hashes):
        return None
    shingles = gram_hashes(word_hashes, min(shingle_words, len(word_hashes)))
    # A shingle's upper half chooses its bin, its lower half competes there.
    places = ((shingles >> _HALF) * np.uint64(bins) >> _HALF).astype(np.intp)
    # One above any value, while it is 64 bits wide: a bin that got none.
    empty = 1 << 32
    smallest = np.full(bins, empty, dtype=np.uint64)
    np.minimum.at(smallest, places, shingles & _LOW_32)
    filled = smallest != empty
    if not filled.all():
        wanting, lenders = np.flatnonzero(~filled), np.flatnonzero(filled)
        turns = _borrowing_turns(bins)[np.ix_(wanting, lenders)]
        smallest[wanting] = smallest[lenders[turns.argmin(axis=1)]]
    return smallest.astype(np.uint32)


def similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Estimates of the Jaccard similarity: float64 [...] of signatures [..., bins], which broadcast.

    The share of equal bins. Its standard error is about sqrt(s (1 - s) / bins): 0.035 for s = 0.8 and 128 bins.
    """
    equal = np.count_nonzero(left == right, axis=-1)
    return np.asarray(equal / left.shape[-1], dtype=np.float64)


def band_keys(signatures: np.ndarray, bands: int = DEFAULT_BANDS) -> np.ndarray:
    """uint64 [documents, bands] of signatures [documents, bins]: equal where a whole band of bins is equal.

    Keys of different bands differ, so that all keys can lie in one table. Raises ValueError where `bands` does not
    divide the bins.
    """
    documents, bins = signatures.shape
    if bands < 1 or bins % bands:
        raise ValueError(f"{bins} bins cannot be parted into {bands} bands; use a divisor of the bins")
    rows = signatures.reshape(documents, bands, bins // bands)
    keys = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), (documents, bands)).copy()
    for row in range(bins // bands):
        keys *= _BAND_BASE
        keys += rows[:, :, row]
        mixed(keys)
    return keys


def meeting_probability(jaccard: float, bins: int = DEFAULT_BINS, bands: int = DEFAULT_BANDS) -> float:
    """How likely two texts of a similarity share at least one band key: 1 - (1 - s^r)^bands, with r bins in a band."""
    return float(1 - (1 - jaccard ** (bins // bands)) ** bands)


@lru_cache(maxsize=4)
def _borrowing_turns(bins: int) -> np.ndarray:
    """[i, j]: at which turn bin i, if empty, asks bin j; each asks all in an order of its own. int32 [bins, bins]."""
    random = mixed(np.arange(bins * bins, dtype=np.uint64).reshape(bins, bins) + _BAND_BASE)
    return random.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable").astype(np.int32)
