"""Chooses the text of a record: a field, a field within a field, or a template of several.

Knows records as mappings from names to values; does not know which file format they come from. Templates are parsed
here and only ever insert values: nothing in them is evaluated and no attribute is looked up.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from operator import itemgetter
from typing import Any

from gptdist.errors import CorpusError

_ESCAPES = {r"\n": "\n", r"\t": "\t", r"\\": "\\"}
_TOKENS = re.compile(r"(?P<double>\{\{|\}\})|\{(?P<name>[^{}]*)\}|(?P<escape>\\[nt\\])|(?P<brace>[{}])")
_HOW = "An entry is NAME, OUTER.INNER or a template such as '{title}\\n\\n{text}', after GLOB= if for some files only."


class NoText(Exception):
    """A record has no text where it should be; the message goes on after the name of the record's place.

    `missing`: there is no such field at all, rather than one that holds no text.
    """

    def __init__(self, message: str, missing: bool) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True, slots=True)
class TextField:
    """The text of a record: the values of `names`, between `literals`, of which there is one more."""

    names: tuple[str, ...]
    literals: tuple[str, ...]

    @property
    def plain(self) -> str | None:
        """The name, where the text is one field and nothing else."""
        return self.names[0] if self.literals == ("", "") else None

    def picker(self) -> Callable[[Any], Any]:
        """The fast way to the text: fails, or gives what is no str, wherever `text_of` would raise."""
        name = self.plain
        return itemgetter(name) if name is not None and "." not in name else self.text_of

    def text_of(self, record: Mapping[str, Any]) -> str:
        """The record's text. Raises NoText."""
        pieces = [self.literals[0]]
        for name, literal in zip(self.names, self.literals[1:], strict=True):
            pieces += (_value(record, name), literal)
        return "".join(pieces)


def parse_text_field(entry: str) -> tuple[str, TextField]:
    """(glob of file keys, field) of an entry such as "title", "meta.title", "wiki/*={title}\\n{text}".

    In a template {{ and }} stand for braces; \\n, \\t and \\\\ spelled with a backslash for what they are elsewhere.
    Raises CorpusError.
    """
    head, equals, tail = entry.partition("=")
    glob, spec = (head, tail) if equals and "{" not in head else ("*", entry)
    if not glob or not spec:
        what = "names no field" if not equals else f"has nothing {'after' if glob else 'before'} its '='"
        raise CorpusError(f"Text field {entry!r} {what}. {_HOW}")
    if "{" not in spec and "}" not in spec:
        return glob, TextField((spec,), ("", ""))
    names: list[str] = []
    literals = [""]
    end = 0
    for token in _TOKENS.finditer(spec):
        literals[-1] += spec[end : token.start()]
        end = token.end()
        if token["double"]:
            literals[-1] += token["double"][0]
        elif token["escape"]:
            literals[-1] += _ESCAPES[token["escape"]]
        elif token["name"]:
            names.append(token["name"])
            literals.append("")
        else:
            what = "a single brace" if token["brace"] else "a pair of braces without a name"
            raise CorpusError(f"Text field {entry!r} has {what} at character {token.start() + 1}. {_HOW}")
    literals[-1] += spec[end:]
    if not names:
        raise CorpusError(f"Text field {entry!r} names no field. {_HOW}")
    return glob, TextField(tuple(names), tuple(literals))


def choose_text_field(entries: Sequence[str], key: str) -> TextField:
    """The field for the file of this key: the last entry whose glob matches it. Raises CorpusError where none does."""
    for glob, field in map(parse_text_field, reversed(entries)):
        if fnmatchcase(key, glob):
            return field
    raise CorpusError(
        f"No text field is given for {key}: only {', '.join(entries) or 'none'}. Add one that holds for every file, "
        "such as --text-field text, in front of those for some files."
    )


def _value(record: Mapping[str, Any], name: str) -> str:
    """The text in a field; a name with full stops is looked up as it is first, then as fields within fields."""
    value: Any = record
    for part in (name,) if name in record else name.split("."):
        if isinstance(value, Mapping):
            if part not in value:
                raise _missing(name, record)
            value = value[part]
        elif value is not None:
            raise _missing(name, record)
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise NoText(f"has no text in field {name!r}; it is {kind}", missing=False)
    return value


def _missing(name: str, names: Iterable[str]) -> NoText:
    have = ", ".join(map(repr, names))
    return NoText(f"has no text in field {name!r}; {f'its fields are {have}' if have else 'it has no field'}", True)
