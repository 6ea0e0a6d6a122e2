"""YAML text -> a tree of plain values, each marked with where it was written.

Knows YAML and its traps, not our sections. Reads the sane part of YAML 1.2: `1e-4` is a number, `yes` and `1:30` are
text, a key may appear once, and there are no tags, anchors or aliases (a file shares settings through `base:`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import yaml

from gptdist.config.problems import Problem

_DIGITS = r"[0-9]+(?:_[0-9]+)*"
_EXPONENT = r"(?:[eE][-+]?[0-9]+)?"
_INT = re.compile(rf"[-+]?{_DIGITS}$")
_FLOAT = re.compile(rf"[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?{_EXPONENT}|\.{_DIGITS}{_EXPONENT}|\.(?:inf|nan))$")
_TAG = "tag:yaml.org,2002:"

Where = Callable[[int], str]


@dataclass(frozen=True)
class Marked:
    """`value` is a scalar, a tuple of Marked, or a dict of key -> Marked; `origin` is where it was written."""

    value: Any
    origin: str

    def plain(self) -> Any:
        """The values without their marks."""
        if isinstance(self.value, dict):
            return {key: child.plain() for key, child in self.value.items()}
        if isinstance(self.value, tuple):
            return tuple(child.plain() for child in self.value)
        return self.value

    def child(self, key: str) -> "Marked | None":
        """What stands under `key`; of a list, under the item's number."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, tuple) and key.isdecimal() and int(key) < len(self.value):
            item: Marked = self.value[int(key)]
            return item
        return None

    def origin_of(self, path: tuple[str, ...]) -> str:
        """Where `path` was written; for what was not, where the innermost thing around it was."""
        node = self
        for key in path:
            below = node.child(key)
            if below is None:
                break
            node = below
        return node.origin

    def has(self, path: tuple[str, ...]) -> bool:
        """Whether `path` was written at all."""
        below = self.child(path[0]) if path else None
        return not path or (below is not None and below.has(path[1:]))


class _RunLoader(yaml.SafeLoader):
    """SafeLoader with the scalars of YAML 1.2 and without aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.MarkedYAMLError(problem="anchors and aliases are not read", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(node.value)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    return float(re.sub(r"\.(?=inf|nan)", "", node.value))


# None of SafeLoader's YAML 1.1 guesses (`no` is false, `1:30` is 90). Where two could match, the first does: whole
# numbers before numbers.
_RunLoader.yaml_implicit_resolvers = {}
_RunLoader.add_implicit_resolver(f"{_TAG}null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_RunLoader.add_implicit_resolver(f"{_TAG}bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_RunLoader.add_implicit_resolver(f"{_TAG}int", _INT, list("-+0123456789"))
_RunLoader.add_implicit_resolver(f"{_TAG}float", _FLOAT, list("-+.0123456789"))
_RunLoader.add_constructor(f"{_TAG}int", _construct_int)
_RunLoader.add_constructor(f"{_TAG}float", _construct_float)


def read_yaml(text: str, where: Where, problems: list[Problem]) -> Marked | None:
    """The marked tree of one YAML document; `where(line)` names a line, counted from 1.

    Returns None, with a problem added, where the text is no YAML; for an unreadable value inside, adds a problem and
    goes on without it.
    """
    try:
        loader = _RunLoader(text)
        node = loader.get_single_node()
        return Marked(None, where(1)) if node is None else _mark(loader, node, where(1), where, problems)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        what = getattr(error, "problem", None) or getattr(error, "reason", None) or "unreadable"
        line = mark.line + 1 if mark else 1
        problems.append(
            Problem(f"This is not YAML that can be read: {what}. Check indentation and quotes.", where(line))
        )
    except RecursionError:
        problems.append(Problem("The YAML is nested far too deeply. Sections nest two or three deep.", where(1)))
    return None


def _mark(loader: _RunLoader, node: yaml.Node, origin: str, where: Where, problems: list[Problem]) -> Marked | None:
    if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
        return Marked(_mark_mapping(loader, node, where, problems), origin)
    if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
        items = (_mark(loader, item, where(item.start_mark.line + 1), where, problems) for item in node.value)
        return Marked(tuple(item for item in items if item), origin)
    if isinstance(node, yaml.ScalarNode):
        try:
            return Marked(loader.construct_object(node), origin)
        except (yaml.YAMLError, ValueError, KeyError):
            pass
    problems.append(Problem(f"The tag {node.tag.replace(_TAG, '!!')} is not read here. Write the plain value.", origin))
    return None


def _mark_mapping(
    loader: _RunLoader, node: yaml.MappingNode, where: Where, problems: list[Problem]
) -> dict[str, Marked]:
    children: dict[str, Marked] = {}
    for key_node, value_node in node.value:
        origin = where(key_node.start_mark.line + 1)
        if not isinstance(key_node, yaml.ScalarNode):
            problems.append(Problem("A key must be a plain word.", origin))
        elif key_node.value in children:
            first = children[key_node.value].origin
            problems.append(
                Problem(f"The key {key_node.value} is here a second time; the first is at {first}. Keep one.", origin)
            )
        elif child := _mark(loader, value_node, origin, where, problems):
            children[key_node.value] = child
    return children


def merge(lower: Marked, upper: Marked) -> Marked:
    """`upper` laid over `lower`: mappings merge key by key, anything else of `upper` replaces what was there."""
    if not isinstance(lower.value, dict) or not isinstance(upper.value, dict):
        return upper
    merged = dict(lower.value)
    for key, child in upper.value.items():
        merged[key] = merge(merged[key], child) if key in merged else child
    return Marked(merged, upper.origin)


def render_scalar(value: Any) -> str:
    """A scalar as YAML that `read_yaml` reads back as the same value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str) and not _is_plain_text(value):
        # allow_unicode=False escapes whatever a line of text cannot show; width keeps it on one line.
        dumped = yaml.dump(value, Dumper=yaml.SafeDumper, default_style='"', allow_unicode=False, width=float("inf"))
        return dumped.strip()
    return value if isinstance(value, str) else repr(value)


def _is_plain_text(value: str) -> bool:
    if not re.fullmatch(r"[A-Za-z0-9_./][A-Za-z0-9_./-]*", value):
        return False
    found = read_yaml(value, str, [])
    return found is not None and found.value == value
