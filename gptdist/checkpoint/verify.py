"""Every byte of a checkpoint against its manifest: the sha256 of each file, the digest of each logical tensor.

Knows folders, manifests and files. Must not know torch or ranks. Hashing leaves Python alone, so files go side by side.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from gptdist.checkpoint.digest import add_digests, partial_digest, render_digest
from gptdist.checkpoint.folder import file_problem
from gptdist.checkpoint.fragment import numpy_dtype
from gptdist.checkpoint.logical import cut_in_order
from gptdist.checkpoint.read import Checkpoint
from gptdist.checkpoint.verified import mark_verified
from gptdist.errors import CheckpointError

_PART_BYTES = 4 << 20


@dataclass(frozen=True)
class Verdict:
    """What came of one checkpoint. `problem` names the first file that is bad; None: all is as the manifest says."""

    path: Path
    problem: str | None
    bytes: int = 0
    tensors: int = 0
    marked: bool = False  # as verified; not where this user may not write


def verify_checkpoint(path: Path, *, trust_others: bool = False) -> Verdict:
    """Read everything, and mark what is good."""
    try:
        with Checkpoint.open(path, verify=False, trust_others=trust_others) as checkpoint:
            manifest = checkpoint.manifest
            problem = _first_problem(checkpoint)
    except CheckpointError as error:
        return Verdict(path, str(error))
    if problem is not None:
        return Verdict(path, problem, manifest.total_bytes, len(manifest.tensors))
    try:
        mark_verified(path, manifest)
    except OSError:
        return Verdict(path, None, manifest.total_bytes, len(manifest.tensors))
    return Verdict(path, None, manifest.total_bytes, len(manifest.tensors), marked=True)


def _first_problem(checkpoint: Checkpoint) -> str | None:
    """Files first, in the order of their names: a changed file changes digests too, and is the better answer."""
    files = [lambda name=name: _file_problem(checkpoint, name) for name in sorted(checkpoint.manifest.files)]
    tensors = [lambda name=name: _tensor_problem(checkpoint, name) for name in checkpoint.names()]
    checks: list[Callable[[], str | None]] = [*files, *tensors]
    with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
        for problem in threads.map(lambda check: check(), checks):
            if problem is not None:
                threads.shutdown(wait=False, cancel_futures=True)
                return problem
    return None


def _file_problem(checkpoint: Checkpoint, name: str) -> str | None:
    entry = checkpoint.manifest.files[name]
    return file_problem(checkpoint.path / name, entry.bytes, entry.sha256)


def _tensor_problem(checkpoint: Checkpoint, name: str) -> str | None:
    entry = checkpoint.manifest.tensors[name]
    most = _PART_BYTES // numpy_dtype(entry.dtype).itemsize
    digest = 0
    for fragment in entry.fragments:
        for box in cut_in_order(fragment.box, most):
            digest = add_digests((digest, partial_digest(checkpoint.read(name, box), box, entry.shape)))
    if render_digest(digest) == entry.digest:
        return None
    files = sorted({fragment.file for fragment in entry.fragments})
    return (
        f"tensor {name} in {checkpoint.path / files[0]}{f' and {len(files) - 1} more' if files[1:] else ''} has digest "
        f"{render_digest(digest)}, the manifest says {entry.digest}"
    )
