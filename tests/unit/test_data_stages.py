"""Cleaning, words, signatures and contamination of single texts, against slow definitions that are plainly right."""

import math
import unicodedata
from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_tools.stages import words as words_module
from data_tools.stages.clean import Cleaning, DropReason, clean, normalized_digest, text_digest
from data_tools.stages.contamination import EvaluationGrams, cut
from data_tools.stages.near import band_keys, meeting_probability, signature, similarity
from data_tools.stages.words import gram_hashes, hash_words
from gptdist.errors import CorpusError

OWN_WORD_SCRIPTS = (
    "CJK UNI",
    "CJK COM",
    "HIRAG",
    "KATAK",
    "HANGUL",
    "THAI ",
    "LAO ",
    "KHMER",
    "MYANM",
    "BOPOM",
    "HENTAI",
    "HALFW",
)
texts = st.text(st.sampled_from("aAbBcZ09 \n.,'_-éÉßſσΣςİКк中文かナ한ไทหि²\u0301\u200c😀\x00"), max_size=60) | st.text()


def slow_words(text: str) -> list[tuple[int, int]]:
    """Start and end of each word, character by character."""
    kinds = []
    for character in text:
        name = unicodedata.name(character, "")
        if unicodedata.category(character)[0] not in "LMN" or ord(character) >= 0x40000:
            kinds.append("separator")
        elif name.startswith(OWN_WORD_SCRIPTS):
            kinds.append("own word")
        else:
            kinds.append("part")
    found = []
    for kind, run in groupby(range(len(text)), key=kinds.__getitem__):
        places = list(run)
        if kind == "part":
            found.append((places[0], places[-1] + 1))
        elif kind == "own word":
            found.extend((place, place + 1) for place in places)
    return found


def slow_lower(word: str) -> str:
    result = ""
    for character in word:
        choices = (character.casefold(), character.lower(), character)
        result += next(choice for choice in choices if len(choice) == 1)
    return result


def slow_mix(value: int) -> int:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = ((value ^ (value >> shift)) * factor) % 2**64
    return value ^ (value >> 31)


def slow_hash(word: str) -> int:
    base = 0x9E3779B97F4A7C15
    terms = (slow_mix((ord(letter) + base) % 2**64) * pow(base, place, 2**64) for place, letter in enumerate(word))
    return slow_mix(sum(terms) % 2**64)


# --- cleaning ---


def test_cleaning_drops_by_length_in_bytes_after_normalisation() -> None:
    assert clean("", Cleaning()) is DropReason.EMPTY
    assert clean(" \n\u3000", Cleaning(min_bytes=100)) is DropReason.EMPTY
    assert clean(" a ", Cleaning()) == " a "
    assert clean("éé", Cleaning(min_bytes=4, max_bytes=4)) == "éé"
    assert clean("éé", Cleaning(min_bytes=5)) is DropReason.TOO_SHORT
    assert clean("éé", Cleaning(max_bytes=3)) is DropReason.TOO_LONG
    assert clean("e\u0301", Cleaning("nfc", max_bytes=2)) == "é"
    assert clean("e\u0301", Cleaning("none", max_bytes=2)) is DropReason.TOO_LONG
    assert clean("ﬁ²", Cleaning("nfc")) == "ﬁ²"
    assert clean("ﬁ²", Cleaning("nfkc")) == "fi2"


@pytest.mark.parametrize(
    "wrong", [{"normalize": "nfd"}, {"min_bytes": -1}, {"max_bytes": 0}, {"min_bytes": 9, "max_bytes": 8}]
)
def test_cleaning_that_makes_no_sense_is_refused(wrong: dict) -> None:
    with pytest.raises(CorpusError, match=next(iter(wrong))):
        Cleaning(**wrong)


@given(texts)
def test_normalised_digests_ignore_case_and_white_space(text: str) -> None:
    spaced = "\t\n " + text.replace(" ", " \u00a0\r\n") + "\f"
    assert normalized_digest(spaced) == normalized_digest(text)
    plain = " ".join(unicodedata.normalize("NFKC", text).lower().split())
    assert normalized_digest(text) == text_digest(plain)
    assert (text_digest(text) == text_digest(plain)) == (text == plain)


def test_digests_never_change() -> None:
    assert text_digest("a").hex() == "ca978112ca1bbdcafac231b39a23dc4d"
    assert normalized_digest("\uff21  b") == text_digest("a b") != normalized_digest("ab")


# --- words ---


@given(texts)
@settings(deadline=None, max_examples=300)
def test_words_are_those_of_the_slow_definition(text: str) -> None:
    hashes, starts, ends = hash_words(text)
    assert list(zip(starts.tolist(), ends.tolist(), strict=True)) == slow_words(text)
    assert hashes.tolist() == [slow_hash(slow_lower(text[start:end])) for start, end in slow_words(text)]


