"""The words of a text as 64-bit hashes, and hashes of runs of them: vectorised, with no word ever made a string.

Knows what a word is and nothing of what is asked about it. A word is the longest run of letters, digits and the marks
on them, in any script, whatever the case; everything else parts words. A character of a script that puts no space
between words (Han, kana, Hangul, Thai, Lao, Khmer, Burmese) is a word of its own. What is a letter, and its lower case,
is what Python's own Unicode tables say: builds that must agree use one version of Python.
"""

import unicodedata
from functools import lru_cache
from typing import NamedTuple

import numpy as np

# No letter has been assigned at or above; the tag and variation characters there part words.
_TABLE_SIZE = 0x40000
# Scripts whose characters are words of their own: first and last code point.
_OWN_WORDS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1100, 0x11FF),  # Hangul parts
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x31FF),  # kana, bopomofo, Hangul parts, marks of iteration
    (0x3400, 0x4DBF),  # Han
    (0x4E00, 0x9FFF),
    (0xA960, 0xA97F),  # Hangul
    (0xA9E0, 0xA9FF),  # Burmese
    (0xAA60, 0xAA7F),
    (0xAC00, 0xD7FF),
    (0xF900, 0xFAFF),  # Han, for compatibility
    (0xFF66, 0xFFDC),  # kana and Hangul of half width
    (0x116D0, 0x116FF),  # Burmese
    (0x1AFF0, 0x1B16F),  # kana
    (0x20000, 0x3FFFF),  # Han
)
_SEPARATOR, _PART_OF_WORD, _OWN_WORD = 0, 1, 2

# Characters that are hashed at once: the arrays of a block stay in a core's cache.
_BLOCK = 1 << 15
# Odd, so that it has an inverse modulo 2^64, and 5 modulo 8, so that its powers have the longest period.
_BASE = 0x9E3779B97F4A7C15
_GRAM_BASE = 0xD1342543DE82EF95
# The splitmix64 finaliser (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators").
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


class Words(NamedTuple):
    """The words of a text in their order: uint64 hashes, and where each starts and ends in it, in characters."""

    hashes: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def hash_words(text: str) -> Words:
    """All words of `text`; equal words have equal hashes.

    A hash is sum over the characters j of letter(c_j) B^j modulo 2^64, mixed, where letter() is a 64-bit hash of the
    lower-case character. It is found for all words at once from running sums. Different words collide with a
    probability near 2^-60. As all polynomials modulo 2^64, it can be made to collide on purpose, with words of some
    thousand letters (Thue-Morse sequences); that lets an author make their own texts look alike, and no more. Memory:
    10 to 25 bytes for each character.
    """
    if text.isascii():
        raw = text.encode("ascii")
        codes = np.frombuffer(raw, dtype=np.uint8)
        kinds = np.frombuffer(raw.translate(_ascii_kinds()), dtype=np.uint8)
        letters = _ascii_letters()
    else:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        all_kinds, letters = _tables()
        kinds = np.take(all_kinds, codes, mode="clip")
    starts, ends = _bounds(kinds)
    hashes = np.empty(len(starts), dtype=np.uint64)
    first = 0
    while first < len(starts):
        # As many words as end within a block, but at least one.
        stop = int(np.searchsorted(ends, starts[first] + _BLOCK, side="right")) if len(codes) > _BLOCK else len(starts)
        stop = max(stop, first + 1)
        base = starts[first]
        block = codes[base : ends[stop - 1]]
        hashes[first:stop] = _hash_block(block, starts[first:stop] - base, ends[first:stop] - base, letters)
        first = stop
    return Words(hashes, starts, ends)


def gram_hashes(word_hashes: np.ndarray, size: int) -> np.ndarray:
    """Hashes of all runs of `size` words: uint64 [max(0, words - size + 1)]. Runs of another size have others."""
    return gram_hashes_of_sums(gram_sums(word_hashes, size), size)


def gram_hashes_of_sums(sums: np.ndarray, size: int) -> np.ndarray:
    """What `gram_hashes` makes of the sums of runs of `size` words."""
    return mixed(sums + np.uint64(size))


