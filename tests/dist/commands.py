"""Runs the `gptdist` command in processes of its own, forked from fork_server.py's, which has imported it once.

What runs is `launch.cli.main(argv)` with its output in files; only the interpreter's start is saved. Also knows the
tiny run that the tests of the command share, and how to read what a run left behind.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from gptdist.checkpoint.read import Checkpoint
from tests.dist.fork_server import check_forked, fork_server

_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.005

# Text enough for a few hundred samples, and small enough to hash in no time.
SOURCES = ("argparse.py", "ast.py", "bisect.py", "calendar.py", "copy.py", "csv.py", "dis.py", "enum.py", "heapq.py")

TINY_RUN: dict[str, Any] = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_heads": 4,
    "model.vocab_size": 257,
    "model.sequence_length": 32,
    "optimizer.learning_rate": 3e-3,
    "schedule.warmup_steps": 2,
    "train.steps": 10,
    "train.global_batch_size": 12,
    "train.micro_batch_size": 1,
    "train.eval_samples": 8,
    "train.eval_interval": 0,
    "checkpoint.interval": 3,
    "monitor.log_interval": 1,
    "monitor.tensorboard": False,
    "launch.timeout": "60s",
}


@dataclass(frozen=True)
class Ended:
    """How a command ended; a negative code is the signal that killed it."""

    code: int
    out: str
    err: str

    def expect(self, code: int) -> "Ended":
        """Itself, if it ended with `code`."""
        if self.code != code:
            raise AssertionError(f"exit code {self.code}, not {code}\n{self.out[-3000:]}\n{self.err[-6000:]}")
        return self

    @property
    def errors(self) -> list[str]:
        """The `error: ...` lines."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    def one_error(self, *words: str, code: int = 2) -> None:
        """Exit `code`, one error with all of `words` in it, no traceback."""
        self.expect(code)
        if len(self.errors) != 1 or "Traceback" in self.err or not all(word in self.errors[0] for word in words):
            raise AssertionError(f"not one error with {words}:\n{self.err}")


class Command:
    """One running command."""

    def __init__(self, argv: list[str], folder: Path, env: Mapping[str, str], enter: Callable[[], None]) -> None:
        self._out, self._err = folder / "stdout", folder / "stderr"
        self._process: BaseProcess = fork_server().Process(
            target=_run_command, args=(argv, str(self._out), str(self._err), dict(env), enter)
        )  # no daemon: commands have processes of their own
        self._process.start()

    def send(self, number: signal.Signals) -> None:
        """Signal the command itself, not its ranks."""
        os.kill(self._process.pid or 0, number)

    def is_running(self) -> bool:
        return self._process.is_alive()

    def wait_until(self, happened: Callable[[], bool], timeout_seconds: float = 120.0) -> bool:
        """Poll until `happened()`; False where the command ended before."""
        deadline = time.monotonic() + timeout_seconds
        while not happened():
            if not self.is_running():
                return happened()
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"waited {timeout_seconds:.0f} s in vain\n{self._text(self._err)}")
            time.sleep(_POLL_SECONDS)
        return True

    def wait(self, timeout_seconds: float = 120.0) -> Ended:
        self._process.join(timeout_seconds)
        if self.is_running():
            self.kill()
            output = self._text(self._out) + self._text(self._err)
            raise TimeoutError(f"it ran for over {timeout_seconds:.0f} s\n{output}")
        return Ended(self._process.exitcode or 0, self._text(self._out), self._text(self._err))

    def kill(self) -> Ended:
        """SIGKILL, as from a scheduler that has lost patience; the ranks must follow by themselves."""
        self._process.kill()
        return self.wait()

    @staticmethod
    def _text(path: Path) -> str:
        return path.read_text() if path.exists() else ""


