"""Runs a corpus's tokenizer: with `gigatoken` where that proved to give the identical ids, else with `tokenizers`.

Knows when the two may differ and which one ran; what a tokenizer is, is in `gptdist/data/tokenizer.py`. The ids never
depend on which one it was.
"""

import json
from collections.abc import Callable, Sequence
from importlib import metadata
from itertools import chain
from typing import Protocol

import numpy as np

from data_tools.tokenizing.answers import ReferenceAnswers, ids_digest
from data_tools.tokenizing.new_characters import texts_with_new_characters
from data_tools.tokenizing.oniguruma import oniguruma_pattern
from data_tools.tokenizing.safe_cuts import can_be_cut, cut_lines, cut_words
from gptdist.data.tokenizer import CorpusTokenizer, refuse_surrogates

# gigatoken knows a pattern by its spelling. What tiktoken's encodings have -> the spelling of the same split it knows.
KNOWN_SPELLINGS = {
    # r50k_base, p50k_base
    oniguruma_pattern(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"): (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ),
    # the same as GPT-2 published it
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    ),
    # cl100k_base
    oniguruma_pattern(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ): (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s+"
    ),
}


class Encoder(Protocol):
    """Turns texts into the ids of a corpus. `fast`: with gigatoken."""

    fast: bool

    def encode_flat(self, texts: Sequence[str], documents: list[bytes] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `CorpusTokenizer.encode_flat`: the ids of all texts in a row, and where each text's end.

        `documents`: the texts in UTF-8, where the caller has them.
        """
        ...


class ReferenceEncoder:
    """The tokenizer itself."""

    fast = False

    def __init__(self, tokenizer: CorpusTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode_flat(self, texts: Sequence[str], documents: list[bytes] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `CorpusTokenizer.encode_flat`."""
        return self._tokenizer.encode_flat(texts)


class FastEncoder:
    """gigatoken with the vocabulary of `tokenizer`. `parallel`: on all cores; not in one of several processes.

    What of a text has characters newer than Unicode 14 goes to the tokenizer itself: whether these are letters the two
    libraries may know differently. Memory grows with the distinct words seen, to some 150 MB for one in a process.
    """

    fast = True

    def __init__(self, tokenizer: CorpusTokenizer, parallel: bool = False) -> None:
        from gigatoken import Tokenizer

        self._tokenizer = tokenizer
        self._gigatoken = Tokenizer.from_json(_plain_json(tokenizer))
        self._parallel = parallel
        self._can_be_cut = can_be_cut(json.loads(tokenizer.content), KNOWN_SPELLINGS)

    def encode_flat(self, texts: Sequence[str], documents: list[bytes] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `CorpusTokenizer.encode_flat`."""
        try:
            documents = documents or [text.encode() for text in texts]
        except UnicodeEncodeError:
            refuse_surrogates(texts)
            raise
        apart = texts_with_new_characters(documents)
        if not apart:
            return self._encode(documents)
        parts, ends = documents, np.arange(1, len(documents) + 1)
        for cut in (cut_lines, cut_words) if self._can_be_cut else ():
            parts, ends_of_parts = _cut_some(parts, apart, cut)
            ends = ends_of_parts[ends - 1]
            apart = texts_with_new_characters(parts)
        chosen = set(apart)
        together = self._encode([part for index, part in enumerate(parts) if index not in chosen])
        alone = self._tokenizer.encode_flat([parts[index].decode() for index in apart])
        ids, ends_in_ids = _merged(len(parts), apart, alone, together)
        return ids, ends_in_ids[ends - 1]

    def _encode(self, documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        # An awkward array: its buffers are taken as they are, without a Python object for each document.
        layout = self._gigatoken.encode_batch(documents, parallel=self._parallel).layout
        offsets = np.asarray(layout.offsets.data)
        return np.asarray(layout.content.data)[offsets[0] : offsets[-1]], offsets[1:] - offsets[0]


def choose_encoder(
    tokenizer: CorpusTokenizer,
    sample_texts: Sequence[str],
    fast: bool = True,
    parallel: bool = False,
    answers: ReferenceAnswers | None = None,
) -> tuple[Encoder, str]:
    """(what turns texts into ids, which library that is and why). The fast one only after it gave the identical ids.

    Both are asked for `sample_texts`, for texts that are hard for tokenizers, and for words of the vocabulary. With
    `answers` of this very tokenizer, these are what the fast one must match, and nothing else is asked.
    """
    reference = ReferenceEncoder(tokenizer)
    if tokenizer.kind == "bytes":
        return reference, "no library (each byte is an id)"
    name = f"tokenizers {metadata.version('tokenizers')}"
    if not fast:
        return reference, f"{name} (as asked)"
    try:
        version = metadata.version("gigatoken")
        candidate = FastEncoder(tokenizer, parallel)
    except ImportError:
        return reference, f"{name} (gigatoken, some 50 times faster, is not installed: pip install 'gptdist[fast]')"
    except BaseException as error:
        return reference, f"{name} (gigatoken cannot run this tokenizer: {_reason(error)})"
    try:
        if answers is None or not answers.are_of(tokenizer):
            answers = reference_answers(tokenizer, sample_texts)
        unlike = None if _agrees(candidate, answers) else _first_difference(tokenizer, candidate, answers.texts)
    except BaseException as error:
        return reference, f"{name} (gigatoken failed on a text: {_reason(error)})"
    if unlike is not None:
        return reference, f"{name} (gigatoken gave other ids for {unlike})"
    return candidate, f"gigatoken {version} (gave the identical ids as {name} on {answers.said()})"


def reference_answers(tokenizer: CorpusTokenizer, sample_texts: Sequence[str]) -> ReferenceAnswers:
    """What `choose_encoder` compares with."""
    return ReferenceAnswers.of(tokenizer, sample_texts, _added_tokens(tokenizer))


def _plain_json(tokenizer: CorpusTokenizer) -> str:
    """The tokenizer's file without what must not act on a document's text: special tokens, additions, cuts, chance."""
    fields = json.loads(tokenizer.content)
    fields["added_tokens"] = [
        token
        for token in fields.get("added_tokens") or []
        if not token.get("special") and token["id"] != tokenizer.end_of_text
    ]
    fields |= {"post_processor": None, "truncation": None, "padding": None}
    fields["model"]["dropout"] = None
    splits = fields.get("pre_tokenizer") or {}
    for split in splits.get("pretokenizers", [splits]):
        pattern = split.get("pattern")
        if isinstance(pattern, dict) and pattern.get("Regex") in KNOWN_SPELLINGS:
            pattern["Regex"] = KNOWN_SPELLINGS[pattern["Regex"]]
    return json.dumps(fields, ensure_ascii=False)


def _added_tokens(tokenizer: CorpusTokenizer) -> list[str]:
    return [token["content"] for token in json.loads(tokenizer.content).get("added_tokens") or []]


def _agrees(candidate: FastEncoder, answers: ReferenceAnswers) -> bool:
    """Whether the candidate gives the same ids, at once and when it has seen all of the texts."""
    if ids_digest(*candidate.encode_flat(answers.texts)) != answers.digest:
        return False
    ids, ends = candidate.encode_flat(answers.texts[::-1])
    rows = np.split(ids, ends[:-1])[::-1]
    return ids_digest(np.concatenate(rows), np.cumsum([len(row) for row in rows])) == answers.digest


def _first_difference(tokenizer: CorpusTokenizer, candidate: FastEncoder, texts: Sequence[str]) -> str:
    """The first text to which the candidate gives other ids, as it is shown."""
    for turn in (1, -1):
        expected, found = (
            np.split(ids, ends[:-1])
            for ids, ends in (library.encode_flat(texts[::turn]) for library in (tokenizer, candidate))
        )
        for text, ours, theirs in zip(texts[::turn], expected, found, strict=True):
            if not np.array_equal(ours, theirs):
                return _shown(text)
    return "a text, but not when asked again"


def _cut_some(
    texts: Sequence[bytes], which: Sequence[int], cut: Callable[[bytes], list[bytes]]
) -> tuple[list[bytes], np.ndarray]:
    """(all texts, those of `which` in the parts that `cut` makes; how many there are up to each text's end)."""
    chosen = set(which)
    parts = [cut(text) if index in chosen else [text] for index, text in enumerate(texts)]
    return list(chain.from_iterable(parts)), np.cumsum([len(some) for some in parts], dtype=np.int64)


def _merged(
    count: int,
    apart: Sequence[int],
    ids_apart: tuple[np.ndarray, np.ndarray],
    ids_together: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all `count` texts in their order, from those of the texts `apart` and those of the others."""
    rows_apart, rows_together = (iter(np.split(ids, ends[:-1])) for ids, ends in (ids_apart, ids_together))
    chosen = set(apart)
    rows = [next(rows_apart if index in chosen else rows_together) for index in range(count)]
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    return np.concatenate(rows), ends


def _reason(error: BaseException) -> str:
    """Its first line. What is no failure, such as Ctrl-C, goes on: a panic of Rust is a BaseException just as these."""
    if isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit)):
        raise error
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 120 else lines[0][:117] + "..."


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
