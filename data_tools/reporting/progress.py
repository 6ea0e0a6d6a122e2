"""How a corpus build says how far it is: what a display must offer, and one that shows nothing.

Knows no terminal. The display itself is `launch/corpora/build_progress.py`, which the data tools may not import.
"""

from collections.abc import Mapping
from types import TracebackType
from typing import Protocol


class Progress(Protocol):
    """A display of one build, told of its stages one after the other by one process."""

    def stage(self, name: str, total: int, unit: str, workers: int = 1) -> None:
        """Begin a stage of `total` times `unit` ("bytes", "documents", "tasks"); the one before has ended."""

    def advance(
        self,
        done: int,
        documents: int = 0,
        text_bytes: int = 0,
        tokens: int = 0,
        dropped: Mapping[str, int] | None = None,
        resumed: bool = False,
    ) -> None:
        """`done` more units. `dropped`: reason -> how many more documents.

        Work that an earlier run had done is `resumed`: it moves the bar and is no part of the rates. `advance(0)` only
        brings the display up to date, for a loop that waits long.
        """

    def note(self, text: str) -> None:
        """A line that stays."""

    def close(self) -> None:
        """End the last stage and give the terminal back. May be called again."""

    def __enter__(self) -> "Progress": ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class NoProgress:
    """Shows nothing."""

    def stage(self, name: str, total: int, unit: str, workers: int = 1) -> None:
        """Nothing to show."""

    def advance(
        self,
        done: int,
        documents: int = 0,
        text_bytes: int = 0,
        tokens: int = 0,
        dropped: Mapping[str, int] | None = None,
        resumed: bool = False,
    ) -> None:
        """Nothing to show."""

    def note(self, text: str) -> None:
        """Nothing to show."""

    def close(self) -> None:
        """Nothing is held open."""

    def __enter__(self) -> "NoProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Nothing is held open."""
