"""A stage on a real Slurm of several nodes, which boots on this machine: a run submitted as users do, and its end.

The lab itself belongs to the tests, and so is there in a clone only. Knows how a run is submitted, followed and started
again by hand; which faults there are is `lab_faults.py`'s.
"""

import importlib.util
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptdist.errors import GptdistError
from launch.drills.certificate import Finding
from launch.drills.rank_faults import Strike, read_trained, write_plan
from launch.drills.same_run import Reference, steps_lost
from launch.drills.small_run import SmallRun
from launch.drills.stage import COMPUTING, EARLIEST, Noticed, Unexpected
from launch.runs.attempts import Attempt, read_attempts

NODES = 3
RANKS = 4
"""Two on each of two nodes; the third node is there to take the place of one."""
PACE_SECONDS = 0.5
"""Of the steps in which faults strike, so that there is time for them."""
LIMIT_SECONDS = 300.0
_ROOT = Path(__file__).resolve().parents[2]
_LAB = _ROOT / "tests" / "cluster" / "slurm_lab.py"
_CLUSTER = _ROOT / "configs" / "clusters" / "lab.yaml"
_SETTLED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL")
_POLL_SECONDS = 0.2

# In the place of the run's own code/__main__.py: ranks are drilled, and nothing else is.
_MAIN = """import sys
from launch import cli
from launch.drills.job import main
record_dir = {record_dir!r}
if sys.argv[1] == "train":
    sys.argv.insert(1, record_dir)
    sys.exit(main())
sys.exit(cli.main())
"""


def lab_problem() -> str | None:
    """Why there can be no lab here; None where there can."""
    if not _LAB.exists():
        return "needs a clone of the repository: the lab is in its tests"
    problem: str | None = _lab_module().why_not()
    return problem


@contextmanager
def boot_lab(folder: Path) -> Iterator[Any]:
    """A SlurmLab; nothing is left of it afterwards."""
    module = _lab_module()
    folder.mkdir()
    path = f"{Path(sys.executable).parent}:{module.SYSTEM_PATH}"
    with module.SlurmLab(folder, NODES, env={"PATH": path, "PYTHONPATH": str(_ROOT)}) as lab:
        yield lab


@dataclass
class LabStage:
    """`folder`: of one fault alone. What is drawn depends on the seed and the fault."""

    lab: Any
    folder: Path
    reference: Reference
    draw: random.Random
    run: SmallRun = field(init=False)
    job: str = ""
    struck_at: float = 0.0

    def __post_init__(self) -> None:
        self.folder.mkdir()
        self.run = SmallRun(self.folder, self.reference.run.corpus, RANKS, self.reference.run.steps)

    def submit(self, *words: str, pace_seconds: float = PACE_SECONDS) -> None:
        """The run, as a job whose ranks note what they do, and take their time when faults may strike."""
        self.run.prepare()
        everyone = tuple(range(RANKS))
        write_plan(self.run.record_dir, [Strike("be slow", everyone, EARLIEST, COMPUTING, seconds=pace_seconds)])
        options = ("cluster.sbatch_options=[--hold]", *words)
        said = self._gptdist("submit", str(self.run.config_path), "--cluster", str(_CLUSTER), *options)
        line = next(line for line in said.splitlines() if line.startswith("job "))
        self.job = line.removeprefix("job").split(";")[0].strip()
        main = _MAIN.format(record_dir=str(self.run.record_dir))
        (self.run.run_dir / "code" / "__main__.py").write_text(main)
        self.lab.run("scontrol", "release", self.job).expect()

    def strike(self, what: Callable[[], object]) -> None:
        """Once the run is where faults strike."""
        step = EARLIEST + self.draw.randint(1, 6)
        self._await(lambda: bool(self._last_step() >= step), f"step {step}")
        self.struck_at = time.time()
        what()

    def hosts(self) -> list[str]:
        """The nodes of the job, in order; the first runs its script."""
        found: list[str] = self.lab.hosts(self.job)
        return found

    def kill(self, name: str, host: str) -> None:
        """kill -9 of all processes of this name on a node; no other machine's can be seen there."""
        number = int(host.removeprefix("node"))
        self.lab.run("pkill", "-KILL", "--exact", name, node=number).expect()

    def await_end(self) -> list[Attempt]:
        """Until the run is done, submitted again by hand where its job has ended and nothing comes of it."""
        self._await(lambda: self._is_done() or self._job_state() in _SETTLED, "the run's end")
        if not self._is_done():
            script = self.run.run_dir / "job.sbatch"
            self.job = self.lab.run("sbatch", "--parsable", "--hold", script).expect().out.strip()
            self.lab.run("scontrol", "release", self.job).expect()
            self._await(lambda: self._is_done() or self._job_state() in _SETTLED, "its end, submitted by hand")
        if not self._is_done():
            raise Unexpected(f"the job ended as {self._job_state()}, and the run is not done:\n{self._told()}")
        return read_attempts(self.run.run_dir)

    def noticed(self, attempt: Attempt) -> Noticed:
        """As the record of attempts has it."""
        after = None if attempt.ended is None or not self.struck_at else attempt.ended - self.struck_at
        return Noticed(attempt.reason or "killed without a word; Slurm started the job again", after)

    def finding(self, title: str, happen: Callable[["LabStage"], Noticed]) -> Finding:
        """What comes of a fault."""
        started = time.perf_counter()
        noticed, problem = Noticed(""), None
        try:
            self.lab.clear()
            noticed = happen(self)
            problem = self.reference.problem(self.run)
        except (Unexpected, GptdistError, TimeoutError, AssertionError) as error:
            problem = str(error)
        seconds = time.perf_counter() - started
        lost = steps_lost(self.run)
        return Finding(
            title, noticed=noticed.words, problem=problem, seconds=seconds, after=noticed.after, steps_lost=lost
        )

    def _gptdist(self, *words: str) -> str:
        """A command on the login node."""
        out: str = self.lab.run(sys.executable, "-m", "launch.cli", *words, cwd=self.folder).expect().out
        return out

    def _is_done(self) -> bool:
        attempts = read_attempts(self.run.run_dir)
        return bool(attempts) and attempts[-1].action == "done"

    def _job_state(self) -> str:
        return str(self.lab.job(self.job)["JobState"])

    def _last_step(self) -> int:
        return max((trained.step for trained in read_trained(self.run.record_dir, 0)), default=0)

    def _await(self, happened: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_SECONDS
        while not happened():
            if time.monotonic() > deadline:
                raise Unexpected(f"waited {LIMIT_SECONDS:.0f} s in vain for {what}:\n{self._told()}")
            time.sleep(_POLL_SECONDS)

    def _told(self) -> str:
        logs = sorted((self.run.run_dir / "logs").glob("*"))
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in logs)


def _lab_module() -> Any:
    name = "gptdist_slurm_lab"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _LAB)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]
