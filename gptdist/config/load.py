"""A run's YAML, the files it builds on and the command line's overrides -> one checked, frozen RunConfig.

Knows where every value came from, and reports everything that is wrong at once. Rules that join settings are in
`check.py`; how files are laid over each other is in `layers.py`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gptdist.config.explain import explain, explain_no_corpus
from gptdist.config.layers import read_layers
from gptdist.config.marked import Marked, render_scalar
from gptdist.config.problems import DEFAULT, Problem, raise_problems
from gptdist.config.schema import RUN, KeyPath, shown_path
from gptdist.config.sections import RunConfig, Section


@dataclass(frozen=True)
class LoadedRun:
    """A config and, for each setting ("train.steps"), "FILE:LINE", "command line" or "default"."""

    config: RunConfig
    origins: dict[str, str]


def load_run(path: Path, overrides: Sequence[str] = ()) -> LoadedRun:
    """Read `path`, its `base:` files and `section.key=value` overrides. Raises ConfigError listing all mistakes."""
    problems: list[Problem] = []
    tree, complete = read_layers(path, overrides, RUN, problems)
    try:
        config = RunConfig.model_validate(tree.plain(), strict=True)
    except ValidationError as error:
        problems.extend(explain(error, tree, RUN, skip_missing=not complete))
    if complete:
        problems.extend(explain_no_corpus(tree))
    raise_problems(problems, str(path))
    return LoadedRun(config, origins_of(config, tree))


def origins_of(config: Section, tree: Marked) -> dict[str, str]:
    """For each setting of `config`, where `tree` says that it was written."""
    return dict(_origins(resolved_dict(config), tree, ()))


def resolved_dict(config: Section) -> dict[str, Any]:
    """Every setting as JSON-able values; durations in seconds. `RunConfig.model_validate` takes it back."""
    resolved: dict[str, Any] = config.model_dump(mode="json")
    return resolved


def render_config(loaded: LoadedRun) -> str:
    """Every setting with its origin as a comment; as YAML it loads to the same config."""
    return render_sections(loaded.config, loaded.origins)


def render_sections(config: Section, origins: dict[str, str]) -> str:
    """The same of any sections with their origins."""
    lines = list(_render_lines(resolved_dict(config), origins, ()))
    width = min(60, max(len(text) for text, _ in lines))
    return "".join(f"{text:<{width}}  # {origin}\n" if origin else f"{text}\n" for text, origin in lines)


def _origins(resolved: dict[str, Any], tree: Marked, above: KeyPath) -> Iterator[tuple[str, str]]:
    for key, value in resolved.items():
        path = (*above, key)
        if isinstance(value, dict):
            yield from _origins(value, tree, path)
            continue
        if _is_list_of_sections(value):
            yield from _origins({str(number): item for number, item in enumerate(value)}, tree, path)
        yield shown_path(path), tree.origin_of(path) if tree.has(path) else DEFAULT


def _render_lines(resolved: dict[str, Any], origins: dict[str, str], above: KeyPath) -> Iterator[tuple[str, str]]:
    indent = "  " * len(above)
    for key, value in resolved.items():
        path = (*above, key)
        if isinstance(value, dict):
            yield f"{indent}{key}:{'' if value else ' {}'}", ""
            yield from _render_lines(value, origins, path)
        elif _is_list_of_sections(value):
            yield f"{indent}{key}:", ""
            for number, item in enumerate(value):
                lines = list(_render_lines(item, origins, (*path, str(number))))
                # The item's first line carries its dash, in the room of its indent.
                lines[0] = (f"{indent}  - {lines[0][0].lstrip()}", lines[0][1])
                yield from lines
        else:
            origin = "".join(letter if letter.isprintable() else "?" for letter in origins[shown_path(path)])
            yield f"{indent}{key}: {render_scalar(value)}", origin


def _is_list_of_sections(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
