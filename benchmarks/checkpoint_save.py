"""What a save costs training, and how soon it is on disk, against a plain copy, a plain write and torch's async_save.

Usage: python -m benchmarks.checkpoint_save [--megabytes 2000] [--rounds 5] [--folder /dev/shm] [--out [FILE]]

One rank with a training state of that size: fp32 weights and two moments of a GPT. Every round measures all candidates
in turn, forwards and then backwards; a ratio is taken within a round, and the median over rounds counts. Stall: how
long the call keeps training from going on. Durable: until the checkpoint has its name, everything synced; ours is
without reading back, which no other does (that is measured too). The plain copy goes into memory that was written
before, the plain write hashes the same bytes with sha256, writes them to one file and syncs it, 16 MiB at a time.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from benchmarks.ranks import Meeting, run_ranks
from benchmarks.report import RESULTS_DIR, machine, render_table, write_json
from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.saver import CheckpointSaver
from gptdist.checkpoint.snapshot import Fragment
from gptdist.checkpoint.write import SaveOptions
from gptdist.comms import Comms
from gptdist.config.sections import ModelConfig
from gptdist.model.parameters import logical_shapes
from gptdist.world import World

KINDS = ("weight", "exp_avg", "exp_avg_sq")
OURS, OURS_READ_BACK = "gptdist", "gptdist, read back"
COPY, WRITE = "plain copy", "plain write, sha256, fsync"
ASYNC, ASYNC_CACHED = "async_save", "async_save, cached staging"
# (candidate, peer, what) -> the ratio that is aimed at.
GOALS = {
    (OURS, COPY, "stall"): 1.3,
    (OURS, ASYNC, "stall"): 0.25,
    (OURS, ASYNC_CACHED, "stall"): None,
    (OURS, WRITE, "durable"): 1.2,
    (OURS_READ_BACK, WRITE, "durable"): None,
    (OURS, ASYNC, "durable"): None,
}
_CHUNK = 16 << 20

Found = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Times:
    """Seconds; `stall` of a plain write and `durable` of a plain copy mean nothing."""

    stall: float
    durable: float


def main() -> None:
    """Measure, print the tables, and write the file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS_DIR / "checkpoint_save.json")
    args = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        size, found = run_ranks(_measure, 1, Path(folder), args.megabytes * 10**6, args.rounds)
    seconds = {name: [Times(*times) for times in rounds] for name, rounds in found.items()}
    ratios = _ratios(seconds)
    print(f"{size / 1e9:.2f} GB of training state, {args.rounds} rounds, torch {before['torch']}")
    print(render_table(("", "stall, s", "durable, s", "GB/s"), _rows(seconds, size)))
    print(render_table(("", "ratio", "least", "most", "goal"), _ratio_rows(ratios)))
    if args.out:
        record = {" / ".join(key): values for key, values in ratios.items()}
        write_json(args.out, {"machine": before, "bytes": size, "seconds": found, "ratios": record})


def _measure(
    meeting: Meeting, folder: Path, size: int, rounds: int
) -> tuple[int, dict[str, list[tuple[float, float]]]]:
    torch.set_num_threads(os.cpu_count() or 1)  # ranks have one thread each; this one is alone
    with meeting.group("save", 1):
        state = _state(size)
        candidates = _candidates(folder, state)
        for measure in candidates.values():
            measure()  # memory is taken and touched the first time
        found: Found = {name: [] for name in candidates}
        for number in range(rounds):
            for name in list(candidates) if number % 2 == 0 else reversed(candidates):
                times = candidates[name]()
                found[name].append((times.stall, times.durable))
    return sum(tensor.nbytes for tensor in state.values()), found


def _state(size: int) -> dict[str, Tensor]:
    """As an engine holds it: one flat tensor of each kind, every parameter a range of it."""
    model = ModelConfig(num_layers=1)
    layer = sum(_numel(shape) for name, shape in logical_shapes(model).items() if name.startswith("layers."))
    outside = sum(_numel(shape) for shape in logical_shapes(model).values()) - layer
    layers = max(1, round((size / 12 - outside) / layer))
    shapes = logical_shapes(ModelConfig(num_layers=layers))
    generator = torch.Generator().manual_seed(0)
    state = {}
    for kind in KINDS:
        flat = torch.empty(sum(map(_numel, shapes.values()))).normal_(generator=generator)
        parts = flat.split([_numel(shape) for shape in shapes.values()])
        state |= {f"{kind}/{name}": part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}
    return state


