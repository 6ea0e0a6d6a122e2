"""The folder of a submitted run: its code, settings and batch script, as they were when it was submitted.

Knows files and names. What stands in the script is `job_script.py`'s, what is asked of Slurm `submit.py`'s.
"""

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from gptdist.durable import sync_folder, write_durably
from gptdist.errors import StorageError

SOURCE = Path(__file__).resolve().parents[2]
PACKAGES = ("gptdist", "launch", "data_tools", "slurm")
CODE = "code"
KEY = ".key"
SCRIPT = "job.sbatch"
FOLDERS = ("logs", "checkpoints", "tensorboard")
PRIVATE = frozenset({KEY, "job.yaml"})
"""For the owner's eyes: agents of a run know each other by the key, and a corpus's URL may hold a password."""

_MAIN = '''"""The gptdist command of this copy of its code: python FOLDER train CONFIG, and so on."""

import sys

from launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
'''


@contextmanager
def new_job_folder(run_dir: Path, files: Mapping[str, str]) -> Iterator[None]:
    """Within it, `run_dir` holds a copy of the code, a new key and `files`, for a job to be submitted.

    Of a run that was there before, code and files are replaced, and all else stays. Where the block fails, what was
    made is removed again. Raises StorageError.
    """
    made = _first_missing(run_dir)
    try:
        _fill(run_dir, files)
        yield
    except BaseException as error:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError):
            raise StorageError(
                f"cannot write the run's folder {run_dir}: {error.strerror or error}. Name another with --run-dir, on "
                "a disk with room that all nodes share."
            ) from error
        raise


def _fill(run_dir: Path, files: Mapping[str, str]) -> None:
    for name in FOLDERS:
        (run_dir / name).mkdir(parents=True, exist_ok=True)
    _copy_code(run_dir / CODE)
    for name, text in {KEY: secrets.token_hex(32) + "\n", **files}.items():
        write_durably(run_dir / name, text.encode(), mode=0o600 if name in PRIVATE else 0o666)


def _copy_code(code: Path) -> None:
    """A copy under a name of its own first: nobody ever imports half of it."""
    for left_over in code.parent.glob(f".*-{CODE}-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    mark = secrets.token_hex(4)
    copy, old = code.with_name(f".new-{CODE}-{mark}"), code.with_name(f".old-{CODE}-{mark}")
    try:
        for package in PACKAGES:
            shutil.copytree(SOURCE / package, copy / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        (copy / "__main__.py").write_text(_MAIN, encoding="utf-8")
        if code.exists():
            os.rename(code, old)
        os.rename(copy, code)
        sync_folder(code.parent)
    finally:
        for folder in (copy, old):
            shutil.rmtree(folder, ignore_errors=True)


def _first_missing(folder: Path) -> Path | None:
    """The outermost folder that has to be made for `folder`; None where it is there."""
    missing = None
    while not folder.exists():
        missing, folder = folder, folder.parent
    return missing
