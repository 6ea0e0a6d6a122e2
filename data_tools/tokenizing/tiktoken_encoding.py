"""A HF tokenizer.json that gives the ids of a tiktoken encoding, and the proof that it does.

So a corpus has one kind of tokenizer file, whatever it was built with. Knows byte-level BPE and tiktoken's interface.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_tools.tokenizing.hard_texts import hard_texts, of_vocabulary
from data_tools.tokenizing.oniguruma import oniguruma_pattern
from gptdist.data.tokenizer import BYTE_LETTERS, CorpusTokenizer
from gptdist.errors import CorpusError

PREFIX = "tiktoken:"
_CHECKED_WORDS = 1 << 13


def load_encoding(name: str) -> Any:
    """The `tiktoken.Encoding` of this name. Raises CorpusError for an unknown one and for one that cannot be had."""
    try:
        import tiktoken
    except ImportError:
        raise CorpusError(
            f"{PREFIX}{name} needs tiktoken, which is not installed: pip install 'gptdist[data]'."
        ) from None
    try:
        known = tiktoken.list_encoding_names()
    except Exception as error:  # of a plugin: anything
        raise CorpusError(f"The encodings of tiktoken cannot be listed: {error}") from error
    if name not in known:
        raise CorpusError(f"tiktoken has no encoding {name!r}. It has {', '.join(sorted(known))}.")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # no network, a file that is not the right one, a plugin
        raise CorpusError(
            f"The vocabulary of {PREFIX}{name} cannot be had: {_first_line(error)} tiktoken fetches it once from the "
            "network and keeps it. Without a network: on a machine that has one run "
            f"`TIKTOKEN_CACHE_DIR=vocab python -c \"import tiktoken; tiktoken.get_encoding('{name}')\"`, copy the "
            "folder vocab here, and set TIKTOKEN_CACHE_DIR to it."
        ) from error


def tokenizer_of_encoding(encoding: Any, end_of_text: str) -> CorpusTokenizer:
    """The same tokenizer as a HF one. Raises CorpusError where the two differ on texts that are hard for tokenizers."""
    where = f"{PREFIX}{encoding.name}"
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    if missing := [value for value in range(256) if bytes([value]) not in ranks]:
        raise CorpusError(f"{where} is no byte-level BPE: it has no token for byte 0x{missing[0]:02x}.")
    tokenizer = CorpusTokenizer.parse(_tokenizer_json(ranks, encoding._pat_str, special), where, end_of_text)
    words = [word.decode(errors="replace") for word in sorted(ranks, key=ranks.__getitem__)]
    check_same_ids(tokenizer, encoding, [*hard_texts(special), *of_vocabulary(words, _CHECKED_WORDS)])
    return tokenizer


def check_same_ids(tokenizer: CorpusTokenizer, encoding: Any, texts: Sequence[str]) -> None:
    """Raises CorpusError naming the first text to which tiktoken gives other ids."""
    ids, ends = tokenizer.encode_flat(texts)
    for text, ours in zip(texts, np.split(ids, ends[:-1]), strict=True):
        theirs = encoding.encode_ordinary(text)
        if ours.tolist() != theirs:
            shown = text if len(text) <= 80 else text[:77] + "..."
            raise CorpusError(
                f"{PREFIX}{encoding.name} cannot be put in a HF tokenizer.json: for {shown!r} that gives {len(ours)} "
                f"ids, tiktoken {len(theirs)}, and they differ. Name a HF tokenizer.json of this tokenizer instead."
            )


def _tokenizer_json(ranks: Mapping[bytes, int], pattern: str, special: Mapping[str, int]) -> bytes:
    letters = {token: "".join([BYTE_LETTERS[value] for value in token]) for token in ranks}
    vocab = {letters[token]: index for token, index in ranks.items()}
    # Special ones too, or the library numbers them anew. They cannot come of text: nothing merges into them.
    vocab.update(special)
    splits = {
        "type": "Split",
        "pattern": {"Regex": oniguruma_pattern(pattern)},
        "behavior": "Isolated",
        "invert": False,
    }
    letters_of_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    fields = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": text, **flags} for text, index in _by_id(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [splits, letters_of_bytes]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # as tiktoken: a piece that is a token is that token, however it would merge
            "vocab": dict(_by_id(vocab)),
            "merges": [[letters[left], letters[right]] for left, right in _merges(ranks)],
        },
    }
    return json.dumps(fields, ensure_ascii=False, indent=1).encode() + b"\n"


def _by_id(ids: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(ids.items(), key=lambda item: item[1])


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that makes each token, in the order of rank.

    tiktoken joins any two neighbours whose bytes together are a token. But neighbours that cover exactly a token's
    bytes came about within these bytes alone, as if they were the whole text; there the order of merges is one, so one
    pair is ever the last. A token that its own bytes do not merge into is found only as a whole piece, and has none.
    """
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        if len(token) > 1:
            pairs = [pair for pair in _splits(token) if pair[0] in ranks and pair[1] in ranks]
            pair = pairs[0] if len(pairs) == 1 else _last_pair(token, ranks) if pairs else None
            if pair is not None:
                merges.append(pair)
    return merges


def _splits(token: bytes) -> list[tuple[bytes, bytes]]:
    return [(token[:cut], token[cut:]) for cut in range(1, len(token))]


def _last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """What is left of a token's bytes before the merge that makes it whole; None where the merges never get there."""
    parts = [token[index : index + 1] for index in range(len(token))]
    while len(parts) > 2:
        best, place = None, -1
        for index in range(len(parts) - 1):
            rank = ranks.get(parts[index] + parts[index + 1])
            if rank is not None and (best is None or rank < best):
                best, place = rank, index
        if best is None:
            return None
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return parts[0], parts[1]


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].rstrip(".") + "."
