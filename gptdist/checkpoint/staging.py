"""A rank's file on the node's own disk, on its way to the folder of checkpoints; and copying it there, hashed.

Knows files and folders. Must not know what is in them, or when which rank does what.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from gptdist.checkpoint.folder import FILE_MODE, free_bytes
from gptdist.errors import StorageError
from gptdist.world import World

_CHUNK_BYTES = 8 << 20


@contextmanager
def staged_file(staging_dir: Path, checkpoints_dir: Path, name: str) -> Iterator[Path]:
    """A path for one file, which is gone afterwards.

    The name is the same for every save of this rank into `checkpoints_dir`, so what a crash left is found and removed.
    """
    path = staging_dir / f"{_prefix(checkpoints_dir)}{name}"
    with suppress(OSError):  # if it stays, writing will say why
        staging_dir.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
    try:
        yield path
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def remove_staged(staging_dir: Path, checkpoints_dir: Path, world: World) -> None:
    """Delete what a crash left on this node, perhaps by ranks that are elsewhere now. Only while no rank stages."""
    if world.local_rank == 0 and staging_dir.is_dir():
        for path in staging_dir.iterdir():
            if path.name.startswith(_prefix(checkpoints_dir)):
                with suppress(OSError):  # if it stays, writing will say why
                    path.unlink()


def check_staging_room(staging_dir: Path, sizes: Sequence[int], world: World) -> None:
    """Raises StorageError where the files of this node's ranks do not fit. `sizes`: of every rank's file."""
    first = world.global_rank - world.local_rank
    needed, free = sum(sizes[first : first + world.local_world_size]), free_bytes(staging_dir)
    if world.local_rank == 0 and free < needed:
        raise StorageError(
            f"checkpoint.staging_dir ({staging_dir}) has room for {free:,} bytes, the files of this node need "
            f"{needed:,}. Free some space, set it to a larger disk, or leave it out."
        )


def _prefix(checkpoints_dir: Path) -> str:
    run = hashlib.sha256(os.fsencode(checkpoints_dir.resolve())).hexdigest()[:12]
    return f"gptdist-{run}-"


def copy_durably(source: Path, target: Path) -> str:
    """Copy into a new file, synced; the sha256 of what was read from `source`. Raises OSError."""
    digest = hashlib.sha256()
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    try:
        with source.open("rb", buffering=0) as file:
            chunk = bytearray(_CHUNK_BYTES)
            while count := file.readinto(chunk):
                content = memoryview(chunk)[:count]
                digest.update(content)
                while content:
                    content = content[os.write(descriptor, content) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return digest.hexdigest()


def forget_cached_pages(path: Path) -> None:
    """Ask that the next reading of a file comes from the disk and not from memory. Only a request: never fails."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        with suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
