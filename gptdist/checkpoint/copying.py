"""Whole checkpoints to and from a URL, or another folder: every byte hashed where it is read, the manifest last.

Knows folders, manifests and remote folders. Must not know torch or engines. A checkpoint behind a URL is complete where
its manifest is there; ranks share out the files.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptdist.checkpoint.folder import (
    FILE_MODE,
    FOLDER_MODE,
    commit,
    file_problem,
    free_step_path,
    parse_step,
    remove_rubbish,
    storage_error,
    temporary_path,
)
from gptdist.checkpoint.listing import check_step_name
from gptdist.checkpoint.manifest import MANIFEST, Manifest, load_manifest, parse_manifest
from gptdist.checkpoint.retention import Retention
from gptdist.checkpoint.room import look_for_room
from gptdist.checkpoint.staging import copy_durably
from gptdist.checkpoint.verified import mark_verified
from gptdist.comms import Comms
from gptdist.durable import write_durably
from gptdist.errors import CheckpointError, RemoteFailed, StorageError
from gptdist.remote import RemoteFolder
from gptdist.world import World

ONE_RANK = Comms(World())
_Get = Callable[[str, Path], None]


@dataclass(frozen=True)
class _RemoteFile:
    file: str
    bytes: int
    sha256: str


def upload_checkpoint(path: Path, remote: RemoteFolder, name: str, comms: Comms = ONE_RANK) -> None:
    """Copy a finished checkpoint to `name` in `remote`, by all ranks. Raises the same error on all."""
    manifest: Manifest | None = None
    with comms.together():
        manifest = load_manifest(path)
        if comms.is_first:
            # What is there under this name is complete no more, from its first file on.
            remote.remove(f"{name}/{MANIFEST}")
    assert manifest is not None
    with comms.together():
        for file in _share(manifest, comms.world):
            problem = file_problem(path / file, manifest.files[file].bytes, manifest.files[file].sha256)
            if problem:
                raise CheckpointError(problem)
            remote.upload(path / file, f"{name}/{file}")
    with comms.together():
        if comms.is_first:
            remote.write(f"{name}/{MANIFEST}", (path / MANIFEST).read_bytes())
            if not (path / MANIFEST).exists():  # the run has gone back to before it; see `withdraw_checkpoints`
                remote.remove(f"{name}/{MANIFEST}")
                raise CheckpointError(f"{path} was deleted while it was uploaded.")


def withdraw_checkpoints(remote: RemoteFolder, from_step: int) -> list[str]:
    """For a run that goes back to before `from_step`: what it uploaded since is complete no more, so that no later
    resume takes it up. Their names. To be called once they are deleted here: then an upload under way notices."""
    names = [name for name in complete_checkpoints(remote) if (parse_step(name) or (-1, 0))[0] >= from_step]
    for name in names:
        remote.remove(f"{name}/{MANIFEST}")
    return names


def complete_checkpoints(remote: RemoteFolder) -> list[str]:
    """Names of the complete checkpoints in a remote folder, newest first."""
    found = sorted(((parsed, name) for name in remote.names() if (parsed := parse_step(name))), reverse=True)
    return [name for _, name in found if MANIFEST in remote.below(name).names()]


def fetch_newest(remote: RemoteFolder, checkpoints_dir: Path, comms: Comms) -> tuple[Path | None, list[str]]:
    """The newest complete checkpoint behind the URL that verifies, now a folder here; None where there is none at all.

    And a line of reason for each that was passed over. The same on all ranks.
    """
    names: list[str] = []
    with comms.together():
        if comms.is_first:
            names = complete_checkpoints(remote)
            if checkpoints_dir.is_dir():
                remove_rubbish(checkpoints_dir)  # a start that was killed may have left most of a checkpoint
    skipped: list[str] = []
    for name in comms.broadcast(names):
        try:
            return fetch_checkpoint(remote, name, checkpoints_dir, comms), skipped
        except (CheckpointError, RemoteFailed) as error:
            skipped.append(f"{remote.shown(name)}: {error}")
    return None, skipped


def fetch_checkpoint(
    remote: RemoteFolder, name: str, checkpoints_dir: Path, comms: Comms = ONE_RANK, final: Path | None = None
) -> Path:
    """Copy checkpoint `name` of `remote` into a folder of its own below `checkpoints_dir`, by all ranks; its path.

    `final`: the folder's name; None: a free one of its step. It appears whole, every byte verified, or not at all.
    """
    content: bytes | None = None
    with comms.together():
        if comms.is_first:
            content = remote.read(f"{name}/{MANIFEST}")
    text = comms.broadcast(None if content is None else content.decode())
    manifest = _parsed(text.encode(), remote.shown(f"{name}/{MANIFEST}"))

    def get(file: str, target: Path) -> None:
        entry = manifest.files[file]
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        try:
            remote.download(_RemoteFile(f"{name}/{file}", entry.bytes, entry.sha256), descriptor)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    return _assemble(manifest, get, text.encode(), checkpoints_dir, final, comms)


def copy_checkpoint(source: Path, final: Path) -> Path:
    """Copy a checkpoint folder to the new folder `final`, verified on the way."""
    manifest = load_manifest(source)

    def get(file: str, target: Path) -> None:
        digest = copy_durably(source / file, target)
        if digest != manifest.files[file].sha256:
            raise CheckpointError(f"{source / file} has sha256 {digest[:16]}..., not the manifest's.")

    return _assemble(manifest, get, (source / MANIFEST).read_bytes(), final.parent, final, ONE_RANK)


def _assemble(
    manifest: Manifest,
    get: _Get,
    content: bytes,
    checkpoints_dir: Path,
    final: Path | None,
    comms: Comms,
) -> Path:
    """A folder of the files that `get` brings, the manifest last, then its name."""
    temporary = temporary_path(checkpoints_dir, manifest.step, comms.broadcast(secrets.token_hex(4)))
    try:
        with comms.together():
            if comms.is_first:
                if final is not None:
                    _check_final(final, manifest)
                try:
                    look_for_room(checkpoints_dir, manifest.total_bytes, Retention()).check(f"step {manifest.step}")
                    checkpoints_dir.mkdir(parents=True, exist_ok=True)
                    temporary.mkdir(FOLDER_MODE)
                except OSError as error:
                    raise storage_error(error, temporary, 0) from error
        with comms.together():
            for file in _share(manifest, comms.world):
                try:
                    get(file, temporary / file)
                except OSError as error:
                    raise storage_error(error, temporary / file, manifest.files[file].bytes) from error
        name = ""
        with comms.together():
            if comms.is_first:
                try:
                    write_durably(temporary / MANIFEST, content, FILE_MODE)
                    mark_verified(temporary, manifest)
                    path = final or free_step_path(checkpoints_dir, manifest.step)
                    commit(temporary, path)
                except OSError as error:
                    raise storage_error(error, temporary, len(content)) from error
                name = path.name
    except BaseException:
        if comms.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    return checkpoints_dir / comms.broadcast(name)


def _check_final(final: Path, manifest: Manifest) -> None:
    check_step_name(final, manifest)
    if final.exists() or final.is_symlink():
        raise StorageError(f"{final} is already there. Give another name, or delete it.")


def _parsed(content: bytes, shown: str) -> Manifest:
    try:
        return parse_manifest(content)
    except CheckpointError as error:
        raise CheckpointError(f"{shown}: {error}") from None


def _share(manifest: Manifest, world: World) -> Iterator[str]:
    """This rank's files, dealt round by size, so that each rank copies about as many bytes."""
    by_size = sorted(manifest.files, key=lambda file: (manifest.files[file].bytes, file))
    yield from by_size[world.global_rank :: world.world_size]