class Commands:
    """Starts commands in `folder`, where their relative paths count from. `enter`: what their process does first."""

    def __init__(self, folder: Path, corpus: Path) -> None:
        self.folder = folder
        self.corpus = corpus
        self.enter: Callable[[], None] = _stay
        self._count = 0

    def start(self, *argv: object, **env: str) -> Command:
        """`gptdist ARGV` in the background."""
        self._count += 1
        output = self.folder / f".command-{self._count}"
        output.mkdir()
        return Command([str(word) for word in argv], output, env, self.enter)

    def run(self, *argv: object, timeout_seconds: float = 120.0) -> Ended:
        """`gptdist ARGV` to its end."""
        return self.start(*argv).wait(timeout_seconds)

    def train_words(self, run_dir: Path, nproc: int = 1, **settings: object) -> list[str]:
        """`train CONFIG ...` for the tiny run; settings are written `train__steps=5`."""
        config = self.folder / f"{run_dir.name}.yaml"
        values = {**TINY_RUN, "data.corpus": str(self.corpus), "launch.run_dir": str(run_dir)}
        config.write_text(render_run(values))
        words = ["train", str(config), "--nproc", str(nproc)]
        return words + [f"{name.replace('__', '.')}={_plain(value)}" for name, value in settings.items()]

    def start_train(self, run_dir: Path, nproc: int = 1, *words: str, **settings: object) -> Command:
        """`gptdist train` of the tiny run in the background."""
        return self.start(*self.train_words(run_dir, nproc, **settings), *words)

    def train(self, run_dir: Path, nproc: int = 1, *words: str, **settings: object) -> Ended:
        """`gptdist train` of the tiny run to its end."""
        return self.start_train(run_dir, nproc, *words, **settings).wait()


def mpi_launcher(library: str) -> str | None:
    """The mpiexec of `library`, MPICH or Open MPI: of the environment that runs the tests, or the machine's."""
    says = {"MPICH": "HYDRA", "Open MPI": "(Open"}[library]  # (Open MPI), or (OpenRTE) under its other name
    names = ("mpiexec", "mpirun", "mpiexec.mpich", "mpirun.openmpi")
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for program in filter(None, (shutil.which(name, path=folders) for name in names)):
        version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False)
        if says in version.stdout:
            return program
    return None


def render_run(values: Mapping[str, Any]) -> str:
    """A run's YAML from `section.key` -> value."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = value
    return json.dumps(sections, indent=1)  # JSON is YAML


def _plain(value: object) -> str:
    return json.dumps(value) if isinstance(value, (bool, list, type(None))) else str(value)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, as they were written."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines if line]


def curve(run_dir: Path) -> dict[int, tuple[float, float, float]]:
    """(loss, gradient norm, samples consumed) by step; of a step there twice, the later one."""
    return {
        row["step"]: (row["train/loss"], row["train/grad_norm"], row["train/samples"])
        for row in metrics(run_dir)
        if "train/loss" in row
    }


def last_step(run_dir: Path) -> int:
    """The newest step logged; 0 before the first."""
    return max(curve(run_dir), default=0)


def checkpoint_names(run_dir: Path) -> list[str]:
    """Names of finished checkpoints, oldest first."""
    return sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))


def open_last(run_dir: Path) -> Checkpoint:
    """The newest checkpoint, verified."""
    return Checkpoint.open(run_dir / "checkpoints" / checkpoint_names(run_dir)[-1], verify=True)


def state_bytes(run_dir: Path) -> dict[str, bytes]:
    """Every logical tensor of the newest checkpoint as bytes."""
    with open_last(run_dir) as checkpoint:
        return {name: checkpoint.read(name).tobytes() for name in checkpoint.names()}


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content; empty where there is no folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _stay() -> None:
    """A command's process runs on this machine."""


def _run_command(argv: list[str], out_path: str, err_path: str, env: dict[str, str], enter: Callable[[], None]) -> None:
    """The command's process: as one started from a shell, but for the imports that are already there."""
    check_forked()
    enter()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # the fork server itself ends when pytest does
    os.setsid()
    for number, path in ((1, out_path), (2, err_path)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(env)
    tempfile.tempdir = None  # TMPDIR counts, which may be in `env`
    torch.set_num_threads(1)  # the tests' machine is busy, and threads that wait for each other are slow on it
    from launch.cli import main

    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
