"""Runs on the lab: submitted by the command, watched by `gptdist status`, compared by `gptdist ckpt diff`.

Knows the commands and the small run that these tests share. A step of it takes a good part of a second on two busy
cores, so that there is time to break things.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.cluster.slurm_lab import Said, SlurmLab, wait_until
from tests.dist.commands import TINY_RUN, last_step, render_run

ROOT = Path(__file__).resolve().parents[2]
LAB = ROOT / "configs" / "clusters" / "lab.yaml"
RUN: dict[str, Any] = {
    **TINY_RUN,
    "model.hidden_size": 64,
    "train.steps": 120,
    "train.global_batch_size": 24,
    "train.micro_batch_size": 1,
    "checkpoint.interval": 10,
    "checkpoint.keep": 20,
}


class SlurmRun:
    """One run of a test, in `folder`. `settings`: `section.key` -> value, over those of RUN."""

    def __init__(self, lab: SlurmLab, folder: Path, corpus: Path, settings: Mapping[str, Any]) -> None:
        self.lab = lab
        self.run_dir = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.config = folder.with_name(f"{folder.name}.yaml")
        values = {**RUN, "data.corpus": str(corpus), "launch.run_dir": str(folder), **settings}
        self.config.write_text(render_run(values))

    def gptdist(self, *words: object, timeout_seconds: float = 120.0) -> Said:
        """A command on the login node."""
        command = (sys.executable, "-m", "launch.cli", *words)
        return self.lab.run(*command, cwd=self.run_dir.parent, timeout_seconds=timeout_seconds)

    def submit(self, *words: object) -> list[str]:
        """The ids of its jobs."""
        said = self.gptdist("submit", self.config, "--cluster", LAB, *words).expect().out
        line = next(line for line in said.splitlines() if line.startswith("job "))
        return line.removeprefix("job").split(";")[0].strip().split(" then ")

    def status(self) -> dict[str, Any]:
        """What `gptdist status` says."""
        shown: dict[str, Any] = json.loads(self.gptdist("status", self.run_dir, "--json").expect().out)
        return shown

    def await_status(self, *states: str, timeout_seconds: float = 90.0) -> dict[str, Any]:
        """Wait until it says one of `states`; what it said then."""
        shown: dict[str, Any] = {}

        def is_so() -> bool:
            shown.update(self.status())
            return shown["state"] in states

        # The command takes as much of a core as the run that it looks at.
        wait_until(is_so, timeout_seconds, f"the run to be {' or '.join(states)}", self.told, poll_seconds=1.5)
        return shown

    def await_step(self, step: int, timeout_seconds: float = 120.0) -> None:
        """Wait until the log has it."""
        wait_until(lambda: last_step(self.run_dir) >= step, timeout_seconds, f"step {step}", self.told)

    def told(self) -> str:
        """What there is to know of a run that went wrong."""
        logs = [f"== {path}\n{path.read_text()[-3000:]}" for path in sorted((self.run_dir / "logs").glob("*"))]
        return "\n".join([self.gptdist("status", self.run_dir).out, *logs, self.lab.log("slurmctld")])
