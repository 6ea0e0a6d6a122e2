"""A YAML file, the files it builds on and overrides from the command line, laid over each other as one marked tree.

Knows files, and from a schema which keys there are; values are checked by whoever reads the tree.
"""

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from gptdist.config.marked import Marked, merge, read_yaml
from gptdist.config.problems import COMMAND_LINE, Problem
from gptdist.config.schema import KeyPath, Schema, item_section, shown_path

BASE_KEY = "base"
LARGEST_CONFIG_BYTES = 2**20


def read_layers(path: Path, overrides: Sequence[str], schema: Schema, problems: list[Problem]) -> tuple[Marked, bool]:
    """The tree of `path`, its `base:` files and `section.key=value` overrides, and whether all files could be read."""
    path = Path(path)
    tree, complete = _read_with_bases(path, str(path), (), schema, problems)
    for override in overrides:
        tree = _apply_override(tree, override, schema, problems)
    return tree, complete


def _read_with_bases(
    path: Path, written_at: str, above: tuple[str, ...], schema: Schema, problems: list[Problem]
) -> tuple[Marked, bool]:
    """The tree of `path` laid over its bases', and whether all of them could be read."""
    shown = os.path.normpath(path)
    own = _read_file(path, shown, written_at, schema, problems)
    if own is None:
        return Marked({}, shown), False
    chain = (*above, os.path.realpath(path))
    settings = dict(own.value)
    merged, complete = Marked({}, shown), True
    for base, origin in _bases(settings.pop(BASE_KEY, None), problems):
        base_path = path.parent / base
        if os.path.realpath(base_path) in chain:
            names = " -> ".join(os.path.basename(link) for link in (*chain, base))
            problems.append(Problem(f"base: {base} goes round in a circle: {names}. Remove one of them.", origin))
            complete = False
            continue
        tree, read = _read_with_bases(base_path, origin, chain, schema, problems)
        merged, complete = merge(merged, tree), complete and read
    return merge(merged, Marked(settings, shown)), complete


def _read_file(path: Path, shown: str, written_at: str, schema: Schema, problems: list[Problem]) -> Marked | None:
    """The mapping in one file, or None with a problem added."""
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST_CONFIG_BYTES + 1)
        if len(raw) > LARGEST_CONFIG_BYTES:
            raise ValueError(f"it is over {LARGEST_CONFIG_BYTES} bytes, and a {schema.noun} is a page of YAML")
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        text = f"{shown} is not UTF-8 text (byte {error.start}). A {schema.noun} is YAML."
        problems.append(Problem(text, written_at))
        return None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        problems.append(Problem(f"{shown} cannot be read: {reason}. {_nearby(path)}", written_at))
        return None
    tree = read_yaml(text, lambda line: f"{shown}:{line}", problems)
    if tree is None or tree.value is None:
        return None if tree is None else Marked({}, shown)
    if not isinstance(tree.value, dict):
        keys = ", ".join(f"{key}:" for key in list(schema.root.model_fields)[:2])
        text = f"A {schema.noun} is a mapping of sections ({keys}, ...), not this."
        problems.append(Problem(text, tree.origin))
        return None
    children = {
        # `optimizer:` with nothing under it is an empty section, not a null.
        key: Marked({}, child.origin) if child.value is None and schema.section_at((key,)) else child
        for key, child in tree.value.items()
    }
    return Marked(children, shown)


def _bases(base: Marked | None, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    if base is None or base.value is None:
        return
    names = base.plain() if isinstance(base.value, tuple) else [base.value]
    for name in names:
        if isinstance(name, str) and name and "\0" not in name:
            yield name, base.origin
        else:
            text = "base must be a file, or a list of files, relative to this one: `base: ../models/gpt2_124m.yaml`."
            problems.append(Problem(text, base.origin))


def _nearby(path: Path) -> str:
    """A sentence with the YAML files near a path that could not be read, the likeliest first."""
    folder = path if path.is_dir() else path.parent
    if not folder.is_dir():
        return f"There is no folder {folder}."
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))
    except OSError:
        names = []
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    listed = close + [name for name in names if name not in close]
    if not listed:
        return f"There are no YAML files in {folder}."
    return f"In {folder} there are: {', '.join(listed[:10])}{', ...' if len(listed) > 10 else ''}."


def _apply_override(tree: Marked, override: str, schema: Schema, problems: list[Problem]) -> Marked:
    """`tree` with one `section.key=value` laid over it; where that cannot be, as it was, with a problem added."""
    name, equals, text = override.partition("=")
    path = tuple(name.split("."))
    if not equals or not all(path):
        problems.append(
            Problem(f"{override!r} is no override. Write section.key=value: train.steps=100.", COMMAND_LINE)
        )
        return tree
    number = next((index for index, key in enumerate(path) if key.isdecimal()), 0)
    if number and (field := schema.field_at(path[:number])) and item_section(field.annotation):
        text = f"{name} is inside a list, which is given whole: {shown_path(path[:number])}=[{{...}}, {{...}}]."
        problems.append(Problem(text, COMMAND_LINE))
        return tree
    if schema.field_at(path) is None:
        problems.append(Problem(f"{name} is not a setting. {_suggest_override(path, schema)}", COMMAND_LINE))
        return tree
    found: list[Problem] = []
    value = read_yaml(text, lambda line: COMMAND_LINE, found)
    if value is None or found or isinstance(value.value, dict):
        hint = f"{name}={text} has a value that does not read as one setting."
        if schema.section_at(path):
            hint = _set_keys(name, path, schema)
        else:
            hint += f" For text, quote it twice: '{name}=\"...\"'."
        problems.append(Problem(hint, COMMAND_LINE))
        return tree
    if schema.section_at(path) and not (value.value is None and len(path) > 1):
        problems.append(Problem(_set_keys(name, path, schema), COMMAND_LINE))
        return tree
    return _set(tree, path, value)


def _suggest_override(path: KeyPath, schema: Schema) -> str:
    known = next(length for length in range(len(path) - 1, -1, -1) if schema.section_at(path[:length]))
    if schema.field_at(path[: known + 1]):
        return f"{'.'.join(path[: known + 1])} is one value: write {'.'.join(path[: known + 1])}=VALUE."
    return schema.suggest_key(path[: known + 1])


def _set_keys(name: str, path: KeyPath, schema: Schema) -> str:
    section = schema.section_at(path)
    keys = list(section.model_fields) if section else []
    return f"{name} is a section; set its keys one by one: {name}.{keys[0]}=VALUE. Its keys: {', '.join(keys)}."


def _set(tree: Marked, path: KeyPath, value: Marked) -> Marked:
    """`tree` with `value` at `path`; a section on the way that was null or absent becomes one."""
    if not path:
        return value
    if tree.value is not None and not isinstance(tree.value, dict):
        return tree  # a section that a file gives a plain value: its own mistake, reported with its own line
    children = dict(tree.value or {})
    children[path[0]] = _set(children.get(path[0], Marked({}, COMMAND_LINE)), path[1:], value)
    return Marked(children, tree.origin)
