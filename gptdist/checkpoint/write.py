"""Saving: every rank writes its own file, and the checkpoint appears whole or not at all.

Knows the order of the steps and what each rank does in them. Must not know engines or what the state means. The only
thing asked of the disk is that all ranks see the same folder.
"""

import logging
import secrets
import shutil
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gptdist.checkpoint.digest import add_digests, render_digest
from gptdist.checkpoint.folder import (
    LATEST,
    commit,
    free_step_path,
    regular_file_size,
    remove_rubbish,
    set_aside,
    storage_error,
    temporary_path,
)
from gptdist.checkpoint.fragment import HostFragment, check_fragments
from gptdist.checkpoint.listing import prune
from gptdist.checkpoint.manifest import MANIFEST, FileEntry, FragmentEntry, Manifest, TensorEntry
from gptdist.checkpoint.tensor_file import file_size, read_fragment_places, write_tensor_file
from gptdist.comms import Comms
from gptdist.durable import write_durably
from gptdist.errors import CheckpointError, GptdistError

_log = logging.getLogger(__name__)


def save_checkpoint(
    checkpoints_dir: Path,
    step: int,
    fragments: Iterable[HostFragment],
    state: dict[str, Any],
    comms: Comms,
    keep: int | None = None,
) -> Path:
    """Save the fragments of all ranks and rank 0's `state` (JSON) as one checkpoint; its folder, on every rank.

    Every logical tensor must be there exactly once over all ranks; making `fragments` must not use collectives.
    `keep`: how many of the newest to keep; None: all.
    Raises on every rank, and leaves nothing, where any rank fails: StorageError for what the disk refuses.
    """
    mine: list[HostFragment] = []
    with comms.together():
        mine = list(fragments)
        check_fragments(mine)
        if comms.is_first:
            Manifest(step, "", {}, {}, state).render()  # JSON cannot hold it? Then say so before writing anything.
            _prepare(checkpoints_dir)
    temporary = temporary_path(checkpoints_dir, step, comms.broadcast(secrets.token_hex(4)))
    try:
        with comms.together():
            if comms.is_first:
                _make_folder(temporary)
        entry: list[Any] | None = None
        with comms.together():
            entry = _write_mine(temporary, mine, comms.world.global_rank)
        entries = comms.gather(entry)
        final = ""
        with comms.together():
            if comms.is_first:
                final = _commit(checkpoints_dir, step, temporary, entries, state)
    except BaseException:
        # Whoever comes here first may be alone (a rank died): never wait for the others.
        if comms.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    path = checkpoints_dir / comms.broadcast(final)
    if comms.is_first:
        _tidy(path, keep)
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


def _prepare(checkpoints_dir: Path) -> None:
    try:
        checkpoints_dir.mkdir(parents=True, exist_ok=True)
        remove_rubbish(checkpoints_dir)
    except OSError as error:
        raise storage_error(error, checkpoints_dir, 0) from error


def _make_folder(temporary: Path) -> None:
    try:
        temporary.mkdir()
    except OSError as error:
        raise storage_error(error, temporary, 0) from error


def _write_mine(temporary: Path, fragments: list[HostFragment], global_rank: int) -> list[Any] | None:
    """[file name, bytes, sha256, digests]; None for a rank that holds nothing of its own, which writes no file."""
    if not fragments:
        return None
    path = temporary / f"rank-{global_rank:05d}.safetensors"
    try:
        written = write_tensor_file(path, fragments)
    except OSError as error:
        raise storage_error(error, path, file_size(fragments)) from error
    return [path.name, written.bytes, written.sha256, written.digests]


def _commit(checkpoints_dir: Path, step: int, temporary: Path, entries: list[Any], state: dict[str, Any]) -> str:
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
        write_durably(path, content)
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


def _tidy(path: Path, keep: int | None) -> None:
    """What follows a commit. The checkpoint is safe by now, so nothing here may fail the save."""
    try:
        write_durably(path.parent / LATEST, f"{path.name}\n".encode())
        prune(path.parent, path, keep)
    except OSError as error:
        _log.warning("%s is saved, but tidying %s failed: %s", path, path.parent, error)
