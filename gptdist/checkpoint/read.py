"""Loading: find the newest checkpoint that verifies, on all ranks alike, and read any box of any logical tensor.

Knows manifests, memory-mapped files and how to share out the hashing. Must not know torch, engines or layouts: a box is
asked for by its logical place, whoever wrote it.
"""

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any, Self

import numpy as np

from gptdist.checkpoint.folder import file_problem, parse_step, step_of, trust_problem
from gptdist.checkpoint.fragment import DTYPES, numpy_dtype
from gptdist.checkpoint.listing import check_step_name, check_trust, find_step_folders
from gptdist.checkpoint.logical import Box, Shape, render_box
from gptdist.checkpoint.manifest import MANIFEST, FragmentEntry, Manifest, TensorEntry, load_manifest
from gptdist.checkpoint.tensor_file import TensorFile
from gptdist.comms import Comms
from gptdist.errors import CheckpointError, NoGoodCheckpoint
from gptdist.world import World

_OPEN_FILES = 128  # a process may have open 1024 by default, and a checkpoint may have more files than that


class Checkpoint:
    """An open checkpoint. Its files are opened as they are needed. Threads may share it."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        """Use `Checkpoint.open`."""
        self.path = path
        self.manifest = manifest
        self._indexes: dict[str, _Index] = {}
        self._files: dict[str, TensorFile] = {}
        self._opening = Lock()

    @classmethod
    def open(cls, path: Path, *, verify: bool, comms: Comms | None = None, trust_others: bool = False) -> "Checkpoint":
        """Open on all ranks of `comms` (default: this process alone), or raise the same CheckpointError on all.

        The manifest and every file's size are always checked; `verify` also hashes every byte, shared out over ranks.
        `trust_others`: also where another user owns it or all users may write it.
        """
        comms = comms or Comms(World())
        manifest: Manifest | None = None
        problem = None
        try:
            if not trust_others:
                check_trust(path)
            manifest = load_manifest(path)
            check_step_name(path, manifest)
            _check_dtypes(path, manifest)
        except (CheckpointError, OSError) as error:
            problem = str(error)
        _raise_first(comms, None if problem is None else (0, problem))
        assert manifest is not None  # A rank without one has a problem, and then nobody comes here.
        if len(set(comms.gather(manifest.sha256))) > 1:
            raise CheckpointError(f"{path} is not the same checkpoint on all ranks: they must share the folder.")
        _raise_first(comms, _first_bad_file(path, manifest, verify, trust_others, comms.world))
        return cls(path, manifest)

    @property
    def step(self) -> int:
        """Optimizer steps taken when it was saved."""
        return self.manifest.step

    @property
    def state(self) -> dict[str, Any]:
        """The run state that was saved with it."""
        return self.manifest.state

    @property
    def created(self) -> str:
        """When: UTC, ISO 8601."""
        return self.manifest.created

    def names(self, prefix: str = "") -> list[str]:
        """Logical tensors whose name starts with `prefix`, sorted."""
        return sorted(name for name in self.manifest.tensors if name.startswith(prefix))

    def shape(self, name: str) -> Shape:
        """Of the whole logical tensor."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> str:
        """As stored: torch's name for it. The arrays of bfloat16 are uint16."""
        return self._tensor(name).dtype

    def digest(self, name: str) -> str:
        """Of the whole logical tensor, as the manifest says: the same under every layout."""
        return self._tensor(name).digest

    def read(self, name: str, box: Box | None = None, out: np.ndarray | None = None) -> np.ndarray:
        """`box` (default: all) of a logical tensor: contiguous and the caller's own, or in `out`, which is returned.

        Raises CheckpointError for a name that is not there and for a file that contradicts the manifest; ValueError
        for a box outside the tensor and an `out` of another shape or dtype.
        """
        tensor = self._tensor(name)
        whole = Box.whole(tensor.shape)
        box = box if box is not None else whole
        if len(box.start) != len(tensor.shape) or not whole.contains(box):
            raise ValueError(f"box {render_box(box)} is outside {name}, whose shape is {list(tensor.shape)}")
        index = self._indexes.get(name)
        if index is None:
            index = self._indexes[name] = _Index(tensor)
        kind = numpy_dtype(tensor.dtype)
        if out is None:
            out = np.empty(box.shape, dtype=kind)
        elif (out.shape, out.dtype) != (box.shape, kind):
            raise ValueError(
                f"{name} {render_box(box)} is {kind} {box.shape}, the place for it {out.dtype} {out.shape}"
            )
        for fragment in index.near(box):
            wanted = fragment.box.intersect(box)
            if wanted is not None:
                part = out[wanted.slices(box.start)] if out.ndim else out  # a scalar has no slices
                self._copy(part, fragment, tensor.dtype, wanted)
        return out

    def close(self) -> None:
        """Close all files. Arrays read before stay valid."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _tensor(self, name: str) -> TensorEntry:
        tensor = self.manifest.tensors.get(name)
        if tensor is None:
            near = get_close_matches(name, self.manifest.tensors, n=1)
            hint = f" The nearest name is {near[0]!r}." if near else ""
            raise CheckpointError(
                f"{self.path} has no tensor {name!r} among its {len(self.manifest.tensors)}.{hint} "
                "It may be a checkpoint of another model."
            )
        return tensor

    def _copy(self, out: np.ndarray, fragment: FragmentEntry, dtype: str, wanted: Box) -> None:
        path = self.path / fragment.file
        try:
            self._file(fragment.file).copy_into(out, fragment.key, fragment.box, dtype, wanted)
        except (ValueError, OSError) as error:
            raise CheckpointError(f"{path}: {error}") from error

    def _file(self, name: str) -> TensorFile:
        with self._opening:
            file = self._files.pop(name, None)
            if file is None:
                # Not every rank looked at every file in `open`, and a map of a shorter file would crash the process.
                problem = file_problem(self.path / name, self.manifest.files[name].bytes, None)
                if problem:
                    raise CheckpointError(problem)
                file = TensorFile(self.path / name)
                if len(self._files) >= _OPEN_FILES:
                    # The one not used for longest. It closes by itself, once no other thread reads from it.
                    del self._files[next(iter(self._files))]
            self._files[name] = file
            return file


@dataclass(frozen=True)
class FoundCheckpoint:
    """The newest good checkpoint, and one line for each newer one that was passed over."""

    checkpoint: Checkpoint
    skipped: list[str]


def is_checkpoint(path: Path) -> bool:
    """Whether `path` is meant as one checkpoint, not as a folder of them."""
    return os.path.isfile(path / MANIFEST) or parse_step(path.name) is not None


def checkpoint_paths(path: Path) -> list[Path]:
    """The checkpoints that a user may mean by `path`, newest first: itself, or those of a run's folder or of a folder
    of them.

    Raises CheckpointError where there are none, naming what was looked for.
    """
    if is_checkpoint(path):
        return [path]
    for folder in (path / "checkpoints", path):
        found = find_step_folders(folder)
        if found:
            return found
    raise CheckpointError(
        f"there is no checkpoint at {path}: neither {path / 'checkpoints'} nor {path} holds a step-... folder. "
        "Give a run's folder (launch.run_dir), its checkpoints folder, or one step-... folder."
    )


def open_newest(
    path: Path, comms: Comms | None = None, *, verify: bool = True, trust_others: bool = False
) -> FoundCheckpoint:
    """The newest good one of `checkpoint_paths`, the same on all ranks.

    Raises CheckpointError where there is none at all, or `path` is one and is not good; NoGoodCheckpoint.
    """
    comms = comms or Comms(World())
    paths = _agreed(lambda: checkpoint_paths(path), comms)
    if paths == [path]:
        return FoundCheckpoint(Checkpoint.open(path, verify=verify, comms=comms, trust_others=trust_others), [])
    return _first_good(paths, comms, verify, trust_others)


def find_latest(
    checkpoints_dir: Path,
    comms: Comms | None = None,
    *,
    before_step: int | None = None,
    verify: bool = True,
    trust_others: bool = False,
) -> FoundCheckpoint | None:
    """The newest checkpoint whose every byte verifies, the same on all ranks; None only where there is none at all.
    With `before_step`, of steps before that one only; with `verify` off, sizes are enough.

    Raises NoGoodCheckpoint, with the reason for each, where there are some but none is good.
    """
    comms = comms or Comms(World())

    def look() -> list[Path]:
        found = find_step_folders(checkpoints_dir) or []
        return [path for path in found if before_step is None or step_of(path) < before_step]

    paths = _agreed(look, comms)
    return _first_good(paths, comms, verify, trust_others) if paths else None


def _agreed(look: Callable[[], list[Path]], comms: Comms) -> list[Path]:
    """What the first rank finds: another one's view of a shared disk may be older."""
    found: list[Path] = []
    with comms.together():
        if comms.is_first:
            found = look()
    return [Path(name) for name in comms.broadcast([str(path) for path in found])]


