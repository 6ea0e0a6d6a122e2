"""Patterns of tiktoken (Rust's regex syntax) in the form in which HF's tokenizers (Oniguruma, Ruby's syntax) read them.

Knows where the two syntaxes give one spelling two meanings; nothing of what is split.
"""

import re

from gptdist.errors import CorpusError

_ESCAPE = re.compile(r"\\[pP]\{[^}]*\}|\\[pP].|\\x\{[^}]*\}|\\x..|\\.", re.DOTALL)
_QUANTIFIER = re.compile(r"(?:[*+?]|\{\d+(?:,\d*)?\})[+?]?")
# The groups that mean the same in both. Others set flags such as (?m), which means "dot matches all" in Ruby.
_GROUP = re.compile(r"\((?:\?(?:i:|-i:|:|=|!|<=|<!|>))?")


def oniguruma_pattern(pattern: str) -> str:
    r"""The pattern with the same matches in Oniguruma. Raises CorpusError where it has a part with no sure equivalent.

    Oniguruma takes `^` and `$` for the ends of a line, not of the text, and `{1,3}+` for a repeated `{1,3}`, not for
    one that gives nothing back (`++`, `*+` and `?+` do mean that there too); likewise `{3}?` for an optional `{3}`.
    """
    done: list[str] = []
    opened: list[int] = []  # where in `done` each group not yet closed begins
    atom = 0  # where in `done` that begins to which a quantifier would belong
    position = 0
    while position < len(pattern):
        part = _part(pattern, position)
        position += len(part)
        if part[0] == "(":
            opened.append(len(done))
            done.append(part)
        elif part == ")" and opened:
            atom = opened.pop()
            done.append(part)
        elif part[0] in "*+?{" and _QUANTIFIER.fullmatch(part) and atom < len(done):
            done[atom:] = [_quantified("".join(done[atom:]), part)]
        else:
            atom = len(done)
            done.append({"^": r"\A", "$": r"\z"}.get(part, part))
    return "".join(done)


def _part(pattern: str, position: int) -> str:
    """The escape, class, opening of a group, quantifier or character at this place."""
    first = pattern[position]
    if first == "[":
        return pattern[position : _end_of_class(pattern, position)]
    if first == "(":
        group = _GROUP.match(pattern, position)
        assert group is not None
        if group.group() == "(" and pattern.startswith("(?", position):
            raise CorpusError(
                f"The tokenizer's pattern has {pattern[position : position + 8]!r} at character {position}, which HF's "
                "tokenizers read in another way. Name a HF tokenizer.json of this tokenizer instead."
            )
        return group.group()
    for kind in (_ESCAPE, _QUANTIFIER):
        if found := kind.match(pattern, position):
            return found.group()
    return first


def _end_of_class(pattern: str, position: int) -> int:
    """Where the class that begins at `position` ends, with any classes within it."""
    depth, at = 0, position
    while at < len(pattern):
        if found := _ESCAPE.match(pattern, at):
            at = found.end()
            continue
        if pattern[at] == "[":
            depth += 1
            at += 1 + pattern.startswith("^", at + 1)
            at += pattern.startswith("]", at)  # a bracket that comes first is a character
            continue
        depth -= pattern[at] == "]"
        at += 1
        if depth == 0:
            return at
    raise CorpusError(f"The tokenizer's pattern has a class that does not end: {pattern[position:]!r}.")


def _quantified(atom: str, quantifier: str) -> str:
    if quantifier.startswith("{"):
        if quantifier.endswith("+"):
            return f"(?>{atom}{quantifier[:-1]})"
        if quantifier.endswith("?") and "," not in quantifier:
            return atom + quantifier[:-1]
    return atom + quantifier
