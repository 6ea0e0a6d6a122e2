"""Saving: every rank writes its own file, and the checkpoint appears whole or not at all.

Knows the order of the steps and what each rank does in them. Must not know engines or what the state means. The only
thing asked of the disk is that all ranks see the same folder.
"""

import logging
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median_low
from typing import Any

from gptdist.checkpoint.digest import add_digests, render_digest
from gptdist.checkpoint.folder import (
    FILE_MODE,
    FOLDER_MODE,
    LATEST,
    commit,
    doom,
    free_step_path,
    regular_file_size,
    remove_rubbish,
    set_aside,
    step_folders,
    step_of,
    storage_error,
    temporary_path,
    trust_problem,
)
from gptdist.checkpoint.fragment import HostFragment, check_fragments
from gptdist.checkpoint.manifest import MANIFEST, FileEntry, FragmentEntry, Manifest, TensorEntry
from gptdist.checkpoint.read import Checkpoint
from gptdist.checkpoint.retention import Retention, prune
from gptdist.checkpoint.room import look_for_room
from gptdist.checkpoint.staging import (
    check_staging_room,
    copy_durably,
    forget_cached_pages,
    remove_staged,
    staged_file,
)
from gptdist.checkpoint.tensor_file import OnPhase, file_size, no_phase, read_fragment_places, write_tensor_file
from gptdist.checkpoint.verified import mark_verified
from gptdist.comms import Comms
from gptdist.durable import write_durably
from gptdist.errors import CheckpointError, GptdistError, StorageError

# A rank that takes so many times as long as most others, and so many seconds longer, is named.
SLOW_FACTOR = 3.0
SLOW_SECONDS = 1.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SaveOptions:
    """What a save does beyond writing. `protected`: checkpoints that retention must leave, asked on rank 0.
    `trust_others`: whoever loads them will not ask who owns them."""

    retention: Retention = field(default_factory=Retention)
    read_back: bool = False
    staging_dir: Path | None = None
    protected: Callable[[], Collection[Path]] = tuple
    trust_others: bool = False


def save_checkpoint(
    checkpoints_dir: Path,
    step: int,
    fragments: Iterable[HostFragment],
    state: dict[str, Any],
    comms: Comms,
    options: SaveOptions | None = None,
    *,
    on_phase: OnPhase = no_phase,
    on_written: Callable[[], None] = lambda: None,
) -> Path:
    """Save the fragments of all ranks and rank 0's `state` (JSON) as one checkpoint; its folder, on every rank.

    Every logical tensor must be there exactly once over all ranks; making `fragments` must not use collectives.
    `on_phase` hears what is done next, on every rank; `on_written`, that no rank needs its fragments any more.
    Raises on every rank, and leaves nothing, where any rank fails: StorageError for what the disk refuses. A checkpoint
    that was written but does not read back stays, as evidence, and is a StorageError too.
    """
    options = options or SaveOptions()
    on_phase("prepare")
    mine: list[HostFragment] = []
    with comms.together():
        mine = list(fragments)
        check_fragments(mine)
        if comms.is_first:
            Manifest(step, "", {}, {}, state).render()  # JSON cannot hold it? Then say so before writing anything.
            _prepare(checkpoints_dir)
    _check_room(checkpoints_dir, step, mine, comms, options)
    temporary = temporary_path(checkpoints_dir, step, comms.broadcast(secrets.token_hex(4)))
    try:
        on_phase("folder")
        with comms.together():
            if comms.is_first:
                _make_folder(temporary, options.trust_others)
        entries = _write_all(temporary, mine, comms, options.staging_dir, on_phase, on_written)
        on_phase("manifest")
        final = ""
        with comms.together():
            if comms.is_first:
                final = _commit(checkpoints_dir, step, temporary, entries, state, on_phase)
    except BaseException:
        # Whoever comes here first may be alone (a rank died): never wait for the others.
        if comms.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    path = checkpoints_dir / comms.broadcast(final)
    on_phase("latest")
    before = _point_latest(path) if comms.is_first else None
    if options.read_back:
        on_phase("read-back")
        _read_back(path, comms, before)
    on_phase("prune")
    if comms.is_first:
        _tidy(path, options)
    comms.barrier()
    return path


def set_aside_checkpoints(checkpoints_dir: Path, comms: Comms) -> Path | None:
    """For a run that starts anew in a used folder: move its checkpoints into a folder below, so that no later resume
    takes one of them for the new run's. That folder, on every rank; None where there was nothing to move."""
    moved: Path | None = None
    with comms.together():
        if comms.is_first:
            try:
                moved = set_aside(checkpoints_dir)
            except OSError as error:
                raise storage_error(error, checkpoints_dir, 0) from error
    name = comms.broadcast(None if moved is None else moved.name)
    return None if name is None else checkpoints_dir / name