def test_every_character_is_of_the_kind_it_should_be() -> None:
    kinds, _ = words_module._tables()
    odd = []
    for code in range(0x40000):
        spaceless = unicodedata.name(chr(code), "").startswith(OWN_WORD_SCRIPTS)
        is_word = unicodedata.category(chr(code))[0] in "LMN"
        expected = 0 if not is_word else 2 if spaceless else 1
        if kinds[code] != expected:
            odd.append(code)
    # Marks of iteration, tone and annotation beside kana and Han, whose names do not begin with the script's.
    assert all(0x3005 <= code <= 0x319F for code in odd)


@pytest.mark.parametrize("length", [1, 100, 32_767, 32_768, 32_769, 70_000, 200_000])
def test_words_across_blocks_and_longer_than_one(length: int) -> None:
    # The same word before and after one that may fill several blocks, and once more as part of wider characters.
    text = f"Some words {'x1' * (length // 2)}x, some words. " + "more words " * 5000
    hashes = hash_words(text).hashes
    assert len(hashes) == 5 + 10_000
    assert hashes[:2].tolist() == hashes[3:5].tolist()
    assert len(np.unique(hashes)) == 4
    assert np.array_equal(hash_words("é " + text).hashes[1:], hashes)


def test_different_words_get_different_hashes() -> None:
    names = [f"{left}{right}" for left in range(300) for right in "abcdefghij"] + [
        str(number) for number in range(200_000)
    ]
    hashes = hash_words(" ".join(names)).hashes
    assert len(np.unique(hashes)) == len(set(names))
    # Each bit is set in half of the hashes, and bits of neighbouring words differ as often as not.
    bits = np.unpackbits(hashes.view(np.uint8)).reshape(-1, 64)
    bound = 5 * 0.5 / math.sqrt(len(hashes))
    assert np.abs(bits.mean(axis=0) - 0.5).max() < bound
    assert np.abs((bits[1:] ^ bits[:-1]).mean(axis=0) - 0.5).max() < bound


@given(st.lists(st.integers(0, 2**64 - 1), max_size=40), st.integers(1, 16))
def test_gram_hashes_are_of_runs(values: list[int], size: int) -> None:
    base = 0xD1342543DE82EF95
    expected = []
    for first in range(len(values) - size + 1):
        run = values[first : first + size]
        total = sum(value * base ** (size - 1 - place) for place, value in enumerate(run))
        expected.append(slow_mix((total + size) % 2**64))
    assert gram_hashes(np.array(values, dtype=np.uint64), size).tolist() == expected


# --- signatures ---


def edited(rng: np.random.Generator, document: np.ndarray, share: float) -> np.ndarray:
    """A copy of word hashes with a share of the words replaced, at least one."""
    copy = document.copy()
    chosen = rng.random(len(copy)) < share
    chosen[rng.integers(len(copy))] = True
    copy[chosen] = rng.integers(0, 2**64, np.count_nonzero(chosen), dtype=np.uint64)
    return copy


