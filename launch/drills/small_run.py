"""The run that is drilled: a small corpus and a tiny model, trained by the command that a user types.

Knows how to make a corpus and a config, to start the command, and to hear what it says and when. Must not know faults.
"""

import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptdist.config.load import load_run
from gptdist.config.sections import RunConfig
from launch.drills.rank_faults import write_plan

# Many small documents, each a chunk of its own, so that some are first read late in the run.
LARGEST_SOURCE_BYTES = 16_000
CHUNK_TOKENS = 1024
SAVE_INTERVAL = 4
HANG_SECONDS = 6.0
GONE_SECONDS = 5.0
"""How long anything of a command may outlive it."""

_RUN: dict[str, Any] = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_heads": 4,
    "model.vocab_size": 257,
    "model.sequence_length": 32,
    "optimizer.learning_rate": 3e-3,
    "schedule.warmup_steps": 2,
    "train.global_batch_size": 12,
    "train.eval_interval": 0,
    "train.eval_samples": 8,
    "checkpoint.interval": SAVE_INTERVAL,
    "monitor.log_interval": 1,
    "monitor.tensorboard": False,
    "launch.hang_timeout": f"{HANG_SECONDS:g}s",
    "launch.timeout": "120s",
}


@dataclass(frozen=True)
class Line:
    """What a command said, and when by `time.monotonic_ns`."""

    at_nanoseconds: int
    text: str


class Command:
    """A command that runs. All its processes are of one session, and hold the pipe that it speaks into."""

    def __init__(self, words: Sequence[str]) -> None:
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}  # bitwise, and on any machine
        self.lines: list[Line] = []
        self._silent_at = 0
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=env,
            start_new_session=True,
        )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        return self._process.poll() is None

    def wait(self, limit_seconds: float) -> "Ended":
        """Until it has ended, and until everybody has who could speak for it."""
        try:
            code: int | None = self._process.wait(limit_seconds)
        except subprocess.TimeoutExpired:
            code = None
        if code is not None:
            self._listener.join(GONE_SECONDS)
        orphans = self._listener.is_alive()
        gone_at = time.monotonic_ns() if orphans or code is None else self._silent_at
        if code is None or orphans:
            self.kill_all()
        return Ended(code, tuple(self.lines), orphans and code is not None, gone_at)

    def kill_all(self) -> None:
        """Whatever of it is left."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._listener.join(GONE_SECONDS)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as said:
            for text in said:
                self.lines.append(Line(time.monotonic_ns(), text.rstrip("\n")))
        self._silent_at = time.monotonic_ns()


@dataclass(frozen=True)
class Ended:
    """How a command ended. `code`: None where it ran for too long; negative is the signal that killed it. `orphans`:
    processes of its outlived it. `gone_at_nanoseconds`: when all were gone."""

    code: int | None
    lines: tuple[Line, ...]
    orphans: bool
    gone_at_nanoseconds: int

    def find(self, pattern: str) -> Line | None:
        """The first line with a match of a regular expression."""
        return next((line for line in self.lines if re.search(pattern, line.text)), None)

    def end(self, count: int = 30) -> str:
        """The last lines, to show."""
        return "\n".join(line.text for line in self.lines[-count:])


@dataclass(frozen=True)
class SmallRun:
    """One run of the drill, in `folder`, on so many ranks of this machine. `settings`: `section.key` -> value."""

    folder: Path
    corpus: Path
    ranks: int
    steps: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def config_path(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def record_dir(self) -> Path:
        """What its ranks note."""
        return self.folder / "record"

    @property
    def checkpoints_dir(self) -> Path:
        return Path(self.settings.get("checkpoint.dir", self.run_dir / "checkpoints"))

    def prepare(self) -> None:
        """Its folders, its config, and a plan that nothing strikes."""
        self.record_dir.mkdir(parents=True)
        write_plan(self.record_dir, [])
        values = {
            **_RUN,
            "train.steps": self.steps,
            "data.corpus": str(self.corpus),
            "parallel.tensor": 2 if self.ranks % 2 == 0 and self.ranks > 2 else 1,
            "launch.run_dir": str(self.run_dir),
            **self.settings,
        }
        sections: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            section, _, key = name.partition(".")
            sections.setdefault(section, {})[key] = value
        self.config_path.write_text(json.dumps(sections, indent=1))  # JSON is YAML

    def start(self, machine: int = 0, machines: int = 1) -> Command:
        """The command, again or for the first time; its ranks are struck by the plan in `record_dir`.

        With several `machines`, which all are this one, each has its part of the ranks and an agent of its own.
        """
        words = ["train", str(self.config_path), "--nproc", str(self.ranks // machines)]
        if machines > 1:
            addresses = ",".join(f"127.0.0.{1 + number}" for number in range(machines))
            words += ["--hosts", addresses, "--node", str(machine)]
        return Command((sys.executable, "-m", "launch.drills.job", str(self.record_dir), *words))

    def config(self) -> RunConfig:
        """As the command reads it."""
        return load_run(self.config_path).config


def build_small_corpus(folder: Path) -> None:
    """Some of Python's own sources as bytes, a tenth held out."""
    from data_tools.build import build_corpus

    stdlib = Path(sysconfig.get_path("stdlib"))
    sources = [path for path in sorted(stdlib.glob("*.py")) if 0 < path.stat().st_size < LARGEST_SOURCE_BYTES]
    build_corpus(sources, folder, "bytes", validation_fraction=0.1, chunk_tokens=CHUNK_TOKENS)
