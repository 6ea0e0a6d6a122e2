"""How long an export for serving takes and how much memory, against DeepSpeed's zero_to_fp32 on as many weights.

Usage: python -m benchmarks.checkpoint_export [--megabytes 2000] [--rounds 5] [--folder /dev/shm] [--out [FILE]]

Both start from a checkpoint that two ranks wrote of a training state of that size and leave fp32 weights in
safetensors; each is a process of its own, its start included. zero_to_fp32 checks nothing; ours compares every tensor
with its digest. Ours without the proof is what compares; with it (two more processes that run the model in gptdist and
in transformers) is timed too. Memory is the peak of the largest process.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import deepspeed_peer
from benchmarks.checkpoint_load import SAVED, model_of
from benchmarks.report import RESULTS_DIR, machine, render_table, write_json
from gptdist.checkpoint.fragment import FragmentPlace
from gptdist.checkpoint.logical import Box
from gptdist.checkpoint.manifest import Manifest, TensorEntry
from gptdist.checkpoint.rewrite import write_checkpoint
from gptdist.config.load import resolved_dict
from gptdist.config.sections import LaunchConfig, ModelConfig, RunConfig
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.model.parameters import logical_shapes, parameter_count

OURS, PROVEN, PEER = "gptdist export --no-proof", "gptdist export", "zero_to_fp32"
GOALS = {"seconds": 0.5, "memory": 0.3}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def main() -> None:
    """Measure, print the table, and write the file if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--out", type=Path, nargs="?", const=RESULTS_DIR / "checkpoint_export.json")
    args = parser.parse_args()
    before = machine()
    model = model_of(args.megabytes * 10**6)
    found: dict[str, list[tuple[float, float]]] = {OURS: [], PEER: [], PROVEN: []}
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        folder = Path(temporary)
        write_run(folder / "run", model)
        peer = [sys.executable, "-m", "benchmarks.deepspeed_peer", "save", str(folder / "peer")]
        options = ["--parameters", str(parameter_count(model)), "--ranks", str(SAVED[0])]
        subprocess.run([*peer, *options], capture_output=True, check=True)
        export = [sys.executable, "-m", "launch.cli", "export", str(folder / "run"), "--out"]
        commands = {
            OURS: [*export, str(folder / "exported"), "--no-proof"],
            PEER: deepspeed_peer.to_fp32(folder / "peer", folder / "exported"),
            PROVEN: [*export, str(folder / "exported")],
        }
        for number in range(args.rounds):
            for name in list(commands) if number % 2 == 0 else reversed(commands):
                found[name].append(_run(commands[name]))
                shutil.rmtree(folder / "exported")
    ratios = {
        what: [ours[place] / peer[place] for ours, peer in zip(found[OURS], found[PEER], strict=True)]
        for place, what in enumerate(GOALS)
    }
    print(f"{4 * parameter_count(model) / 1e6:,.0f} MB of fp32 weights, torch {before['torch']}")
    rows = []
    for name, rounds in found.items():
        seconds, peak = (statistics.median(values) for values in zip(*rounds, strict=True))
        rows.append([name, f"{seconds:.2f}", f"{peak / 1e6:,.0f}"])
    print(render_table(("", "seconds", "peak MB"), rows))
    for what, values in ratios.items():
        print(f"{what}: {statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f}), goal {GOALS[what]}")
    if args.out:
        write_json(args.out, {"machine": before, "model": model.model_dump(), "found": found, "ratios": ratios})


def write_run(run_dir: Path, model: ModelConfig) -> None:
    """A run's folder as two ranks leave it: weights of a fresh model and two moments, and a tokenizer."""
    tokenizer = CorpusTokenizer.of_bytes()
    config = RunConfig(model=model, launch=LaunchConfig(run_dir=str(run_dir)))
    state = {
        "step": 1,
        "samples": 8,
        "tokens": 8 * model.sequence_length,
        "data": {"tokenizer": tokenizer.sha256, "end_of_text": tokenizer.end_of_text},
        "config": resolved_dict(config),
        "versions": {},
    }
    shapes = {f"{kind}/{name}": shape for kind in KINDS for name, shape in logical_shapes(model).items()}
    last: dict[str, np.ndarray] = {}

    def read(place: FragmentPlace, box: Box) -> np.ndarray:
        if place.name not in last:
            last.clear()
            drawn = np.random.default_rng(list(place.name.encode())).standard_normal(place.shape, np.float32)
            last[place.name] = drawn * np.float32(model.init_std)
        return last[place.name][box.slices()]

    tensors = {name: TensorEntry(shape, "float32", "", ()) for name, shape in shapes.items()}
    manifest = Manifest(1, "2026-01-01T00:00:00+00:00", {}, tensors, state)
    write_checkpoint(run_dir / "checkpoints" / "step-00000001", manifest, SAVED[0], read)
    (run_dir / "tokenizer.json").write_bytes(tokenizer.content)


def _run(command: list[str]) -> tuple[float, float]:
    """Seconds and peak bytes of the largest process of a command."""
    measured = (
        "import json, resource, subprocess, sys, time; started = time.perf_counter(); "
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True); "
        "seconds = time.perf_counter() - started; "
        "peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss; "
        "print(json.dumps([done.returncode, seconds, peak, done.stderr[-2000:]]))"
    )
    done = subprocess.run([sys.executable, "-c", measured, *command], capture_output=True, text=True, check=True)
    code, seconds, peak, error = json.loads(done.stdout)
    if code:
        raise RuntimeError(f"{' '.join(command)} failed:\n{error}")
    return seconds, peak


if __name__ == "__main__":
    main()
