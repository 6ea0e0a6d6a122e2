"""The tree of sections as data: which keys exist where, and which of them a mistyped key was meant to be.

Reads the section classes only; knows no file and no value.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from gptdist.config.sections import RunConfig, Section

KeyPath = tuple[str, ...]
"""Keys from the run down; an item of a list by its number: ("data", "blend", "0", "weight")."""


def shown_path(path: KeyPath) -> str:
    """`data.blend[0].weight`."""
    return "".join(f"[{key}]" if key.isdecimal() else f".{key}" for key in path).lstrip(".")


def nested_section(annotation: Any) -> type[Section] | None:
    """The section class that a field of this type holds, or None for a plain setting (`BatchRamp | None` holds one)."""
    if get_origin(annotation) is tuple:
        return None
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def item_section(annotation: Any) -> type[Section] | None:
    """The section class that each item of a list of this type is, or None for anything but a list of sections."""
    for candidate in (annotation, *get_args(annotation)):
        if get_origin(candidate) is tuple:
            return nested_section(get_args(candidate)[0])
    return None


@dataclass(frozen=True)
class Schema:
    """All sections below `root`; `noun` is what people call a file of them."""

    root: type[Section]
    noun: str

    def section_at(self, path: KeyPath) -> type[Section] | None:
        """The section class at `path` (the root at the empty path), or None where there is no section."""
        section: type[Section] | None = self.root
        items: type[Section] | None = None
        for key in path:
            if items and key.isdecimal():
                section, items = items, None
                continue
            field = section.model_fields.get(key) if section else None
            section = nested_section(field.annotation) if field else None
            items = item_section(field.annotation) if field else None
        return section

    def field_at(self, path: KeyPath) -> FieldInfo | None:
        """The declaration of the setting or section at `path`, or None for an unknown one.

        Of a mapping with keys of the user's own, each key is declared by the mapping.
        """
        section = self.section_at(path[:-1])
        if section and path:
            return section.model_fields.get(path[-1])
        above = self.field_at(path[:-1]) if len(path) > 1 else None
        return above if above and get_origin(above.annotation) is dict else None

    def paths(self) -> Iterator[KeyPath]:
        """Every setting there is, in order: ("model", "num_layers"), ..."""
        return _setting_paths(self.root, ())

    def suggest_key(self, path: KeyPath) -> str:
        """A sentence for the unknown key at `path`: what it may have been meant to be, else the keys there are."""
        section = self.section_at(path[:-1])
        siblings = list(section.model_fields) if section else []
        if "." in path[-1]:
            *outer, inner = path[-1].split(".")
            return f"In a file, sections nest: put `{inner}:` on a line of its own under `{':'.join(outer)}:`."
        near = [shown_path((*path[:-1], key)) for key in difflib.get_close_matches(path[-1], siblings, n=2)]
        elsewhere = [".".join(other) for other in self.paths() if other[-1] == path[-1]]
        if not near and not elsewhere:
            names = {other[-1]: ".".join(other) for other in self.paths()}
            elsewhere = [names[key] for key in difflib.get_close_matches(path[-1], names, n=1, cutoff=0.75)]
        guesses = list(dict.fromkeys(elsewhere + near))
        if guesses:
            return f"Did you mean {' or '.join(guesses)}?"
        return f"The keys here are: {', '.join(siblings)}."


RUN = Schema(RunConfig, "run config")


def _setting_paths(section: type[Section], above: KeyPath) -> Iterator[KeyPath]:
    for key, field in section.model_fields.items():
        nested = nested_section(field.annotation)
        if nested:
            yield from _setting_paths(nested, (*above, key))
        else:
            yield (*above, key)
