"""How long it takes to go on under another number of ranks, against DeepSpeed's conversion to universal checkpoints.

Usage: python -m benchmarks.checkpoint_load [--megabytes 2000] [--rounds 3] [--folder /dev/shm] [--out [FILE]]

Two ranks under ZeRO 2 save a training state of that size; one rank takes it up. Ours verifies every byte, reads and
goes on: one phase. DeepSpeed's checkpoint is first converted by its command, then loaded; both are counted, a command
with the start of its process, and its conversion is not verified. Building the engine is in neither. Ours is also
timed for ways that DeepSpeed's checkpoint of a plain model cannot go: to tensor and to pipeline parallel.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks import deepspeed_peer
from benchmarks.ranks import Meeting, run_ranks
from benchmarks.report import RESULTS_DIR, machine, render_table, write_json
from gptdist.checkpoint.read import find_latest
from gptdist.checkpoint.snapshot import to_host
from gptdist.checkpoint.write import save_checkpoint
from gptdist.comms import Comms
from gptdist.config.sections import ModelConfig, OptimizerConfig, ParallelConfig, TrainConfig
from gptdist.layout import Layout
from gptdist.model.parameters import parameter_count
from gptdist.world import World

GOAL = 0.35
PEER = "ds_to_universal and load"
SAVED = (2, ParallelConfig(zero_stage=2))
# Name -> ranks and how the model is spread over them.
TARGETS = {
    "1 rank": (1, ParallelConfig(zero_stage=2)),
    "TP 2": (2, ParallelConfig(tensor=2, zero_stage=1)),
    "PP 2": (2, ParallelConfig(pipeline=2, zero_stage=1)),
    "DP 2, ZeRO 3": (2, ParallelConfig(zero_stage=3)),
}


def main() -> None:
    """Measure, print the table, and write the file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS_DIR / "checkpoint_load.json")
    args = parser.parse_args()
    before = machine()
    model = model_of(args.megabytes * 10**6)
    parameters = parameter_count(model)
    seconds: dict[str, list[float]] = {PEER: [], **{name: [] for name in TARGETS}}
    parts: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        run_ranks(save_ours, SAVED[0], folder / "ours", model)
        _peer("save", folder / "peer", parameters, SAVED[0])
        for number in range(args.rounds):
            for name in list(seconds) if number % 2 == 0 else reversed(seconds):
                if name == PEER:
                    parts.append(_convert_and_load(folder, parameters))
                    seconds[name].append(sum(parts[-1]))
                else:
                    seconds[name].append(run_ranks(load_ours, TARGETS[name][0], folder / "ours", model, name))
    ratios = [ours / peer for ours, peer in zip(seconds["1 rank"], seconds[PEER], strict=True)]
    print(f"{12 * parameters / 1e9:.2f} GB of training state, saved by 2 ranks, torch {before['torch']}")
    rows = [
        [name, f"{statistics.median(found):.2f}", f"{min(found):.2f}", f"{max(found):.2f}"]
        for name, found in seconds.items()
    ]
    print(render_table(("to", "seconds", "least", "most"), rows))
    convert, load = (statistics.median(part) for part in zip(*parts, strict=True))
    print(f"{PEER}: {convert:.2f} s to convert, {load:.2f} s to load")
    print(f"ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}), goal {GOAL}")
    if args.out:
        record = {"seconds": seconds, "ratios": ratios, "goal": GOAL, "peer_parts": parts}
        write_json(args.out, {"machine": before, "bytes": 12 * parameters, **record})


def model_of(size: int) -> ModelConfig:
    """A GPT whose fp32 weights and two moments take about `size` bytes."""
    models = (ModelConfig(num_layers=count) for count in range(2, 400, 2))  # two pipeline stages share them
    return min(models, key=lambda model: abs(12 * parameter_count(model) - size))


def save_ours(meeting: Meeting, folder: Path, model: ModelConfig) -> None:
    """What ranks under `SAVED` hold, as a checkpoint."""
    with meeting.group("save", meeting.processes) as world:
        assert world is not None
        engine = _engine(world, model, SAVED[1])
        engine.initialise()
        save_checkpoint(folder, 1, to_host(engine.fragments()), {"engine": engine.state()}, _comms(world))
        engine.close()


def load_ours(meeting: Meeting, folder: Path, model: ModelConfig, target: str) -> float:
    """Seconds from looking for the checkpoint to weights that can compute."""
    from gptdist.engine.partition import TensorSource

    with meeting.group("load", meeting.processes) as world:
        assert world is not None
        engine = _engine(world, model, TARGETS[target][1])
        comms = _comms(world)
        dist.barrier()
        started = time.perf_counter()
        found = find_latest(folder, comms)
        assert found is not None
        with found.checkpoint as checkpoint:
            engine.read(TensorSource(checkpoint), checkpoint.state["engine"])
        engine.refresh()
        dist.barrier()
        seconds = time.perf_counter() - started
        engine.close()
    return seconds


def _engine(world: World, model: ModelConfig, parallel: ParallelConfig) -> Any:
    from gptdist.engine.engine import TrainEngine  # imports DeepSpeed, which the parent does without

    layout = Layout(world.world_size, parallel.tensor, parallel.pipeline, zero_stage=parallel.zero_stage)
    train = TrainConfig(precision="bf16")
    return TrainEngine(model, OptimizerConfig(), parallel, train, layout, world)


def _comms(world: World) -> Comms:
    return Comms(world, dist.new_group(backend="gloo") if world.world_size > 1 else None)


def _convert_and_load(folder: Path, parameters: int) -> tuple[float, float]:
    started = time.perf_counter()
    done = subprocess.run(
        deepspeed_peer.to_universal(folder / "peer", folder / "universal"), capture_output=True, text=True, check=False
    )
    convert = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    load = _peer("load", folder / "universal", parameters, 1)
    shutil.rmtree(folder / "universal")
    return convert, load


def _peer(phase: str, folder: Path, parameters: int, ranks: int) -> float:
    command = [sys.executable, "-m", "benchmarks.deepspeed_peer", phase, str(folder)]
    options = ["--parameters", str(parameters), "--ranks", str(ranks)]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


if __name__ == "__main__":
    main()