def remove_checkpoints(checkpoints_dir: Path, from_step: int, comms: Comms) -> None:
    """For a run that goes back to before `from_step`: delete what it saved since, so that no later resume takes it up.
    Not while a save is under way."""
    with comms.together():
        if comms.is_first:
            try:
                for path in step_folders(checkpoints_dir):
                    if step_of(path) >= from_step:
                        doom(path)
            except OSError as error:
                raise storage_error(error, checkpoints_dir, 0) from error


def _prepare(checkpoints_dir: Path) -> None:
    try:
        checkpoints_dir.mkdir(parents=True, exist_ok=True)
        remove_rubbish(checkpoints_dir)
    except OSError as error:
        raise storage_error(error, checkpoints_dir, 0) from error


def _check_room(
    checkpoints_dir: Path, step: int, fragments: list[HostFragment], comms: Comms, options: SaveOptions
) -> None:
    """Raises StorageError, on all ranks, where the checkpoint does not fit."""
    sizes = comms.gather(file_size(fragments) if fragments else 0)
    with comms.together():
        try:
            if comms.is_first:
                room = look_for_room(checkpoints_dir, sum(sizes), options.retention)
                room.check(f"step {step}")
                if room.warning:
                    _log.warning("%s", room.warning)
            if options.staging_dir is not None:
                remove_staged(options.staging_dir, checkpoints_dir, comms.world)
                check_staging_room(options.staging_dir, sizes, comms.world)
        except OSError as error:
            raise storage_error(error, checkpoints_dir, 0) from error


def _make_folder(temporary: Path, trust_others: bool) -> None:
    try:
        temporary.mkdir(FOLDER_MODE)
    except OSError as error:
        raise storage_error(error, temporary, 0) from error
    # This process made it, so it is the file system that gives it to somebody else: as NFS does with root's files.
    problem = None if trust_others else trust_problem(temporary)
    if problem:
        _log.warning("what is saved here will be refused when it is to be resumed: %s", problem)


def _write_all(
    temporary: Path,
    fragments: list[HostFragment],
    comms: Comms,
    staging_dir: Path | None,
    on_phase: OnPhase,
    on_written: Callable[[], None],
) -> list[Any]:
    """Every rank's [file name, bytes, sha256, digests, seconds]; None for one that holds nothing and writes no file."""
    # None of the three may be left early by one rank: `on_written` lets training go on, and that must be all ranks'.
    entry: list[Any] | None = None
    name = f"rank-{comms.world.global_rank:05d}.safetensors"
    if staging_dir is None:
        with comms.together():
            entry = _write_mine(temporary / name, fragments, on_phase)
        on_phase("gather")
        entries = comms.gather(entry)
        on_written()
        _name_slow_ranks(entries, comms)
        return entries
    with staged_file(staging_dir, temporary.parent, name) as staged:
        with comms.together():
            entry = _write_mine(staged, fragments, on_phase)
        on_written()
        on_phase("copy-out")
        with comms.together():
            if entry is not None:
                _copy_out(staged, temporary / name, entry)
        on_phase("gather")
        entries = comms.gather(entry)
        _name_slow_ranks(entries, comms)
        return entries


def _write_mine(path: Path, fragments: list[HostFragment], on_phase: OnPhase) -> list[Any] | None:
    if not fragments:
        return None
    started = time.perf_counter()
    try:
        written = write_tensor_file(path, fragments, on_phase)
    except OSError as error:
        raise storage_error(error, path, file_size(fragments)) from error
    return [path.name, written.bytes, written.sha256, written.digests, time.perf_counter() - started]


def _name_slow_ranks(entries: list[Any], comms: Comms) -> None:
    """All wait for the slowest, so it is said who that is: a disk, a network or a node may be failing."""
    seconds = {global_rank: entry[4] for global_rank, entry in enumerate(entries) if entry is not None}
    if not comms.is_first or len(seconds) < 2:
        return
    usual = median_low(seconds.values())  # of two ranks the quicker one
    slow = {rank: took for rank, took in seconds.items() if took > SLOW_FACTOR * usual and took - usual > SLOW_SECONDS}
    for global_rank, took in sorted(slow.items()):
        _log.warning(
            "rank %d took %.1f s to write its %s bytes of a checkpoint, most others at most %.1f s: see to its node's "
            "disk and network",
            global_rank,
            took,
            f"{entries[global_rank][1]:,}",
            usual,
        )


def _copy_out(staged: Path, path: Path, entry: list[Any]) -> None:
    """The staged file to its place. What arrives is hashed as it was read, so a change on the way is noticed."""
    try:
        digest = copy_durably(staged, path)
    except OSError as error:
        raise storage_error(error, path, entry[1]) from error
    if digest != entry[2]:
        raise StorageError(
            f"{staged} changed after it was written: its sha256 was {entry[2][:16]}..., now it is {digest[:16]}.... "
            "The disk under checkpoint.staging_dir may be failing: set it to another."
        )
    entry[0] = path.name


