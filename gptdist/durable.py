"""Files that appear whole or not at all, and are still there after a power cut.

Knows the file system and nothing of what is written.
"""

import errno
import os
from pathlib import Path


def write_durably(path: Path, content: bytes, mode: int = 0o666, temporary: Path | None = None) -> None:
    """Write a small file: into a temporary neighbour, fsync, rename, fsync of the folder.

    Where several processes may write the same file, each names a `temporary` of its own.
    """
    temporary = temporary or path.with_name(f".tmp-{path.name}")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder and say so; their renames are synchronous.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
