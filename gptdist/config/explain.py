"""What pydantic found wrong with a config -> problems a person can act on: value, rule, place, what to change.

Knows the sections and where each value was written; reads no file.
"""

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails, PydanticUndefined

from gptdist.config.marked import Marked, render_scalar
from gptdist.config.problems import Problem
from gptdist.config.schema import KeyPath, Schema, nested_section, shown_path
from gptdist.config.sections import Section

_COMPARISONS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text (put it in quotes)",
    "string_unicode": "text of whole characters",
    "finite_number": "a finite number",
    "tuple_type": "a list",
}


def explain(error: ValidationError, tree: Marked, schema: Schema, *, skip_missing: bool) -> Iterator[Problem]:
    """One problem per mistake. `skip_missing`: a file could not be read, so what is absent may stand there."""
    for details in error.errors():
        path = tuple(str(part) for part in details["loc"])
        if details["type"] == "missing":
            if not skip_missing:
                yield from _explain_missing(path, tree, schema)
        else:
            yield Problem(_explain_value(path, details, schema), tree.origin_of(path))


def _explain_missing(path: KeyPath, tree: Marked, schema: Schema) -> Iterator[Problem]:
    section = schema.section_at(path)
    for required in _required_settings(section, path) if section else [path]:
        field = schema.field_at(required)
        meaning = f" ({field.description.rstrip('.')})" if field and field.description else ""
        name = shown_path(required)
        give = "" if "[" in name else f", or give {name}=VALUE"
        yield Problem(f"{name} is not set and has no default{meaning}. Add it{give}.", tree.origin_of(path))


def explain_no_corpus(tree: Marked) -> Iterator[Problem]:
    """A run reads something; which of the two settings says what is open, so neither is required by itself."""
    data = tree.child("data") or Marked({}, tree.origin)
    named = [data.child("corpus"), data.child("blend")]
    if isinstance(data.value, dict) and all(setting is None or setting.value is None for setting in named):
        yield Problem(
            "data.corpus is not set and has no default (Folder that `gptdist data build` made, or its URL). Add it, or "
            "give data.corpus=VALUE; for several corpora, set data.blend.",
            tree.origin_of(("data",)),
        )


def _required_settings(section: type[Section], path: KeyPath) -> Iterator[KeyPath]:
    for key, field in section.model_fields.items():
        nested = nested_section(field.annotation)
        if field.is_required() and nested:
            yield from _required_settings(nested, (*path, key))
        elif field.is_required():
            yield (*path, key)


def _explain_value(path: KeyPath, details: ErrorDetails, schema: Schema) -> str:
    name, kind, value = shown_path(path), details["type"], details["input"]
    if kind == "extra_forbidden":
        return f"{name} is not a setting. {schema.suggest_key(path)}"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        section = schema.section_at(path)
        keys = ", ".join(section.model_fields) if section else ""
        return (
            f"{name} is a section and was given {_shown(value)}. Put its keys on lines of their own under it: {keys}."
        )
    return f"{name} is {_shown(value)}; it must be {_rule(path, details, schema)}.{_remedy(path, kind, value, schema)}"


def _rule(path: KeyPath, details: ErrorDetails, schema: Schema) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind in _COMPARISONS:
        bound, words = _COMPARISONS[kind]
        return f"{words} {context[bound]}"
    if kind == "literal_error":
        return "one of " + ", ".join(_choices(path, schema))
    if kind == "value_error":  # raised by a validator of ours: "must be ..."
        return str(context["error"]).removeprefix("must be ")
    return _TYPES.get(kind, details["msg"].removeprefix("Input should be "))


def _remedy(path: KeyPath, kind: str, value: Any, schema: Schema) -> str:
    if kind in ("int_type", "int_from_float") and isinstance(value, float) and value.is_integer():
        return f" Write {int(value)}."
    if kind == "literal_error" and isinstance(value, str):
        near = difflib.get_close_matches(value.lower(), _choices(path, schema), n=1)
        if near:
            return f" Did you mean {near[0]}?"
    field = schema.field_at(path)
    if field is None or field.default in (None, (), PydanticUndefined):
        return ""
    return f" The default is {render_scalar(field.default)}."


def _choices(path: KeyPath, schema: Schema) -> list[str]:
    field = schema.field_at(path)
    return [str(choice) for choice in get_args(field.annotation)] if field else []


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, tuple):
        value = f"[{', '.join(map(_shown, value))}]"
        return value if len(value) <= 60 else value[:57] + "..."
    shown = render_scalar(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
