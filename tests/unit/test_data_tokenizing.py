"""Tokenizers of a build: every kind, the fast path and when it is not taken, tiktoken's encodings, the same bytes."""

import builtins
import hashlib
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers, trainers

from data_tools.tokenizing import encoders
from data_tools.tokenizing.answers import ReferenceAnswers
from data_tools.tokenizing.encoders import KNOWN_SPELLINGS, FastEncoder, choose_encoder, reference_answers
from data_tools.tokenizing.hard_texts import hard_texts, of_vocabulary
from data_tools.tokenizing.new_characters import texts_with_new_characters
from data_tools.tokenizing.oniguruma import oniguruma_pattern
from data_tools.tokenizing.safe_cuts import can_be_cut, cut_lines, cut_words
from data_tools.tokenizing.tiktoken_encoding import _tokenizer_json, check_same_ids, tokenizer_of_encoding
from data_tools.tokenizing.tokenizers import check_sample, check_tokenizer, train_tokenizer
from gptdist.data.tokenizer import BYTE_LETTERS, CorpusTokenizer
from gptdist.errors import CorpusError

ROOT = Path(__file__).resolve().parents[2]
END = "<|endoftext|>"
R50K = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
    r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {"r50k": R50K, "gpt2": GPT2, "cl100k": CL100K, "o200k": O200K}

# White space, ends, digits, contractions and letters of every kind come often, all else sometimes.
TEXTS = st.text(
    st.one_of(
        st.sampled_from(" \n\r\t'aAsStT19!/\u00a0\u00e9\u4e2d\u0301\u01c5\U0001f600\u017f"),
        st.characters(codec="utf-8"),
    )
)


def corpus() -> list[str]:
    """Some English, code and other scripts to learn merges from."""
    modules = ("json/decoder.py", "json/scanner.py", "textwrap.py", "string.py", "colorsys.py")
    library = Path(os.__file__).parent
    return [(library / name).read_text() for name in modules] + hard_texts()


def ranks_from(texts: Sequence[str], pattern: str, size: int = 700) -> dict[bytes, int]:
    """Mergeable ranks as tiktoken has them: 256 bytes, then what merged, in order."""
    bpe = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(oniguruma_pattern(pattern)), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False))
    values = {letter: value for value, letter in enumerate(BYTE_LETTERS)}
    vocab = bpe.get_vocab()
    return {bytes(values[letter] for letter in token): vocab[token] for token in sorted(vocab, key=vocab.__getitem__)}


