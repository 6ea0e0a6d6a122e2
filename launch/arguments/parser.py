"""What the grammar of the command is made of: a parser that helps, and types of values with their rules.

Imports nothing heavy. Must not know which commands there are.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gptdist.config.units import parse_bytes, parse_duration


class Parser(argparse.ArgumentParser):
    """argparse, with the nearest valid word for a misspelt subcommand or option."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(*args, **kwargs)
        self.subcommands: list[str] = []

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"invalid choice: '([^']*)'", message)
        if wrong and wrong.group(1) not in self.subcommands and self.subcommands:
            message = f"there is no command `{self.prog} {wrong.group(1)}`.{_nearest(wrong.group(1), self.subcommands)}"
            message += f" Commands: {', '.join(self.subcommands)}."
        print(f"error: {message}\n\n{self.format_usage().rstrip()}", file=sys.stderr)
        sys.exit(2)

    def reject(self, unknown: Sequence[str]) -> NoReturn:
        """End with an error about arguments this command does not know."""
        options = [option for action in self._actions for option in action.option_strings]
        hints = "".join(_nearest(word.partition("=")[0], options) for word in unknown if word.startswith("-"))
        self.error(f"`{self.prog}` does not know {' '.join(unknown)}.{hints}")


def add_command(parent: Parser, commands: Any, name: str, summary: str) -> Parser:
    """A command below `parent`; its `command` is all words of it."""
    parent.subcommands.append(name)
    added: Parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    words = [parent.get_default("command"), name] if parent.get_default("command") else [name]
    added.set_defaults(command=" ".join(words), parser=added)
    return added


def _nearest(word: str, words: Sequence[str]) -> str:
    found = difflib.get_close_matches(word, words, n=1)
    return f" Did you mean {found[0]}?" if found else ""


def _typed(parse: Callable[[str], Any], text: str, accepts: Callable[[Any], bool], rule: str) -> Any:
    try:
        value = parse(text)
    except ValueError:
        value = None
    if value is None or not accepts(value):
        raise argparse.ArgumentTypeError(f"{text!r} {rule}")
    return value


def positive(text: str) -> int:
    """1, 2, ..."""
    return int(_typed(int, text, lambda value: value >= 1, "must be a whole number of at least 1"))


def from_zero(text: str) -> int:
    """0, 1, ..."""
    return int(_typed(int, text, lambda value: value >= 0, "must be a whole number of at least 0"))


def temperature(text: str) -> float:
    """Of a draw; 0 takes the likeliest."""
    return float(_typed(float, text, lambda value: 0 <= value < float("inf"), "must be a number of at least 0"))


def top_p(text: str) -> float:
    """A probability that is not 0."""
    return float(_typed(float, text, lambda value: 0 < value <= 1, "must be a number above 0 and at most 1"))


def port(text: str) -> int:
    """Of TCP; 0 for a free one."""
    return int(_typed(int, text, lambda value: 0 <= value <= 65535, "must be a port, 0 to 65535"))


def seconds(text: str) -> float:
    """90s, 5m, 2h."""
    return float(_typed(parse_duration, text, lambda value: value > 0, "must be a time such as 90s, 5m or 2h"))


def corpus(text: str) -> Path | str:
    """A folder or a URL."""
    return text if "://" in text else Path(text)


def size_in_bytes(text: str) -> int:
    """5000000, 50MB, 2GiB."""
    rule = "must be a size such as 5000000, 50MB or 2GiB"
    return int(_typed(lambda word: int(word) if word.isdecimal() else parse_bytes(word), text, lambda n: n > 0, rule))


def part(text: str) -> tuple[int, int]:
    """0/8 to 7/8."""
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} must be a part and how many there are, such as 0/8 to 7/8")
    return int(part), int(parts)


def words(text: str) -> tuple[str, ...]:
    """Words with commas between."""
    return tuple(word.strip() for word in text.split(",") if word.strip())
