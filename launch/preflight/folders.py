"""Whether a node can write where the run will, and sees what the first node wrote there.

Knows files. Whose fault it is where one cannot is `judge.py`'s to say. Every file made here is gone afterwards.
"""

import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from gptdist.checkpoint.folder import free_bytes
from gptdist.config.sections import RunConfig
from gptdist.model.parameters import parameter_count
from launch.preflight.judge import Complaint, Severity

SHARED_SECONDS = 5.0
"""How long a new file may take to be seen on other nodes; file systems differ, and cache what they know of a folder."""
LITTLE_BYTES = 1 << 30
"""Less room than this for what can make do with any is worth a warning."""
PROBE_BYTES = 64 << 10
STALE_SECONDS = 3600.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Mark:
    """A file that the first rank wrote for all nodes to see; where, as seen from the run's folder."""

    relative: str
    token: str

    def path(self, run_dir: Path) -> Path:
        return Path(os.path.normpath(run_dir.absolute() / self.relative))


@contextmanager
def mark_left(run_dir: Path) -> Iterator[Mark | None]:
    """The first rank's part: a file in the run's folder, or above it where that is yet to be made.

    None where none can be written: then so it is told by each node of itself.
    """
    token = secrets.token_hex(16)
    folder = _existing(run_dir)
    path = folder / f".preflight-{token[:8]}"
    with suppress(OSError):
        for stale in folder.glob(".preflight-*"):  # of a run that was killed
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                stale.unlink()
    mark: Mark | None = Mark(os.path.relpath(path, run_dir.absolute()), token)
    try:
        try:
            path.write_text(token)
        except OSError:
            mark = None
        yield mark
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def look_for_mark(mark: Mark, run_dir: Path) -> Complaint | None:
    """Another node's part: read it, retrying for SHARED_SECONDS."""
    path = mark.path(run_dir)
    deadline = time.monotonic() + SHARED_SECONDS
    while True:
        with suppress(OSError):
            if path.read_text() == mark.token:
                return None
        if time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    text = (
        f"launch.run_dir ({run_dir}): what the first node writes is not seen here within {SHARED_SECONDS:g} s. Set it "
        "to a folder on a file system that all nodes share, by a path that is the same on all"
    )
    return Complaint("shared folder", text, spares_first=True)


def check_run_dir(run_dir: Path) -> Complaint | None:
    """Whether this node can write there."""
    problem = _write_probe(_existing(run_dir))
    return Complaint("run folder", f"launch.run_dir ({run_dir}): {problem}") if problem else None


def check_scratch(config: RunConfig, nodes: int) -> list[Complaint]:
    """The folders on the node's own disk: can they be written, have they room?"""
    complaints = []
    staging, cache = config.checkpoint.staging_dir, config.data.cache_dir
    if staging is not None:
        needed = 12 * parameter_count(config.model) // nodes  # weights and two moments, 4 bytes each
        complaints.append(_check_room("checkpoint.staging_dir", Path(staging), needed))
    if cache is not None:
        complaints.append(_check_room("data.cache_dir", Path(cache), LITTLE_BYTES, Severity.WARNING))
    return [complaint for complaint in complaints if complaint is not None]


def _check_room(setting: str, folder: Path, needed: int, little: Severity = Severity.BROKEN) -> Complaint | None:
    problem = _write_probe(_existing(folder))
    if problem:
        return Complaint("scratch", f"{setting} ({folder}): {problem}")
    free = free_bytes(folder)
    if free >= needed:
        return None
    text = f"{setting} ({folder}): {free:,} bytes are free, and {needed:,} are wanted. Free some space"
    return Complaint("scratch", text, little, Severity.SETUP if little is Severity.BROKEN else little)


def _existing(folder: Path) -> Path:
    """What is there of it: the folder itself, or the nearest above; a file in its place is found too, and refuses."""
    return next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))


def _write_probe(folder: Path) -> str:
    """Why a file cannot be written there; empty where it can."""
    path = folder / f".preflight-{secrets.token_hex(8)}"
    try:
        with path.open("wb") as file:
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"cannot be written: {error.strerror or error}"
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
    return ""