def gram_sums(word_hashes: np.ndarray, size: int) -> np.ndarray:
    """Polynomials of all runs of `size` words, first word first: uint64 [max(0, words - size + 1)].

    A run is put together from runs of 1, 2, 4... words, so that 13 words take 5 steps and not 12.
    """
    if size < 1:
        raise ValueError(f"size is {size}; a run has at least one word")
    if size > len(word_hashes):
        return np.zeros(0, dtype=np.uint64)
    sums, sums_size = word_hashes[:0], 0
    doubled, doubled_size = word_hashes, 1
    while True:
        if size & doubled_size:
            sums = _joined(doubled, doubled_size, sums, sums_size) if sums_size else doubled
            sums_size += doubled_size
        if sums_size == size:
            return sums
        doubled = _joined(doubled, doubled_size, doubled, doubled_size)
        doubled_size *= 2


def longer_sums(sums: np.ndarray, next_words: np.ndarray) -> np.ndarray:
    """The sums of runs that go on for one word more."""
    return sums * np.uint64(_GRAM_BASE) + next_words


def mixed(values: np.ndarray) -> np.ndarray:
    """`values` itself, each replaced so that all its bits depend on all it had; different values stay different."""
    values ^= values >> _SHIFT_1
    values *= _MULTIPLY_1
    values ^= values >> _SHIFT_2
    values *= _MULTIPLY_2
    values ^= values >> _SHIFT_3
    return values


def _joined(left: np.ndarray, left_size: int, right: np.ndarray, right_size: int) -> np.ndarray:
    """The sums of runs that are one of `left` and, after it, one of `right`."""
    count = len(right) - left_size
    joined: np.ndarray = left[:count] * np.uint64(pow(_GRAM_BASE, right_size, 1 << 64))
    joined += right[left_size : left_size + count]
    return joined


def _bounds(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where words start and where they end: int64, int64."""
    inside = kinds != _SEPARATOR
    # A character goes on with the word before it where both are parts of words.
    part = kinds == _PART_OF_WORD
    joined = np.zeros(len(kinds) + 1, dtype=bool)
    np.logical_and(part[1:], part[:-1], out=joined[1:-1])
    starts = np.flatnonzero(inside & ~joined[:-1])
    ends = np.flatnonzero(inside & ~joined[1:])
    ends += 1
    return starts, ends


def _hash_block(codes: np.ndarray, starts: np.ndarray, ends: np.ndarray, letters: np.ndarray) -> np.ndarray:
    length = len(codes)
    # Powers of two, so that few tables are made; only a single word can be longer than a block.
    powers, inverses = _powers(max(_BLOCK, 1 << (length - 1).bit_length()))
    terms = np.take(letters, codes, mode="clip")
    terms *= powers[:length]
    sums = np.zeros(length + 1, dtype=np.uint64)
    np.cumsum(terms, out=sums[1:])
    hashes = np.take(sums, ends)
    hashes -= np.take(sums, starts)
    hashes *= np.take(inverses, starts)
    return mixed(hashes)


@lru_cache(maxsize=2)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """B^0 to B^(count - 1) modulo 2^64, and their inverses."""
    tables = []
    for base in (_BASE, pow(_BASE, -1, 1 << 64)):
        factors = np.full(count, base, dtype=np.uint64)
        factors[0] = 1
        tables.append(np.cumprod(factors, dtype=np.uint64))
    return tables[0], tables[1]


@lru_cache(maxsize=1)
def _ascii_letters() -> np.ndarray:
    return _letter_hashes(np.array([ord(chr(code).lower()) for code in range(128)]))


@lru_cache(maxsize=1)
def _ascii_kinds() -> bytes:
    return bytes(_PART_OF_WORD if code < 128 and chr(code).isalnum() else _SEPARATOR for code in range(256))


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """For each code point its kind and the hash of its lower case. Made when the first text that is not ASCII comes."""
    kinds = np.zeros(_TABLE_SIZE, dtype=np.uint8)
    lower = np.arange(_TABLE_SIZE)
    for code in range(_TABLE_SIZE):
        character = chr(code)
        if unicodedata.category(character)[0] in "LMN":
            kinds[code] = _PART_OF_WORD
            lower[code] = ord(_lower(character))
    for first, last in _OWN_WORDS:
        own = kinds[first : last + 1]
        own[own == _PART_OF_WORD] = _OWN_WORD
    return kinds, _letter_hashes(lower)


def _lower(character: str) -> str:
    """One character for one, so that offsets stay: case-folded where that is one, which makes a final sigma a sigma."""
    folded = character.casefold()
    if len(folded) != 1:
        folded = character.lower()
    return folded if len(folded) == 1 else character


def _letter_hashes(lower: np.ndarray) -> np.ndarray:
    # The offset keeps code point 0 from being 0.
    return mixed(lower.astype(np.uint64) + np.uint64(_BASE))
