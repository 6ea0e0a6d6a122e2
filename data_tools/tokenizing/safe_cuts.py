"""Where a text may be cut so that the ids of its parts, one after the other, are the ids of the whole.

Knows how tokenizers split text before they merge bytes; runs none. Tokenizers that it does not know are never cut.
"""

import re
from collections.abc import Collection
from typing import Any

# A line end between two visible characters of ASCII. The known patterns end a word after it: a line end cannot begin
# one that goes on, and how white space is split depends on what follows it only where it is longer.
_LINE_CUT = re.compile(rb"(?<=[!-~]\n)(?=[!-~])")
# Before a single space between two visible characters of ASCII: what ends before white space takes none of it, and the
# space begins what follows.
_WORD_CUT = re.compile(rb"(?<=[!-~])(?= [!-~])")


def can_be_cut(fields: dict[str, Any], patterns: Collection[str]) -> bool:
    """Whether the tokenizer with this JSON splits as GPT-2's does, or by one of `patterns`, and does nothing else."""
    if fields.get("normalizer") or any(not token.get("special") for token in fields.get("added_tokens") or []):
        return False
    splits = fields.get("pre_tokenizer") or {}
    steps = splits.get("pretokenizers") if splits.get("type") == "Sequence" else [splits]
    *before, last = steps or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return False
    if not before:
        return bool(last.get("use_regex", True))
    return not last.get("use_regex", True) and len(before) == 1 and _is_split(before[0], patterns)


def cut_lines(document: bytes) -> list[bytes]:
    """The parts of a text in UTF-8 that end with some of its lines; one where there is no place to cut."""
    return _LINE_CUT.split(document)


def cut_words(document: bytes) -> list[bytes]:
    """The parts of a text in UTF-8 that begin with some of its spaces; one where there is no place to cut."""
    return _WORD_CUT.split(document)


def _is_split(step: dict[str, Any], patterns: Collection[str]) -> bool:
    pattern = step.get("pattern")
    known = isinstance(pattern, dict) and pattern.get("Regex") in patterns
    return known and step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert")
