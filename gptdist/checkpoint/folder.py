"""The folder of checkpoints: names, durable writes, and steps that make a change appear whole or not at all.

Knows the file system. Must not know what is inside a checkpoint, torch, or how many ranks there are.
`step-00000400` is a finished checkpoint; one saved again at the same step is `step-00000400.1`, so that no folder is
ever reused. `.tmp-step-...` is one being written, `.doomed-step-...` one being deleted; after a crash both are rubbish.
"""

import errno
import hashlib
import os
import pwd
import re
import shutil
import stat
from itertools import count
from pathlib import Path

from gptdist.durable import sync_folder
from gptdist.errors import StorageError

LATEST = "latest"
FOLDER_MODE = 0o775
FILE_MODE = 0o664
"""Of what is written, before the umask: where there is none, every user could write it, and it would be refused."""
_STEP_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_TEMPORARY = ".tmp-"
_DOOMED = ".doomed-"
_TRUST = (
    "Where you know that nobody else changed it, set its owner and mode right, or allow it: "
    "checkpoint.trust_others: true, or --trust-others."
)


def parse_step(folder_name: str) -> tuple[int, int] | None:
    """(step, how often it was saved again) of a finished checkpoint's folder name; None for any other name."""
    found = _STEP_NAME.fullmatch(folder_name)
    return (int(found[1]), int(found[2] or 0)) if found else None


def step_of(path: Path) -> int:
    """The step of a finished checkpoint's folder; -1 for one of any other name."""
    parsed = parse_step(path.name)
    return parsed[0] if parsed else -1


def step_folders(checkpoints_dir: Path) -> list[Path]:
    """Folders of finished checkpoints, newest first."""
    found = [
        (parsed, path) for path in checkpoints_dir.iterdir() if (parsed := parse_step(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def temporary_path(checkpoints_dir: Path, step: int, token: str) -> Path:
    """Where a checkpoint is written before it is committed. `token` is the same on all ranks, new for each save."""
    return checkpoints_dir / f"{_TEMPORARY}step-{step:08d}-{token}"


def free_step_path(checkpoints_dir: Path, step: int) -> Path:
    """A name for the finished checkpoint that no folder has had while any folder of that step is still there."""
    names = [parsed for path in checkpoints_dir.iterdir() if (parsed := parse_step(path.name))]
    taken = [again for other, again in names if other == step]
    name = f"step-{step:08d}"
    return checkpoints_dir / (f"{name}.{max(taken) + 1}" if taken else name)


def commit(temporary: Path, final: Path) -> None:
    """Make a fully written folder the checkpoint `final`, durably. Its files must have been fsynced."""
    sync_folder(temporary)
    os.rename(temporary, final)
    sync_folder(final.parent)


def doom(folder: Path) -> None:
    """Delete a folder so that a crash half-way leaves nothing that looks like a checkpoint; of a link, the link."""
    if folder.is_symlink():
        folder.unlink()
        return
    doomed = folder.with_name(_DOOMED + folder.name)
    if doomed.exists():
        shutil.rmtree(doomed)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def set_aside(checkpoints_dir: Path) -> Path | None:
    """Move all finished checkpoints into a new folder below, where nothing finds or prunes them; None for none."""
    found = step_folders(checkpoints_dir) if checkpoints_dir.is_dir() else []
    if not found:
        return None
    aside = next(path for n in count(1) if not (path := checkpoints_dir / f"set-aside-{n}").exists())
    aside.mkdir()
    for path in found:
        os.rename(path, aside / path.name)
    (checkpoints_dir / LATEST).unlink(missing_ok=True)
    sync_folder(aside)
    sync_folder(checkpoints_dir)
    return aside


def remove_rubbish(checkpoints_dir: Path) -> None:
    """Delete what crashed saves and deletions left. Only safe while nobody saves into `checkpoints_dir`."""
    for path in _rubbish(checkpoints_dir):
        shutil.rmtree(path, ignore_errors=True)


def rubbish_bytes(checkpoints_dir: Path) -> int:
    """What `remove_rubbish` would free: a save that was killed can have left nearly a whole checkpoint."""
    if not checkpoints_dir.is_dir():
        return 0
    files = (file for path in _rubbish(checkpoints_dir) for file in path.iterdir())
    return sum(regular_file_size(file) or 0 for file in files)


def _rubbish(checkpoints_dir: Path) -> list[Path]:
    return [
        path
        for path in checkpoints_dir.iterdir()
        if path.name.startswith((_TEMPORARY + "step-", _DOOMED + "step-")) and path.is_dir() and not path.is_symlink()
    ]


def regular_file_size(path: Path) -> int | None:
    """Bytes of a regular file; None where there is none, or a link (which could lead anywhere)."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def file_problem(path: Path, size: int, sha256: str | None) -> str | None:
    """None where the file is there with that size and, unless None, that sha256; else what is wrong, for people."""
    found = regular_file_size(path)
    if found is None:
        return f"{path} is missing, or no regular file"
    if found != size:
        return f"{path} has {found:,} bytes, the manifest says {size:,}"
    if sha256 is None:
        return None
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"cannot read {path}: {error.strerror or error}"
    return None if digest == sha256 else f"{path} has sha256 {digest[:16]}..., the manifest says {sha256[:16]}..."


def trust_problem(path: Path) -> str | None:
    """Why what is at `path` may be somebody else's doing: its owner is neither this user nor root, or all may write.

    None where nothing speaks against it, or nothing is there.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    if status.st_uid not in (0, os.geteuid()):
        return f"{path} belongs to {_user_name(status.st_uid)}, neither to this user nor to root. {_TRUST}"
    if status.st_mode & stat.S_IWOTH:
        return f"{path} can be written by every user (mode {stat.S_IMODE(status.st_mode):o}). {_TRUST}"
    return None


def _user_name(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"


def free_bytes(path: Path) -> int:
    """Room on the disk where `path` is or would be made."""
    existing = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), Path("/"))
    return shutil.disk_usage(existing).free


def storage_error(error: OSError, path: Path, needed_bytes: int) -> StorageError:
    """The error to raise for `error`, met while writing `needed_bytes` to `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = free_bytes(path)
        limit = "the disk is full" if error.errno == errno.ENOSPC else "the quota is used up"
        return StorageError(
            f"cannot write {path}: {limit}. This file needs {needed_bytes:,} bytes, {free:,} are free. "
            "Free some space, lower checkpoint.keep, or set checkpoint.dir to a larger disk."
        )
    return StorageError(
        f"cannot write {path}: {error.strerror or error}. Set checkpoint.dir to a folder that this user can write."
    )
