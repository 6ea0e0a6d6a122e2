"""One run in one folder: whoever leads a run holds its folder until it ends, however it ends.

Knows files and locks, nothing of runs. The lock is the kernel's, on a file that says who holds it, so that it cannot
outlive its holder: not a kill, not a power cut. Between the nodes of a cluster it counts where the shared file system
passes locks on, as NFS, Lustre (mounted with `flock`), GPFS and CephFS do; where one says that it does not, the run
goes on with a warning.
"""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gptdist.errors import LaunchError

LOCK_FILE = ".lock"
POLL_SECONDS = 1.0
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def hold_run(run_dir: Path, job: str, patience_seconds: float = 0.0) -> Iterator[int | None]:
    """Hold the folder; gives the lock's file descriptor, which must not be inherited. `job`: what to name it by.

    `patience_seconds`: to wait for another holder. A machine that was lost holds it until the file server gives that
    machine up, which takes NFS and Lustre a minute or two.

    None where the folder cannot be made or written: what that means for the run is not for this to say. Nothing stays
    behind. Raises LaunchError where another run holds it.
    """
    made = _missing_folders(run_dir)
    fd = _open_locked(run_dir, job, patience_seconds)
    try:
        yield fd
    finally:
        if fd is not None:
            with suppress(OSError):
                (run_dir / LOCK_FILE).unlink()  # while it is held, so that it cannot be another's
            os.close(fd)
        for folder in made:
            with suppress(OSError):
                folder.rmdir()  # of a run that left nothing in it


def holder_is_alive(run_dir: Path) -> bool | None:
    """Whether the process that holds the folder, or held it last and was killed, runs; None where that cannot be told
    from this machine. Takes no lock, so that looking hinders nobody."""
    try:
        holder = json.loads((run_dir / LOCK_FILE).read_bytes()[:4096])
        if holder["host"] != socket.gethostname():
            return None
        pid = int(holder["pid"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    try:
        # Not a zombie: the init process of a container may never reap.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False if Path("/proc/self/stat").exists() else None


def _missing_folders(run_dir: Path) -> list[Path]:
    """The innermost first."""
    missing = []
    for folder in (run_dir, *run_dir.parents):
        if folder.exists():
            break
        missing.append(folder)
    return missing


def _open_locked(run_dir: Path, job: str, patience_seconds: float) -> int | None:
    path, deadline, told = run_dir / LOCK_FILE, time.monotonic() + patience_seconds, False
    while True:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError:
            return None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_there(fd, path):  # its last holder has removed it in the meantime
                os.close(fd)
                continue
            _write_holder(fd, job)
            return fd
        except BlockingIOError:
            holder = _read_holder(fd)
            os.close(fd)
            if time.monotonic() >= deadline:
                raise LaunchError(_refusal(run_dir, holder)) from None
            if not told:
                _say(f"waiting up to {patience_seconds:.0f} s for {run_dir}, which {_who(holder)} holds")
            told = True
            time.sleep(min(POLL_SECONDS, patience_seconds))
        except OSError as error:
            os.close(fd)
            if error.errno not in _NO_LOCKS:
                return None
            _say(f"warning: {run_dir} is on a file system without locks; take care that no other run uses it.")
            return None


def _is_there(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _write_holder(fd: int, job: str) -> None:
    holder = {"host": socket.gethostname(), "pid": os.getpid(), "job": job, "since": time.time()}
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(holder).encode(), 0)


def _read_holder(fd: int) -> dict[str, Any]:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except (ValueError, OSError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _refusal(run_dir: Path, holder: dict[str, Any]) -> str:
    return (
        f"{run_dir} is in use by {_who(holder)}; two runs in one folder would overwrite each other's checkpoints. Wait "
        "for it or end it (`gptdist stop`), or set launch.run_dir to another folder."
    )


def _who(holder: dict[str, Any]) -> str:
    if not holder:
        return "another run"
    return f"the run on {holder.get('host')}, process {holder.get('pid')} ({holder.get('job')})"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