@pytest.fixture(scope="module")
def encodings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tiktoken.Encoding]]:
    """Small encodings in a plugin of tiktoken, as anyone may install one; one of them has no vocabulary at hand."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "tiktoken_ext").mkdir()  # without __init__.py: the package is a namespace that others are part of
    special = {END: 700, "<|fim|>": 705, "<|pad|>": 701}  # with ids that nothing has
    tables = {
        name: {
            "pattern": pattern,
            "ranks": {token.hex(): rank for token, rank in ranks_from(corpus(), pattern).items()},
        }
        for name, pattern in PATTERNS.items()
    }
    (folder / "tables.json").write_text(json.dumps(tables))
    (folder / "tiktoken_ext" / "gptdist_small.py").write_text(
        "import json\nfrom pathlib import Path\nfrom tiktoken.load import load_tiktoken_bpe\n"
        "TABLES = json.loads((Path(__file__).parents[1] / 'tables.json').read_text())\n"
        "def fields(name, pattern, ranks):\n"
        f"    return dict(name=name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={special})\n"
        "def encoding(name):\n"
        "    table = TABLES[name]\n"
        "    ranks = {bytes.fromhex(token): rank for token, rank in table['ranks'].items()}\n"
        "    return fields('small_' + name, table['pattern'], ranks)\n"
        "def far():\n"
        "    ranks = load_tiktoken_bpe('http://127.0.0.1:9/far.tiktoken')\n"
        "    return fields('far', TABLES['gpt2']['pattern'], ranks)\n"
        "ENCODING_CONSTRUCTORS = {'small_' + name: (lambda name=name: encoding(name)) for name in TABLES}\n"
        "ENCODING_CONSTRUCTORS['far'] = far\n"
    )
    registry = importlib.import_module("tiktoken.registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setattr(registry, "ENCODING_CONSTRUCTORS", None)
        registry._available_plugin_modules.cache_clear()
        yield {name: tiktoken.get_encoding(f"small_{name}") for name in PATTERNS}
    registry._available_plugin_modules.cache_clear()
    sys.modules.pop("tiktoken_ext.gptdist_small", None)


@pytest.fixture(scope="module")
def small(encodings: dict[str, tiktoken.Encoding]) -> dict[str, CorpusTokenizer]:
    """The encodings as a build has them."""
    made = {name: check_tokenizer(f"tiktoken:small_{name}") for name in encodings}
    assert all(tokenizer is not None for tokenizer in made.values())
    return made  # type: ignore[return-value]


@pytest.fixture(scope="module")
def trained() -> CorpusTokenizer:
    return train_tokenizer("train:900", corpus())


def rows(flat: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    ids, ends = flat
    assert ends.dtype == np.int64
    assert (int(ends[-1]) if len(ends) else 0) == len(ids)
    starts = [0, *ends[:-1].tolist()]
    return [ids[start:end].tolist() for start, end in zip(starts, ends.tolist(), strict=False)]


# The flat interface


def test_flat_ids_are_those_of_each_text(trained: CorpusTokenizer) -> None:
    texts = ["one two", "", "\u00e9\u4e2d", "three", ""]
    assert rows(trained.encode_flat(texts)) == [trained.encode(text) for text in texts]
    assert trained.encode_flat(texts)[0].dtype == np.uint32
    assert [row.tolist() for row in trained.encode_documents(texts)] == rows(trained.encode_flat(texts))
    plain = CorpusTokenizer.of_bytes()
    assert rows(plain.encode_flat(texts)) == [list(text.encode()) for text in texts]
    assert plain.encode_flat(texts)[0].dtype == np.uint8


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_flat_ids_of_nothing(trained: CorpusTokenizer, texts: list[str]) -> None:
    for encoder in (trained, CorpusTokenizer.of_bytes(), FastEncoder(trained)):
        ids, ends = encoder.encode_flat(texts)
        assert len(ids) == 0
        assert ends.tolist() == [0] * len(texts)
        assert ends.dtype == np.int64
    assert trained.encode_documents([]) == []


def test_half_a_surrogate_pair_is_named(trained: CorpusTokenizer) -> None:
    for encoder in (trained, CorpusTokenizer.of_bytes(), FastEncoder(trained)):
        with pytest.raises(CorpusError, match=r"surrogate pair.* character 3: 'bad"):
            encoder.encode_flat(["good", "bad\ud800text"])


def test_text_never_becomes_the_end_of_text(trained: CorpusTokenizer, tmp_path: Path) -> None:
    assert trained.end_of_text not in trained.encode(f"a {END} b{END}")
    assert trained.decode(trained.encode(f"a {END} b")) == f"a {END} b"
    fields = json.loads(trained.content)
    fields["added_tokens"][0]["special"] = False  # a file in which the end of text is a word like others
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(fields))
    plainly = check_tokenizer(str(path))
    assert plainly is not None
    assert plainly.end_of_text not in plainly.encode(f"a {END} b{END}")
    assert plainly.content == path.read_bytes()


def test_a_tokenizer_whose_words_hold_the_end_of_text_is_refused(tmp_path: Path) -> None:
    unigram = Tokenizer(models.Unigram([("<unk>", -9.0), ("</s>", 0.0), ("\u2581", -2.0), ("a", -2.0)], unk_id=0))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.add_special_tokens(["</s>"])
    unigram.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CorpusError, match=r"'</s>' becomes the end-of-text id"):
        check_tokenizer(str(tmp_path))


def test_dropout_is_off(trained: CorpusTokenizer) -> None:
    fields = json.loads(trained.content)
    fields["model"]["dropout"] = 0.5
    dropping = CorpusTokenizer.parse(json.dumps(fields).encode(), "test")
    text = "documentation returns the following characters " * 20
    assert dropping.encode(text) == trained.encode(text)
    assert rows(FastEncoder(dropping).encode_flat([text])) == [trained.encode(text)]


# Training


def test_training_gives_the_same_bytes_on_any_number_of_threads() -> None:
    code = (
        "import sys, hashlib; from tests.unit.test_data_tokenizing import corpus\n"
        "from data_tools.tokenizing.tokenizers import train_tokenizer\n"
        "print(hashlib.sha256(train_tokenizer('train:1500', corpus()).content).hexdigest())"
    )
    here = hashlib.sha256(train_tokenizer("train:1500", corpus()).content).hexdigest()
    for threads in ("1", "3"):
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": threads}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == here


def test_training_learns_no_special_token_and_knows_all_bytes(trained: CorpusTokenizer) -> None:
    assert trained.vocab_size == 900
    assert trained.token(trained.end_of_text) == END
    text = "".join(map(chr, range(0x3000))) + "\U0010ffff"
    assert trained.decode(trained.encode(text)) == text


# The fast path


def test_the_fast_path_is_taken_and_gives_the_same(trained: CorpusTokenizer) -> None:
    encoder, said = choose_encoder(trained, corpus())
    assert isinstance(encoder, FastEncoder)
    assert encoder.fast
    assert re.match(
        r"gigatoken \d+\.\d+.*\(gave the identical ids as tokenizers .* on [\d,]+ bytes of the corpus", said
    )
    texts = [*corpus(), *hard_texts([END, "<|fim|>"])]
    assert rows(encoder.encode_flat(texts)) == rows(trained.encode_flat(texts))
    for again in (FastEncoder(trained), FastEncoder(trained, parallel=True)):
        assert rows(again.encode_flat(texts)) == rows(trained.encode_flat(texts))


@pytest.mark.parametrize("name", PATTERNS)
def test_the_fast_path_runs_the_encodings_of_tiktoken(small: dict[str, CorpusTokenizer], name: str) -> None:
    encoder, said = choose_encoder(small[name], corpus())
    assert encoder.fast, said

    @settings(max_examples=80, deadline=None)
    @given(st.lists(TEXTS, max_size=4))
    def same(texts: list[str]) -> None:
        assert rows(encoder.encode_flat(texts)) == rows(small[name].encode_flat(texts))

    same()


def test_other_ids_send_the_build_to_the_reference(trained: CorpusTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FastEncoder._encode

    def wrong(self: FastEncoder, documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        ids, ends = right(self, documents)
        row = next((row for row, document in enumerate(documents) if document == b"rare words"), None)
        if row is not None:
            ids = ids.copy()
            ids[ends[row] - 1] += 1
        return ids, ends

    monkeypatch.setattr(FastEncoder, "_encode", wrong)
    assert choose_encoder(trained, ["common words"])[0].fast
    encoder, said = choose_encoder(trained, ["common words", "rare words"])
    assert not encoder.fast
    assert said.endswith("(gigatoken gave other ids for 'rare words')")
    assert rows(encoder.encode_flat(["rare words"])) == [trained.encode("rare words")]
    answers = reference_answers(trained, ["common words", "rare words"])
    assert choose_encoder(trained, [], answers=answers)[1] == said
    assert choose_encoder(trained, [], answers=reference_answers(trained, ["common words"]))[0].fast


def test_answers_stand_for_the_tokenizer_that_gave_them_only(
    trained: CorpusTokenizer, small: dict[str, CorpusTokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ReferenceAnswers.from_dict(json.loads(json.dumps(reference_answers(trained, ["some text"]).to_dict())))
    encoder, said = choose_encoder(trained, ["some text"])
    monkeypatch.setattr(CorpusTokenizer, "encode_flat", None)  # not asked again, nor even parsed
    assert choose_encoder(trained, [], answers=answers)[1] == said
    monkeypatch.undo()
    assert encoder.fast
    other = next(iter(small.values()))
    assert not answers.are_of(other)
    assert choose_encoder(other, ["some text"], answers=answers) is not None
    changed = replace(answers, digest="0" * 64)
    assert not choose_encoder(trained, [], answers=changed)[0].fast
    assert not replace(answers, library="0.0").are_of(trained)


def test_a_tokenizer_that_gigatoken_does_not_know_runs_on_the_reference(trained: CorpusTokenizer) -> None:
    fields = json.loads(trained.content)
    split = {"type": "Split", "pattern": {"Regex": r"\S{1,5}|\s+"}, "behavior": "Isolated", "invert": False}
    letters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    fields["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, letters]}
    encoder, said = choose_encoder(CorpusTokenizer.parse(json.dumps(fields).encode(), "test"), ["some text"])
    assert not encoder.fast
    assert "(gigatoken cannot run this tokenizer: " in said


def test_a_panic_is_a_reason_and_ctrl_c_is_not(trained: CorpusTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Panic(BaseException):
        """As pyo3 raises for a panic of Rust."""

    def fails(error: BaseException) -> Any:
        def encode(self: FastEncoder, documents: list[bytes]) -> None:
            raise error

        return encode

    monkeypatch.setattr(FastEncoder, "_encode", fails(Panic("index out of bounds\nbacktrace")))
    encoder, said = choose_encoder(trained, ["text"])
    assert not encoder.fast
    assert said.endswith("(gigatoken failed on a text: index out of bounds)")
    monkeypatch.setattr(FastEncoder, "_encode", fails(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        choose_encoder(trained, ["text"])


def test_without_gigatoken(trained: CorpusTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "gigatoken":
            raise ModuleNotFoundError("No module named 'gigatoken'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    encoder, said = choose_encoder(trained, ["text"])
    assert not encoder.fast
    assert "pip install 'gptdist[fast]'" in said


def test_the_reference_where_it_is_asked_for_and_for_bytes(trained: CorpusTokenizer) -> None:
    encoder, said = choose_encoder(trained, (), fast=False)
    assert (encoder.fast, said.startswith("tokenizers ")) == (False, True)
    encoder, said = choose_encoder(CorpusTokenizer.of_bytes(), ["text"])
    assert (encoder.fast, said) == (False, "no library (each byte is an id)")


def test_added_tokens_keep_their_meaning(trained: CorpusTokenizer) -> None:
    """Those that are special stay text; those that are not become their id wherever they stand."""
    hf = Tokenizer.from_str(trained.content.decode())
    hf.add_tokens([AddedToken("kelvinword", normalized=False), AddedToken("[gap]", normalized=False)])
    hf.add_special_tokens(["<|pad|>"])
    tokenizer = CorpusTokenizer.parse(hf.to_str().encode(), "test")
    encoder, said = choose_encoder(tokenizer, ["text"])
    assert encoder.fast, said
    texts = ["a kelvinwords [gap]", f"{END}<|pad|>kelvinword<|pad|>", "[gap][gap]", "kelvin word"]
    assert rows(encoder.encode_flat(texts)) == rows(tokenizer.encode_flat(texts))
    wanted = hf.token_to_id("kelvinword")
    assert [wanted in row for row in rows(encoder.encode_flat(texts))] == [True, True, False, False]
    assert not {hf.token_to_id("<|pad|>"), tokenizer.end_of_text} & set(encoder.encode_flat(texts)[0].tolist())


# Characters that the libraries may not agree on


def _is_new(character: str) -> bool:
    return bool(texts_with_new_characters([character.encode()]))


def test_new_characters_are_found() -> None:
    for point in (
        0xC5C,
        0xA7CF,
        0x10D40,
        0x11DB0,
        0x1E6C0,
        0x2B73A,
        0x2EBF0,
        0x31350,
        0x323B0,
        0x33479,
        0x378,
        0x40000,
    ):
        assert _is_new(chr(point)), hex(point)
    for point in (0x41, 0xE9, 0x416, 0x5D0, 0x915, 0x20AC, 0x2019, 0x4E2D, 0xAC00, 0xFF01, 0x1F600, 0x20000, 0x10FFFD):
        assert not _is_new(chr(point)), hex(point)


@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=6))
def test_new_characters_are_found_where_they_stand(texts: list[str]) -> None:
    found = texts_with_new_characters([text.encode() for text in texts])
    assert found == [index for index, text in enumerate(texts) if any(map(_is_new, text))]
    unassigned = [index for index, text in enumerate(texts) if any(unicodedata.category(at) == "Cn" for at in text)]
    planes = [index for index in unassigned if all(ord(at) < 0xF0000 for at in texts[index])]
    assert set(planes) <= set(found)


def test_both_libraries_agree_on_all_older_characters() -> None:
    """With merges between the edge of a character and a letter, a digit or a mark, ids show what it is taken for."""
    for pattern in (CL100K, O200K):
        ranks = {bytes([value]): value for value in range(256)}
        for edge in range(0x80, 0xC0):
            for other in b"a1!A":
                ranks[bytes([edge, other])] = len(ranks)
        for lead in range(0xC2, 0xF5):
            ranks[b"a" + bytes([lead])] = len(ranks)
        encoding = tiktoken.Encoding("edges", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: len(ranks)})
        tokenizer = tokenizer_of_encoding(encoding, END)
        fast = FastEncoder(tokenizer)
        # Every one up to the end of Arabic, some of the others; of the long runs of ideographs none.
        points = [*range(0x80, 0x700), *range(0x700, 0x3400, 5), *range(0xA000, 0xAC00, 7), *range(0xF900, 0x20000, 11)]
        older = [chr(point) for point in points if not 0xD800 <= point < 0xE000 and not _is_new(chr(point))]
        texts = [
            "".join(f"\n{at}a\n{at}1\n{at}!\n{at}A\na{at}" for at in older[i : i + 64])
            for i in range(0, len(older), 64)
        ]
        assert rows(fast.encode_flat(texts)) == rows(tokenizer.encode_flat(texts))
        newer = "".join(f"\n\ua7cf!\n{chr(0x1E6C0)}a{at}" for at in "xy")
        assert rows(fast.encode_flat([newer, "z"])) == rows(tokenizer.encode_flat([newer, "z"]))


@pytest.mark.parametrize("between, cut", [("\n", cut_lines), (" ", cut_words)])
@pytest.mark.parametrize("name", ["r50k", "gpt2", "cl100k", "trained"])
def test_words_are_the_same_on_both_sides_of_a_cut(
    small: dict[str, CorpusTokenizer],
    trained: CorpusTokenizer,
    name: str,
    between: str,
    cut: Callable[[bytes], list[bytes]],
) -> None:
    """Around every cut, all surroundings of up to four characters of each kind."""
    fields = json.loads((trained if name == "trained" else small[name]).content)
    assert can_be_cut(fields, KNOWN_SPELLINGS)
    split = Tokenizer.from_str(json.dumps(fields)).pre_tokenizer.pre_tokenize_str
    kinds = ["a", "T", "1", "!", "'", " ", "\n", "\r", "\u00e9", "\u0301", "\U0001e6c0"]
    lefts = ["".join(some) for some in itertools.product(kinds, repeat=3)]
    cuts = 0
    for left, right in itertools.product(
        lefts, ("a", "s ", "T!", "re", "a\n", "d1", "1", "12a", "'s", "' s", "!", "#a", "/\n", "!!\r")
    ):
        text = left + between + right
        parts = [part.decode() for part in cut(text.encode())]
        assert "".join(parts) == text
        if len(parts) > 1:
            cuts += 1
            assert [piece for piece, _ in split(text)] == [piece for part in parts for piece, _ in split(part)], text
    assert cuts > 5000


def test_only_what_splits_in_a_known_way_is_cut(small: dict[str, CorpusTokenizer], trained: CorpusTokenizer) -> None:
    assert not can_be_cut(json.loads(small["o200k"].content), KNOWN_SPELLINGS)
    fields = json.loads(trained.content)
    added = {**fields["added_tokens"][0], "content": "!\na", "special": False}
    for change in (
        {"normalizer": {"type": "NFC"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {**fields["pre_tokenizer"], "add_prefix_space": True}},
        {"pre_tokenizer": {**fields["pre_tokenizer"], "use_regex": False}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": []}},
        {"added_tokens": [*fields["added_tokens"], added]},
    ):
        assert not can_be_cut(fields | change, KNOWN_SPELLINGS)


@given(texts=st.lists(TEXTS.map(lambda text: text + "!\nso \ua7cf or so\nto"), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_texts_of_which_a_part_is_new_have_the_ids_of_the_tokenizer(trained: CorpusTokenizer, texts: list[str]) -> None:
    given_texts = [texts[0].replace("\ua7cf", "e"), *texts, "", "a"]
    assert rows(FastEncoder(trained).encode_flat(given_texts)) == rows(trained.encode_flat(given_texts))


# Encodings of tiktoken


@pytest.mark.parametrize("name", PATTERNS)
def test_an_encoding_of_tiktoken_gives_its_ids(
    encodings: dict[str, tiktoken.Encoding], small: dict[str, CorpusTokenizer], name: str
) -> None:
    encoding, tokenizer = encodings[name], small[name]
    assert (tokenizer.kind, tokenizer.end_of_text, tokenizer.vocab_size) == ("hf", 700, 706)
    reread = CorpusTokenizer.parse(tokenizer.content, "test", END)
    assert reread.end_of_text == 700
    check_same_ids(reread, encoding, corpus())

    @settings(max_examples=100, deadline=None)
    @given(TEXTS)
    def same(text: str) -> None:
        ids = encoding.encode_ordinary(text)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == encoding.decode(ids)

    same()


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.text("ab", min_size=2, max_size=4), unique=True, min_size=3, max_size=12),
    st.lists(st.text("abc ", min_size=4, max_size=30), min_size=4, max_size=12),
)
def test_any_table_of_ranks_is_carried_over(words: list[str], texts: list[str]) -> None:
    """Also those that no training gives: words that their own merges never reach, and pieces of later rank."""
    ranks = {bytes([value]): value for value in range(256)}
    ranks |= {word.encode(): 256 + index for index, word in enumerate(words)}
    encoding = tiktoken.Encoding("any", pat_str=r"\s+|\S+", mergeable_ranks=ranks, special_tokens={"\n\n": len(ranks)})
    content = _tokenizer_json(ranks, encoding._pat_str, {"\n\n": len(ranks)})
    check_same_ids(CorpusTokenizer.parse(content, "test", "\n\n"), encoding, texts)


def test_an_encoding_that_differs_is_refused(encodings: dict[str, tiktoken.Encoding]) -> None:
    ranks = encodings["gpt2"]._mergeable_ranks
    # tiktoken leaves out what its pattern does not match; a piece of a HF tokenizer's text is never left out
    letters = tiktoken.Encoding("letters", pat_str=r"[a-z]+", mergeable_ranks=ranks, special_tokens={END: 700})
    with pytest.raises(CorpusError, match=r"tiktoken:letters cannot be put in a HF tokenizer\.json: for '"):
        tokenizer_of_encoding(letters, END)
    whole = tiktoken.Encoding("whole", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={END: 700})
    with pytest.raises(CorpusError, match=r"for '<\|endoftext\|>'"):
        tokenizer_of_encoding(whole, END)
    few = {token: rank for token, rank in ranks.items() if token != b"\xff"}
    with pytest.raises(CorpusError, match="no token for byte 0xff"):
        tokenizer_of_encoding(
            tiktoken.Encoding("few", pat_str=GPT2, mergeable_ranks=few, special_tokens={END: 700}), END
        )


def test_a_sample_is_compared_with_tiktoken(small: dict[str, CorpusTokenizer]) -> None:
    check_sample("tiktoken:small_gpt2", small["gpt2"], corpus())
    check_sample("bytes", CorpusTokenizer.of_bytes(), ["text"])
    with pytest.raises(CorpusError, match="they differ"):
        check_sample("tiktoken:small_gpt2", small["o200k"], corpus())


def test_a_vocabulary_that_is_not_at_hand(
    encodings: dict[str, tiktoken.Encoding], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(CorpusError, match=r"TIKTOKEN_CACHE_DIR=vocab python -c .*get_encoding\('far'\)"):
        check_tokenizer("tiktoken:far")
    with pytest.raises(CorpusError, match=r"has no encoding 'cl101k'. It has .*cl100k_base.*small_gpt2"):
        check_tokenizer("tiktoken:cl101k")
    lines = [
        b"%s %d" % (importlib.import_module("base64").b64encode(token), rank)
        for token, rank in encodings["gpt2"]._mergeable_ranks.items()
    ]
    name = hashlib.sha1(b"http://127.0.0.1:9/far.tiktoken").hexdigest()
    (tmp_path / name).write_bytes(b"\n".join(lines))  # what the message says to do
    tokenizer = check_tokenizer("tiktoken:far")
    assert tokenizer is not None
    assert tokenizer.encode("some text") == encodings["gpt2"].encode_ordinary("some text")


@pytest.mark.parametrize(
    ("rust", "ruby"),
    [
        (r"^a$|[$^]|\$\^", r"\Aa\z|[$^]|\$\^"),
        (r"\p{N}{1,3}+", r"(?>\p{N}{1,3})"),
        (r"(?:a|[bc)]{2}+){3,}+x", r"(?>(?:a|(?>[bc)]{2})){3,})x"),
        (r"a{2}?b{1,2}?c{d}", r"a{2}b{1,2}?c{d}"),
        (r"[]a[b]]{2}+[^]]\){1}+", r"(?>[]a[b]]{2})[^]](?>\){1})"),
        (r"'(?i:[sd]|ll)| ?\p{L}++|\s+(?!\S)", r"'(?i:[sd]|ll)| ?\p{L}++|\s+(?!\S)"),
    ],
)
def test_patterns_in_ruby_syntax(rust: str, ruby: str) -> None:
    assert oniguruma_pattern(rust) == ruby


@pytest.mark.parametrize("pattern", [r"(?m)^a", r"(?s:.)", r"a(?i)b", r"(?P<name>a)", r"[a"])
def test_patterns_without_a_sure_equivalent(pattern: str) -> None:
    with pytest.raises(CorpusError, match=r"The tokenizer's pattern has"):
        oniguruma_pattern(pattern)


@pytest.mark.parametrize("pattern", [*PATTERNS.values(), r"[ab]{1,2}+a|.|\s", r"^\s+|\s+$|\S+|\s", r"(?>a|ab)c|.|\n"])
def test_patterns_split_as_in_tiktoken(pattern: str) -> None:
    values = {bytes([value]): value for value in range(256)}
    # With every pair of bytes a token, ids show where pieces begin.
    values |= {bytes([left, right]): 256 + 256 * left + right for left in range(256) for right in range(256)}
    theirs = tiktoken.Encoding("pairs", pat_str=pattern, mergeable_ranks=values, special_tokens={})
    ours = pre_tokenizers.Split(Regex(oniguruma_pattern(pattern)), "isolated")

    def check(text: str) -> None:
        pieces = [piece for piece, _ in ours.pre_tokenize_str(text)]
        assert theirs.encode_ordinary(text) == [at for piece in pieces for at in theirs._encode_single_piece(piece)]

    for text in hard_texts():
        check(text)
    settings(max_examples=80, deadline=None)(given(TEXTS)(check))()


# Files


def test_folders_of_transformers(trained: CorpusTokenizer, tmp_path: Path) -> None:
    fields = json.loads(trained.content)
    (tmp_path / "vocab.json").write_text(json.dumps(fields["model"]["vocab"]))
    merges = [" ".join(merge) for merge in fields["model"]["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    tokenizer = check_tokenizer(str(tmp_path))
    assert tokenizer is not None
    texts = [*corpus(), f"a {END} b"]
    assert rows(tokenizer.encode_flat(texts)) == rows(trained.encode_flat(texts))
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]
    assert tokenizer.end_of_text == trained.end_of_text
    assert choose_encoder(tokenizer, texts)[0].fast
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|e|>"})
    )
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|e|>": 900}))
    named = check_tokenizer(str(tmp_path))
    assert named is not None
    assert (named.end_of_text, named.vocab_size) == (900, 901)
    assert 900 not in named.encode("a<|e|>b")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(CorpusError, match=r"of a Qwen2Tokenizer, which may split text otherwise"):
        check_tokenizer(str(tmp_path))


def test_a_folder_saved_by_transformers(trained: CorpusTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    hf = Tokenizer.from_str(trained.content.decode())
    saved = transformers.PreTrainedTokenizerFast(tokenizer_object=hf, eos_token=END, pad_token="<|pad|>")
    saved.save_pretrained(tmp_path)
    tokenizer = check_tokenizer(str(tmp_path))
    assert tokenizer is not None
    assert tokenizer.end_of_text == trained.end_of_text
    assert rows(tokenizer.encode_flat(corpus())) == rows(trained.encode_flat(corpus()))
    assert choose_encoder(tokenizer, corpus())[0].fast


def test_what_is_no_tokenizer_is_said(trained: CorpusTokenizer, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="tiktoken:NAME, train:SIZE or bytes"):
        check_tokenizer(str(tmp_path / "none"))
    with pytest.raises(CorpusError, match=r"should have a tokenizer\.json and has none"):
        check_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(CorpusError, match=r"has only tokenizer\.model\. .*AutoTokenizer"):
        check_tokenizer(str(tmp_path))
    with pytest.raises(CorpusError, match=r"tokenizer\.model is not a HF tokenizer\.json"):
        check_tokenizer(str(tmp_path / "tokenizer.model"))
    (tmp_path / "vocab.json").write_text(json.dumps({"a": 0}))
    (tmp_path / "merges.txt").write_text("")
    with pytest.raises(CorpusError, match="not of a byte-level BPE"):
        check_tokenizer(str(tmp_path))
    vocab = json.loads(trained.content)["model"]["vocab"]
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("a notthere\n")
    with pytest.raises(CorpusError, match=r"a merge that is not of vocab\.json: 'a notthere'"):
        check_tokenizer(str(tmp_path))
    with pytest.raises(CorpusError, match="at least 257"):
        check_tokenizer("train:12")


def test_words_of_a_vocabulary_are_evenly_chosen() -> None:
    words = [str(index) for index in range(100)] + ["", "\ufffd"]
    assert of_vocabulary(words, 1000) == words[:100]
    assert len(of_vocabulary(words, 30)) <= 30
    assert of_vocabulary(words, 10) == words[:100:10]


def test_known_spellings_are_of_the_same_split() -> None:
    for ours, known in encoders.KNOWN_SPELLINGS.items():
        one, other = (pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in (ours, oniguruma_pattern(known)))
        for text in hard_texts():
            assert one.pre_tokenize_str(text) == other.pre_tokenize_str(text)