def exact_jaccard(left: np.ndarray, right: np.ndarray) -> float:
    sets = [set(gram_hashes(side, min(5, len(side))).tolist()) for side in (left, right)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def estimates(num_words: int, share: float, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """(exact similarities, what signatures of 128 bins make of them)."""
    rng = np.random.default_rng(num_words)
    exact, estimated = [], []
    for _ in range(pairs):
        left = rng.integers(0, 2**64, num_words, dtype=np.uint64)
        right = edited(rng, left, share)
        exact.append(exact_jaccard(left, right))
        estimated.append(float(similarity(signature(left), signature(right))))
    return np.array(exact), np.array(estimated)


@pytest.mark.parametrize("num_words", [12, 40, 150, 1000, 4000])
@pytest.mark.parametrize("share", [0.01, 0.05, 0.3])
def test_similarity_estimates_jaccard(num_words: int, share: float) -> None:
    exact, estimated = estimates(num_words, share, pairs=300)
    error = estimated - exact
    # As 128 independent minima do: a spread of sqrt(s (1 - s) / 128), that is 0.025 at s = 0.91 and 0.042 at 0.63. Over
    # 1,000 pairs 0.89 to 1.06 of that was measured for 80 words and more. Texts with far fewer shingles than bins
    # borrow, which leaves fewer independent bins: 1.25 to 1.33 of it at 12 words.
    spread = math.sqrt(float(np.mean(exact * (1 - exact))) / 128)
    allowed = 1.15 if num_words >= 80 else 1.5
    assert float(np.sqrt(np.mean(error**2))) < allowed * spread
    assert abs(float(error.mean())) < 4 * allowed * spread / math.sqrt(len(error))


def test_as_good_as_datasketch() -> None:
    datasketch = pytest.importorskip("datasketch")
    rng = np.random.default_rng(5)
    ours, theirs = [], []
    for _ in range(60):
        left = rng.integers(0, 2**64, 300, dtype=np.uint64)
        right = edited(rng, left, 0.04)
        exact = exact_jaccard(left, right)
        hashed = [datasketch.MinHash(num_perm=128) for _ in range(2)]
        for side, document in zip(hashed, (left, right), strict=True):
            side.update_batch([gram.tobytes() for gram in gram_hashes(document, 5)])
        ours.append(float(similarity(signature(left), signature(right))) - exact)
        theirs.append(hashed[0].jaccard(hashed[1]) - exact)
    # Over 300 pairs the root of the mean square was 0.036 for ours and 0.041 for theirs.
    assert np.std(ours) < 1.15 * np.std(theirs)


def test_signatures_of_short_texts() -> None:
    def of(text: str) -> np.ndarray | None:
        return signature(hash_words(text).hashes)

    assert of("") is None
    assert of("... !") is None
    one, same, other = of("Just three words"), of("just THREE, words!"), of("just four words")
    assert similarity(one, same) == 1
    assert similarity(one, other) == 0
    assert similarity(of("a b c d e"), of("a b c d e f")) == pytest.approx(0.5, abs=0.2)


@given(st.lists(st.integers(0, 30), min_size=5, max_size=60))
def test_a_signature_is_of_the_set_of_shingles(values: list[int]) -> None:
    hashes = np.array(values, dtype=np.uint64)
    assert np.array_equal(signature(np.concatenate([hashes, hashes, hashes])), signature(np.tile(hashes, 2)))
    assert signature(hashes, bins=48).shape == (48,)


def test_band_keys_meet_as_often_as_the_formula_says() -> None:
    rng = np.random.default_rng(9)
    met, expected = 0, 0.0
    for _ in range(400):
        left = rng.integers(0, 2**64, 400, dtype=np.uint64)
        right = edited(rng, left, 0.05)
        keys = band_keys(np.stack([signature(left), signature(right)]), 16)
        met += bool((keys[0] == keys[1]).any())
        expected += meeting_probability(exact_jaccard(left, right), 128, 16)
    assert abs(met - expected) < 4 * math.sqrt(expected * (1 - expected / 400))


def test_a_band_key_is_of_its_band_and_all_its_bins() -> None:
    same = np.full((1, 32), 7, dtype=np.uint32)
    assert len(np.unique(band_keys(same, 8))) == 8
    for place in range(32):
        changed = same.copy()
        changed[0, place] += 1
        differs = band_keys(changed, 8)[0] != band_keys(same, 8)[0]
        assert np.flatnonzero(differs).tolist() == [place // 4]
    with pytest.raises(ValueError, match="5 bands"):
        band_keys(same, 5)


# --- contamination ---


def slow_cut(text: str, evaluations: list[str], n: int, margin: int, shortest: int, most: int) -> list[str] | None:
    """As the paper says it, with strings of words and a mark on each character."""
    runs = set()
    for evaluation in evaluations:
        found = tuple(slow_lower(evaluation[start:end]) for start, end in slow_words(evaluation))
        if len(found) >= 8:
            size = min(n, len(found))
            runs.update(found[first : first + size] for first in range(len(found) - size + 1))
    spans = slow_words(text)
    found = tuple(slow_lower(text[start:end]) for start, end in spans)
    removed = [False] * len(text)
    for first in range(len(found)):
        for size in range(8, n + 1):
            if found[first : first + size] in runs and first + size <= len(found):
                stop = min(len(text), spans[first + size - 1][1] + margin)
                start = max(0, spans[first][0] - margin)
                removed[start:stop] = [True] * (stop - start)
    if not any(removed):
        return [text]
    pieces = []
    for gone, run in groupby(range(len(text)), key=removed.__getitem__):
        places = list(run)
        if not gone:
            pieces.append(text[places[0] : places[-1] + 1])
    return None if len(pieces) > most else [piece for piece in pieces if len(piece) >= shortest and piece.strip()]


few_words = st.lists(st.sampled_from(["a", "A", "bb", "b,b", "é", "中", "  "]), max_size=50).map(" ".join)


@given(
    few_words,
    st.lists(few_words, max_size=3),
    st.integers(8, 13),
    st.integers(0, 4),
    st.integers(0, 6),
    st.integers(1, 3),
)
@settings(deadline=None, max_examples=300)
def test_cuts_are_those_of_the_slow_definition(
    text: str, evaluations: list[str], n: int, margin: int, shortest: int, most: int
) -> None:
    looked_for = EvaluationGrams.of_texts(evaluations, n)
    words = hash_words(text)
    pieces = cut(text, words, looked_for.hits(words.hashes), margin, shortest, most)
    assert pieces == slow_cut(text, evaluations, n, margin, shortest, most)


def prose(seed: int, num_words: int) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(f"w{number}" for number in rng.integers(0, 1_000_000, num_words))


PASSAGE = "The quick, brown fox; jumps over the lazy dog and then it sleeps under 1 old tree."


def decontaminated(text: str, evaluations: list[str]) -> list[str] | None:
    words = hash_words(text)
    return cut(text, words, EvaluationGrams.of_texts(evaluations).hits(words.hashes))


def test_a_planted_passage_goes_with_200_characters_on_either_side() -> None:
    before, after = prose(1, 100), prose(2, 100)
    copy = PASSAGE.upper().replace(",", "").replace(" ", "\n")
    end = len(copy) - 1  # the full stop is no part of the last word
    assert decontaminated(f"{before} {copy} {after}", [PASSAGE]) == [f"{before} "[:-200], f". {after}"[200:]]
    assert decontaminated(f"{copy} {after}", [PASSAGE]) == [f"{copy} {after}"[end + 200 :]]
    assert decontaminated(f"{before} {copy}", [PASSAGE]) == [f"{before} "[:-200]]
    assert decontaminated(f"{before[:300]} {copy} {after}", [PASSAGE]) == [f". {after}"[200:]]
    assert decontaminated(copy, [PASSAGE]) == []
    untouched = before + after
    assert decontaminated(untouched, [PASSAGE]) == [untouched]
    assert decontaminated("short", [PASSAGE]) == ["short"]


def test_one_word_less_than_a_run_is_no_hit() -> None:
    passage = PASSAGE.split()
    assert len(passage) == 17
    assert len(EvaluationGrams.of_texts([PASSAGE]).grams) == 5
    twelve, thirteen = " ".join(passage[:12]), " ".join(passage[:13])
    assert decontaminated(twelve, [PASSAGE]) == [twelve]
    assert decontaminated(thirteen, [PASSAGE]) == []
    # A short evaluation text counts as a whole, down to eight words.
    eight, seven = " ".join(passage[:8]), " ".join(passage[:7])
    assert decontaminated(eight, [eight]) == []
    assert decontaminated(seven, [eight, seven]) == [seven]
    assert decontaminated(twelve, [eight]) == []


def test_more_than_ten_pieces_drop_the_document() -> None:
    parts = [prose(seed, 100) for seed in range(11)]
    assert len(decontaminated(f" {PASSAGE} ".join(parts[:10]), [PASSAGE])) == 10
    assert decontaminated(f" {PASSAGE} ".join(parts), [PASSAGE]) is None


def test_common_phrases_are_let_be() -> None:
    other = prose(99, 20)
    looked_for = EvaluationGrams.of_texts([PASSAGE, other])
    # The passage in 11 documents, and twice in each; the other text in 10; counted in two parts.
    documents = [f"{PASSAGE} {PASSAGE} {other if number < 10 else ''}" for number in range(11)]
    counts = looked_for.new_counts()
    for part in (documents[:4], documents[4:]):
        counts_of_part = looked_for.new_counts()
        for document in part:
            looked_for.count_documents(looked_for.hits(hash_words(document).hashes), counts_of_part)
        counts += counts_of_part
    assert sorted(np.unique(counts).tolist()) == [10, 11]
    rest = looked_for.without_common(counts)
    assert len(rest.grams) == len(looked_for.grams) - 5 == 8
    assert not len(rest.hits(hash_words(PASSAGE).hashes).gram)
    assert len(rest.hits(hash_words(other).hashes).gram) == 8
    none_left = rest.without(np.arange(8))
    assert not len(none_left.hits(hash_words(other).hashes).gram)


def test_many_evaluation_texts_are_all_found_and_hardly_anything_else() -> None:
    evaluations = [prose(seed, 15 + seed % 30) for seed in range(2000)]
    looked_for = EvaluationGrams.of_texts(evaluations)
    assert np.array_equal(looked_for.grams, np.unique(looked_for.grams))
    for text in evaluations[::50]:
        hits = looked_for.hits(hash_words(text).hashes)
        assert hits.first_word.tolist() == list(range(len(text.split()) - 12))
        assert np.array_equal(looked_for.grams[hits.gram], gram_hashes(hash_words(text).hashes, 13))
    assert not len(looked_for.hits(hash_words(prose(5000, 100_000)).hashes).gram)
    assert EvaluationGrams.of_texts([]).hits(hash_words(prose(1, 100)).hashes).gram.tolist() == []