def _first_good(paths: list[Path], comms: Comms, verify: bool, trust_others: bool) -> FoundCheckpoint:
    """Of at least one. Raises NoGoodCheckpoint."""
    skipped: list[str] = []
    for path in paths:
        try:
            found = Checkpoint.open(path, verify=verify, comms=comms, trust_others=trust_others)
            return FoundCheckpoint(found, skipped)
        except CheckpointError as error:
            skipped.append(f"{path.name}: {error}")
    reasons = "".join(f"\n  {reason}" for reason in skipped)
    raise NoGoodCheckpoint(
        f"{paths[0].parent} has {len(skipped)} checkpoint(s), but none of them is good:{reasons}\n"
        "Restore one of them, or start anew on purpose (--fresh, or another checkpoint.dir)."
    )


class _Index:
    """The fragments of one tensor in the order of their rows, to find those near a box without looking at all."""

    def __init__(self, tensor: TensorEntry) -> None:
        self._fragments = sorted(tensor.fragments, key=lambda fragment: fragment.box.start)
        self._starts = [fragment.box.start[0] for fragment in self._fragments] if tensor.shape else []
        stops = (fragment.box.stop[0] for fragment in self._fragments) if tensor.shape else ()
        self._highest_stop_so_far = list(accumulate(stops, max))

    def near(self, box: Box) -> list[FragmentEntry]:
        """All fragments that share elements with `box`, and perhaps some that do not."""
        if not box.start:
            return self._fragments
        first = bisect_right(self._highest_stop_so_far, box.start[0])
        return self._fragments[first : bisect_left(self._starts, box.stop[0])]


