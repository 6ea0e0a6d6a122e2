"""The vocabulary of a GGUF file: what llama.cpp needs to split text into the same ids, or why it cannot.

Knows tokenizer.json and the names under which llama.cpp keeps the patterns that split text. Knows no model and no file.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptdist.data.tokenizer import BYTE_LETTERS, BYTES, CorpusTokenizer
from gptdist.errors import CorpusError

# llama.cpp's token types.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_GPT2 = "gpt-2"
_ANY_CASE_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_ENDS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
# Patterns as tokenizer.json spells them -> llama.cpp's name, whether that takes whole words before merging. Each gave
# the same ids on texts that are hard for tokenizers; GPT-4o's is not here, since llama.cpp splits marks otherwise.
_PATTERNS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": (_GPT2, False),
    # The same, as tiktoken spells it for GPT-2.
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s": (_GPT2, False),
    _ANY_CASE_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _ENDS: (
        "llama-bpe",
        True,
    ),
    _ANY_CASE_CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _ENDS: ("qwen2", False),
}


@dataclass(frozen=True)
class Vocabulary:
    """What splits text in a GGUF file. `tokens` and `types` are by id, `merges` by rank.

    Without a vocabulary `pre_tokenizer` is empty, `problem` says why, and llama.cpp takes and gives ids only.
    """

    end_of_text: int
    pre_tokenizer: str = ""
    tokens: tuple[str, ...] = ()
    types: tuple[int, ...] = ()
    merges: tuple[str, ...] = ()
    problem: str = ""


def gguf_vocabulary(tokenizer: CorpusTokenizer, vocab_size: int) -> Vocabulary:
    """The vocabulary for a model of `vocab_size` ids; ids that the tokenizer lacks are marked as unused.

    Raises CorpusError where the model knows fewer ids than the tokenizer.
    """
    if tokenizer.vocab_size > vocab_size:
        raise CorpusError(
            f"The tokenizer has {tokenizer.vocab_size} ids and the model only {vocab_size}, so they do not belong "
            "together. Give the tokenizer that the model was trained with."
        )
    try:
        if tokenizer.kind == BYTES:
            return _of_bytes(tokenizer, vocab_size)
        return _of_byte_level_bpe(tokenizer, json.loads(tokenizer.content), vocab_size)
    except _NoFit as reason:
        return Vocabulary(tokenizer.end_of_text, problem=str(reason))


class _NoFit(Exception):
    """Why llama.cpp would split text otherwise."""


def _of_bytes(tokenizer: CorpusTokenizer, vocab_size: int) -> Vocabulary:
    """A byte-level BPE that merges nothing. llama.cpp wants merges, so there is one of tokens that meet in no text."""
    ending = "<|endoftext|>"
    ids = {letter: index for index, letter in enumerate(BYTE_LETTERS)} | {ending: tokenizer.end_of_text}
    tokens, types = _by_id(ids, {ending: _CONTROL}, vocab_size)
    return Vocabulary(tokenizer.end_of_text, _GPT2, tokens, types, (f"{ending} {ending}",))


def _of_byte_level_bpe(tokenizer: CorpusTokenizer, fields: Mapping[str, Any], vocab_size: int) -> Vocabulary:
    model = fields["model"]
    # A tokenizer.json of old has no type in its model.
    if model.get("type", "BPE") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise _NoFit(f"its model is {model.get('type')!r}, and only a byte-level BPE is known to split alike")
    for setting in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(setting):
            raise _NoFit(f"its BPE sets {setting}, as no byte-level BPE does")
    if missing := [letter for letter in BYTE_LETTERS if letter not in model["vocab"]]:
        raise _NoFit(f"its BPE is not byte-level: it has no token {missing[0]!r}")
    if fields.get("normalizer"):
        raise _NoFit(f"it changes text before splitting it ({fields['normalizer'].get('type')}); llama.cpp does not")
    name, takes_whole_words = _pre_tokenizer(fields.get("pre_tokenizer"))
    if bool(model.get("ignore_merges")) != takes_whole_words:
        _check_every_token_merges(fields)
    added = {token["content"]: token for token in fields.get("added_tokens") or []}
    for text, token in added.items():
        special = token.get("special") or token["id"] == tokenizer.end_of_text
        if not special and any(token.get(flag) for flag in ("single_word", "lstrip", "rstrip", "normalized")):
            raise _NoFit(f"its added token {text!r} takes more than its own characters, or not always")
    ids = dict(model["vocab"]) | {text: int(token["id"]) for text, token in added.items()}
    types = {text: _CONTROL if token.get("special") else _USER_DEFINED for text, token in added.items()}
    ending = next((text for text, index in ids.items() if index == tokenizer.end_of_text), None)
    types |= {ending: _CONTROL} if ending is not None else {}
    tokens, kinds = _by_id(ids, types, vocab_size)
    merges = tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"])
    if not merges:
        merges = (f"{tokens[tokenizer.end_of_text]} {tokens[tokenizer.end_of_text]}",)
    return Vocabulary(tokenizer.end_of_text, name, tokens, kinds, merges)


def _pre_tokenizer(fields: Mapping[str, Any] | None) -> tuple[str, bool]:
    """llama.cpp's name for what splits text before the BPE does, and whether that takes whole words first."""
    parts = fields.get("pretokenizers", [fields]) if fields else []
    if any(part.get("add_prefix_space") for part in parts):
        raise _NoFit("it puts a space before text")
    kinds = [part.get("type") for part in parts]
    if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
        return _GPT2, False
    if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits") and parts[1].get("use_regex", True):
        return "smollm", False
    if kinds == ["Split", "ByteLevel"] and not parts[1].get("use_regex", True):
        splits_alike = parts[0].get("behavior") == "Isolated" and not parts[0].get("invert")
        pattern = parts[0].get("pattern", {}).get("Regex", "")
        if splits_alike and pattern in _PATTERNS:
            return _PATTERNS[pattern]
        raise _NoFit(f"it splits text by a pattern that llama.cpp has no name for: {pattern!r}")
    shown = " and ".join(str(kind) for kind in kinds) or "nothing"
    raise _NoFit(f"it splits text by {shown}, which llama.cpp has no name for")


def _check_every_token_merges(fields: Mapping[str, Any]) -> None:
    """Whole words first or not is the same where every token is also what its own letters merge into."""
    from tokenizers import Tokenizer

    plain = {**fields, "model": {**fields["model"], "ignore_merges": False}}
    model = Tokenizer.from_str(json.dumps(plain)).model
    added = {token["content"] for token in fields.get("added_tokens") or []}
    for text, index in fields["model"]["vocab"].items():
        if text not in added and [token.id for token in model.tokenize(text)] != [index]:
            raise _NoFit(f"its token {text!r} does not come of its merges, which llama.cpp would go by")


def _by_id(
    ids: Mapping[str, int], types: Mapping[str, int], vocab_size: int
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Tokens and their types by id. llama.cpp wants every id to have a token of its own."""
    texts = {index: text for text, index in ids.items()}
    if len(texts) < len(ids):
        raise _NoFit("two of its tokens have the same id")
    unused = (name for number in range(vocab_size + len(ids)) if (name := f"[unused{number}]") not in ids)
    tokens = tuple(texts[index] if index in texts else next(unused) for index in range(vocab_size))
    kinds = tuple(types.get(texts[index], _NORMAL) if index in texts else _UNUSED for index in range(vocab_size))
    return tokens, kinds
