"""Damage to finished checkpoints: flipped bits, truncations, files that are gone or have changed places.

Each is done to one of two checkpoints, must be found with the name of what is wrong, and must make a resume fall back
to the other. What was damaged is mended again, and must then load: so that it was the damage that was found.
"""

import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from gptdist.checkpoint.folder import step_folders
from gptdist.checkpoint.manifest import MANIFEST
from gptdist.checkpoint.read import Checkpoint, find_latest
from gptdist.errors import CheckpointError
from launch.drills.certificate import Finding

Strike = tuple[str, Callable[[], None]]
"""The file that was struck, and what mends it."""


def damage(checkpoints_dir: Path, flips: int, truncations: int, seed: int) -> Iterator[Finding]:
    """All kinds of damage to the newest of at least two checkpoints of `checkpoints_dir`."""
    draw = random.Random(seed)
    newest = step_folders(checkpoints_dir)[0]
    files = sorted(path for path in newest.iterdir() if path.name == MANIFEST or path.suffix == ".safetensors")
    tensors = [path for path in files if path.name != MANIFEST]

    def flip() -> Strike:
        path = draw.choice(files)
        return _flip(path, draw.randrange(8 * path.stat().st_size))

    def truncate() -> Strike:
        path = draw.choice(files)
        return _truncate(path, draw.randrange(path.stat().st_size))

    yield _tried(checkpoints_dir, "one flipped bit", [flip] * flips)
    yield _tried(checkpoints_dir, "a truncated file", [truncate] * truncations)
    yield _tried(checkpoints_dir, "a deleted file", [partial(_delete, path) for path in files])
    yield _tried(checkpoints_dir, "two files swapped", [partial(_swap, tensors[0], tensors[1])])
    older = step_folders(checkpoints_dir)[1]
    others = [partial(_replace, path, older / path.name) for path in files]
    yield _tried(checkpoints_dir, "a file of another checkpoint", others)
    yield _tried(checkpoints_dir, "a file that became a link", [partial(_link, tensors[0])])


def _tried(checkpoints_dir: Path, fault: str, strikes: Sequence[Callable[[], Strike]]) -> Finding:
    """Strike, look, mend; once each."""
    started = time.perf_counter()
    noticed, problem = "", None
    for number, strike in enumerate(strikes):
        name, mend = strike()
        try:
            # A fall-back hashes the older checkpoint too, so it is tried on some only.
            said, problem = _looked_at(checkpoints_dir, name, fall_back=number % 10 == 0)
            noticed = noticed or said
        finally:
            mend()
        if problem:
            break
    if not problem:
        Checkpoint.open(step_folders(checkpoints_dir)[0], verify=True).close()
    return Finding(fault, len(strikes), noticed, problem, seconds=time.perf_counter() - started)


def _looked_at(checkpoints_dir: Path, name: str, *, fall_back: bool) -> tuple[str, str | None]:
    """(what was said of the damage, None) or ("", what should have been)."""
    newest, older = step_folders(checkpoints_dir)[:2]
    try:
        Checkpoint.open(newest, verify=True).close()
    except CheckpointError as error:
        said = str(error)
    else:
        return "", f"{name}: the damage was not noticed"
    if name not in said:
        return "", f"{name} was damaged, but this was said: {said}"
    if fall_back:
        found = find_latest(checkpoints_dir)
        if found is None or found.checkpoint.path != older or len(found.skipped) != 1:
            return "", f"{name} was damaged, but a resume did not fall back to {older.name}"
        found.checkpoint.close()
    return said, None


def _flip(path: Path, bit: int) -> Strike:
    def turn() -> None:
        with path.open("r+b") as file:
            file.seek(bit // 8)
            (byte,) = file.read(1)
            file.seek(bit // 8)
            file.write(bytes([byte ^ 1 << bit % 8]))

    turn()
    return path.name, turn


def _truncate(path: Path, length: int) -> Strike:
    content = path.read_bytes()
    path.write_bytes(content[:length])
    return path.name, partial(_put, path, content)


def _delete(path: Path) -> Strike:
    content = path.read_bytes()
    path.unlink()
    return path.name, partial(_put, path, content)


def _swap(first: Path, second: Path) -> Strike:
    contents = first.read_bytes(), second.read_bytes()
    first.write_bytes(contents[1])
    second.write_bytes(contents[0])

    def mend() -> None:
        _put(first, contents[0])
        _put(second, contents[1])

    return first.name, mend


def _replace(path: Path, other: Path) -> Strike:
    content = path.read_bytes()
    shutil.copyfile(other, path)
    return path.name, partial(_put, path, content)


def _link(path: Path) -> Strike:
    aside = path.parent.parent / f"aside-{path.name}"
    path.rename(aside)
    path.symlink_to(aside)

    def mend() -> None:
        path.unlink()
        aside.rename(path)

    return path.name, mend


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)
