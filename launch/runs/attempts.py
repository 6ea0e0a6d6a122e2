"""What was tried so far, in `attempts.jsonl` of a run: a record when ranks start, one when they end, notes between.

Appended by the process that decides over the ranks; read by `gptdist status` and by whoever decides what comes next, on
any machine that sees the run's folder. Knows files and nothing of processes, Slurm or steps.
"""

import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

from gptdist.durable import sync_folder
from gptdist.errors import StorageError
from gptdist.monitor.append import append_whole

ATTEMPTS_FILE = "attempts.jsonl"


@dataclass(frozen=True)
class Attempt:
    """One start of all ranks, and how it ended. Without an end it still runs, or was killed without a word.

    `allocation`: `slurm 123` or `local`; `restart`: how often Slurm had requeued that job; `generation`: how often the
    ranks were restarted in place before. The three together name an attempt. `fresh`: the run began anew with it, so
    that none before it counts. Times are seconds since the epoch.
    """

    allocation: str
    restart: int
    generation: int
    hosts: tuple[str, ...]
    ranks: int
    began: float
    start_step: int
    ended: float | None = None
    last_step: int | None = None  # the last one that was finished
    saved_step: int | None = None  # of the newest checkpoint of the run
    reason: str | None = None  # one clear sentence
    failed: bool = False  # it did not end well, and nobody wished it to end
    culprits: tuple[str, ...] = ()  # hosts
    exit_code: int | None = None
    action: str | None = None  # restart in place, requeue, stop, done
    fresh: bool = False

    @property
    def name(self) -> tuple[str, int, int]:
        return self.allocation, self.restart, self.generation


@dataclass(frozen=True)
class Note:
    """Something worth knowing that ended nothing: a `slow rank`, a `loss spike`. `at`: seconds since the epoch."""

    at: float
    kind: str
    text: str


def begin(run_dir: Path, attempt: Attempt) -> None:
    """Record that the ranks of `attempt` start now. Survives a power cut once this returns. Raises StorageError."""
    _append(run_dir, {"event": "begin", **asdict(attempt)})


def end(run_dir: Path, attempt: Attempt) -> None:
    """Record how `attempt` ended: all of it again, so that its beginning may be missing. Raises StorageError."""
    _append(run_dir, {"event": "end", **asdict(attempt)})


def note(run_dir: Path, kind: str, text: str) -> None:
    """Record what `gptdist status` should tell. Raises StorageError."""
    _append(run_dir, {"event": "note", **asdict(Note(time.time(), kind, text))})


def read_attempts(run_dir: Path) -> list[Attempt]:
    """The run's attempts in the order in which they began; none where nothing was recorded.

    A line that a kill or a power cut left torn is passed over, as is one that is no record. Raises StorageError where
    the file is there and cannot be read.
    """
    attempts: dict[tuple[str, int, int], Attempt] = {}
    for record in _records(run_dir):
        attempt = _attempt(record)
        if attempt is None:
            continue
        if attempt.fresh and record["event"] == "begin":
            attempts.clear()
        attempts[attempt.name] = attempt  # the place of its beginning, the content of its end
    return list(attempts.values())


def read_notes(run_dir: Path) -> list[Note]:
    """All notes, oldest first. Raises StorageError."""
    notes = []
    for record in _records(run_dir):
        at, kind, text = (record.get(name) for name in ("at", "kind", "text"))
        if record.get("event") == "note" and isinstance(at, int | float):
            notes.append(Note(float(at), str(kind), str(text)))
    return notes


def _append(run_dir: Path, event: Mapping[str, Any]) -> None:
    path = run_dir / ATTEMPTS_FILE
    record = json.dumps(event, allow_nan=False).encode() + b"\n"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        new = not path.exists()
        with path.open("a+b") as file:
            # A restarted job may begin while the last words of the one before are still being written.
            with suppress(OSError):  # a file system without locks; an append of one line is whole on most of them
                fcntl.flock(file, fcntl.LOCK_EX)
            append_whole(path, b"\n" + record if _ends_torn(file) else record)
            os.fsync(file.fileno())
        if new:
            sync_folder(run_dir)
    except OSError as error:
        raise StorageError(
            f"cannot write {path}: {error.strerror or error}. Free some space, or set launch.run_dir to a folder that "
            "this user can write."
        ) from error


def _ends_torn(file: BinaryIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def _records(run_dir: Path) -> Iterator[dict[str, Any]]:
    try:
        content = (run_dir / ATTEMPTS_FILE).read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(
            f"{run_dir / ATTEMPTS_FILE} cannot be read: {error.strerror or error}. Run this as a user who may read it."
        ) from error
    for line in content.split(b"\n"):
        with suppress(ValueError):  # torn, or not text
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def _attempt(record: Mapping[str, Any]) -> Attempt | None:
    """Of a record, in which a newer version may have put more; None for one that is of something else."""
    if record.get("event") not in ("begin", "end"):
        return None
    known = {field.name: record[field.name] for field in fields(Attempt) if field.name in record}
    try:
        for name in ("hosts", "culprits"):
            known[name] = tuple(str(host) for host in known.get(name, ()))
        attempt = Attempt(**known)
    except TypeError:
        return None
    numbers = (attempt.restart, attempt.generation, attempt.began, attempt.start_step)
    is_one = isinstance(attempt.allocation, str) and all(isinstance(number, int | float) for number in numbers)
    return attempt if is_one else None