def _check_dtypes(path: Path, manifest: Manifest) -> None:
    for name, tensor in manifest.tensors.items():
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{path}: tensor {name} has dtype {tensor.dtype!r}; can read {', '.join(DTYPES)}.")


def _first_bad_file(
    path: Path, manifest: Manifest, hashed: bool, trust_others: bool, world: World
) -> tuple[int, str] | None:
    """Of this rank's share of the files, the first bad one: its place among all files, and what is wrong with it."""
    order = sorted(manifest.files.items())
    # Dealt round by size, so that each rank hashes about as many bytes.
    by_size = sorted(range(len(order)), key=lambda place: order[place][1].bytes)
    mine = sorted(by_size[world.global_rank :: world.world_size])

    def check(place: int) -> str | None:
        name, entry = order[place]
        problem = None if trust_others else trust_problem(path / name)
        return problem or file_problem(path / name, entry.bytes, entry.sha256 if hashed else None)

    # Hashing leaves Python alone, so files go side by side; the node's cores are shared by its ranks.
    cores = len(os.sched_getaffinity(0)) // world.local_world_size
    with ThreadPoolExecutor(max(1, min(cores, len(mine)))) as threads:
        for place, problem in zip(mine, threads.map(check, mine), strict=True):
            if problem:
                threads.shutdown(wait=False, cancel_futures=True)
                return place, problem
    return None


def _raise_first(comms: Comms, problem: tuple[int, str] | None) -> None:
    """Raise the problem of the lowest number, the same on every rank, where any rank has one."""
    found = [tuple(other) for other in comms.gather(problem) if other is not None]
    if found:
        raise CheckpointError(min(found)[1])