def _candidates(folder: Path, state: dict[str, Tensor]) -> dict[str, Callable[[], Times]]:
    warm = [torch.zeros_like(tensor) for tensor in state.values()]

    def copy() -> Times:
        started = time.perf_counter()
        for target, source in zip(warm, state.values(), strict=True):
            target.copy_(source)
        return Times(time.perf_counter() - started, 0.0)

    def write() -> Times:
        path = folder / "plain"
        started = time.perf_counter()
        digest = hashlib.sha256()
        with path.open("wb", buffering=0) as file:
            for tensor in state.values():
                content = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
                for first in range(0, len(content), _CHUNK):
                    digest.update(content[first : first + _CHUNK])
                    file.write(content[first : first + _CHUNK])
            os.fsync(file.fileno())
        seconds = time.perf_counter() - started
        path.unlink()
        return Times(0.0, seconds)

    stager = DefaultStager(StagingOptions(False, False, False, False))

    def cached() -> Times:
        return _async_save(folder / "cached", state, async_stager=stager)

    return {
        COPY: copy,
        WRITE: write,
        OURS: _ours(folder / "ours", state, read_back=False),
        OURS_READ_BACK: _ours(folder / "ours-read-back", state, read_back=True),
        ASYNC: lambda: _async_save(folder / "async", state),
        ASYNC_CACHED: cached,
    }


def _ours(folder: Path, state: dict[str, Tensor], *, read_back: bool) -> Callable[[], Times]:
    fragments = [Fragment(name, tuple(t.shape), Box.whole(tuple(t.shape)), t) for name, t in state.items()]
    saver = CheckpointSaver(folder, Comms(World()), SaveOptions(read_back=read_back))
    step = 0

    def save() -> Times:
        nonlocal step
        step += 1
        started = time.perf_counter()
        saver.save(step, fragments, {"samples": step})
        stall = time.perf_counter() - started
        outcome = saver.wait()
        seconds = time.perf_counter() - started
        if outcome is None or outcome.error is not None:
            raise RuntimeError(f"a save failed: {outcome}")
        shutil.rmtree(folder)
        return Times(stall, seconds)

    return save


def _async_save(folder: Path, state: dict[str, Tensor], **options: Any) -> Times:
    started = time.perf_counter()
    answer = dcp.async_save(dict(state), checkpoint_id=str(folder), **options)
    stall = time.perf_counter() - started
    (answer.upload_completion if hasattr(answer, "upload_completion") else answer).result()
    seconds = time.perf_counter() - started
    shutil.rmtree(folder)
    return Times(stall, seconds)


def _ratios(seconds: dict[str, list[Times]]) -> dict[tuple[str, str, str], list[float]]:
    return {
        key: [
            getattr(ours, key[2]) / getattr(theirs, key[2])
            for ours, theirs in zip(seconds[key[0]], seconds[key[1]], strict=True)
        ]
        for key in GOALS
    }


def _rows(seconds: dict[str, list[Times]], size: int) -> list[list[str]]:
    rows = []
    for name, rounds in seconds.items():
        stall, durable = (statistics.median(getattr(times, what) for times in rounds) for what in ("stall", "durable"))
        rows.append(
            [
                name,
                f"{stall:.3f}" if stall else "-",
                f"{durable:.2f}" if durable else "-",
                f"{size / durable / 1e9:.2f}" if durable else "-",
            ]
        )
    return rows


def _ratio_rows(ratios: dict[tuple[str, str, str], list[float]]) -> list[list[str]]:
    return [
        [
            f"{what}: {ours} / {peer}",
            *(f"{value:.2f}" for value in (statistics.median(values), min(values), max(values))),
            "-" if GOALS[ours, peer, what] is None else f"{GOALS[ours, peer, what]:.2f}",
        ]
        for (ours, peer, what), values in ratios.items()
    ]


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


if __name__ == "__main__":
    main()
