"""One thing wrong with a config, where it was written, and how a list of them is shown.

Knows nothing of YAML or of any section.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptdist.errors import ConfigError

COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True)
class Problem:
    """`text` says what is wrong, the value, the rule and what to change; `origin` is file:line or the command line."""

    text: str
    origin: str

    def __str__(self) -> str:
        return f"{self.text}  [{self.origin}]"


def raise_problems(problems: Sequence[Problem], subject: str) -> None:
    """Raises one ConfigError that lists every distinct problem; returns if there is none."""
    distinct = list(dict.fromkeys(problems))
    if len(distinct) == 1:
        raise ConfigError(str(distinct[0]))
    if distinct:
        listed = "\n".join(f"  - {problem}" for problem in distinct)
        raise ConfigError(f"{len(distinct)} problems in {subject}:\n{listed}")


def places_of(keys: Sequence[str], origins: Mapping[str, str]) -> str:
    """Where settings were written, those of a file or the command line only; defaults are nobody's line."""
    written = [origins.get(key, DEFAULT) for key in keys]
    return ", ".join(dict.fromkeys(place for place in written if place != DEFAULT)) or DEFAULT