def _commit(
    checkpoints_dir: Path,
    step: int,
    temporary: Path,
    entries: list[Any],
    state: dict[str, Any],
    on_phase: OnPhase,
) -> str:
    """Write the manifest of what all ranks wrote and give the folder its name, which is returned."""
    files = {
        entry[0]: FileEntry(entry[1], entry[2], global_rank)
        for global_rank, entry in enumerate(entries)
        if entry is not None
    }
    created = datetime.now(UTC).isoformat(timespec="seconds")
    digests = [entry[3] for entry in entries if entry is not None]
    manifest = Manifest(step, created, files, _gather_tensors(temporary, files, digests), state)
    try:
        manifest.check_cover()
    except CheckpointError as error:  # Not the user's: the ranks were told to save the wrong parts.
        raise GptdistError(f"step {step} was not saved: {error}") from error
    content = manifest.render()
    path = temporary / MANIFEST
    try:
        write_durably(path, content, FILE_MODE)
        on_phase("rename")
        final = free_step_path(checkpoints_dir, step)
        commit(temporary, final)
    except OSError as error:
        raise storage_error(error, path, len(content)) from error
    return final.name


def _gather_tensors(
    temporary: Path, files: dict[str, FileEntry], digests: list[dict[str, int]]
) -> dict[str, TensorEntry]:
    """The logical tensors in the files just written, from their headers: what is on disk, not what was sent."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    parts: dict[str, list[FragmentEntry]] = {}
    for file, entry in files.items():
        size = regular_file_size(temporary / file)
        if size != entry.bytes:
            raise GptdistError(
                f"rank {entry.global_rank} wrote {entry.bytes} bytes to {temporary / file}, but rank 0 sees "
                f"{'no such file' if size is None else f'{size} bytes'}. "
                "All ranks must share the checkpoint folder: set checkpoint.dir to one that every node mounts."
            )
        for stored in read_fragment_places(temporary / file):
            first = shapes.setdefault(stored.name, (stored.shape, stored.dtype))
            if first != (stored.shape, stored.dtype):
                raise GptdistError(
                    f"ranks disagree on tensor {stored.name}: {first[1]} {list(first[0])}, but rank "
                    f"{entry.global_rank} has {stored.dtype} {list(stored.shape)}"
                )
            parts.setdefault(stored.name, []).append(FragmentEntry(file, stored.key, stored.box))
    return {
        name: TensorEntry(
            shape, dtype, _digest_of(name, digests), tuple(sorted(parts[name], key=lambda part: part.box.start))
        )
        for name, (shape, dtype) in shapes.items()
    }


def _digest_of(name: str, digests: list[dict[str, int]]) -> str:
    return render_digest(add_digests(by_rank.get(name, 0) for by_rank in digests))


def _point_latest(path: Path) -> str | None:
    """`latest` names the new checkpoint; what it named before. The checkpoint is safe by now: nothing here fails it."""
    latest = path.parent / LATEST
    try:
        before = latest.read_text() if latest.is_file() else None
        write_durably(latest, f"{path.name}\n".encode())
        return before
    except (OSError, ValueError) as error:
        _log.warning("%s is saved, but %s cannot be written: %s", path, latest, error)
        return None


def _read_back(path: Path, comms: Comms, latest_before: str | None) -> None:
    """Hash every byte that was committed, shared out over ranks, and mark the checkpoint. Raises StorageError."""
    # Trusted: this run wrote it a moment ago, and a umask that lets others write is no fault of the disk.
    mine = path / f"rank-{comms.world.global_rank:05d}.safetensors"
    forget_cached_pages(mine)
    comms.barrier()
    try:
        with Checkpoint.open(path, verify=True, comms=comms, trust_others=True) as checkpoint:
            manifest = checkpoint.manifest
    except CheckpointError as error:
        if comms.is_first and latest_before is not None:
            with suppress(OSError):
                write_durably(path.parent / LATEST, latest_before.encode())
        raise StorageError(
            f"{path} was saved, but does not read back as it was written: {error}. It stays as evidence, and no resume "
            "will take it. The disk or the network to it may be failing: check it, or set checkpoint.dir to another."
        ) from error
    if comms.is_first:
        try:
            mark_verified(path, manifest)
        except OSError as error:
            _log.warning("%s is good, but cannot be marked as verified: %s", path, error)


def _tidy(path: Path, options: SaveOptions) -> None:
    """What follows a commit. The checkpoint is safe by now, so nothing here may fail the save."""
    try:
        prune(path.parent, path, options.retention, options.protected())
    except OSError as error:
        _log.warning("%s is saved, but tidying %s failed: %s", path, path.parent, error)
