"""The batch script of a run: a cluster's settings and a run's folder -> text for sbatch.

Pure but for reading the template. Whatever came from a user is quoted, and secrets are never in the text.
"""

import math
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.cluster.settings import WHOLE_NODE, ClusterConfig
from launch.cluster.slurm import render_time

TEMPLATE = Path(__file__).resolve().parents[2] / "slurm" / "job.sbatch"
JOB_CONFIG = "job.yaml"
LOG = "job-%j.out"
RANK_LOG = "job-%j-rank-%t.out"
"""As `gptdist logs` finds them."""
TASK_GRACE_SECONDS = 60
"""After the first task has ended, how long srun leaves the others before it kills them."""


@dataclass(frozen=True)
class Job:
    """A run that is to be submitted: its folder and the folder that its paths start from, both absolute.

    `python`: the interpreter of whoever submits, for clusters that name none. `min_nodes`: fewer nodes will do.
    """

    name: str
    run_dir: Path
    work_dir: Path
    python: str
    min_nodes: int | None = None


def render_job_script(cluster: ClusterConfig, job: Job) -> str:
    """The whole script."""
    python = f"{_absolute(cluster.venv)}/bin/python" if cluster.venv else job.python
    parts = {
        "LOGIN": " -l" if cluster.modules else "",  # defines `module`
        "OPTIONS": "\n".join(f"#SBATCH --{option}" for option in _options(cluster, job)),
        "RUN": shlex.quote(str(job.run_dir)),
        "WORK_DIR": shlex.quote(str(job.work_dir)),
        "SETUP": "".join(f"{line}\n" for line in _setup(cluster)),
        "SRUN": " \\\n    ".join(_srun(cluster, job, python)),
        "PYTHON": shlex.quote(python),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"@([A-Z_]+)@", lambda match: parts[match.group(1)], template)


def _options(cluster: ClusterConfig, job: Job) -> Iterator[str]:
    yield f"job-name={job.name}"
    yield f"output={_quote_option(str(job.run_dir / 'logs' / LOG))}"
    yield "open-mode=append"
    for name in ("partition", "account", "qos", "constraint"):
        value = getattr(cluster, name)
        if value:
            yield f"{name}={_quote_option(value)}"
    fewer = job.min_nodes is not None and job.min_nodes < cluster.nodes
    yield f"nodes={f'{job.min_nodes}-' if fewer else ''}{cluster.nodes}"
    if fewer:
        # With a number of tasks, Slurm counts those of the fewest nodes and may look for no more nodes than hold them.
        yield f"mincpus={cluster.ranks_of_node * (cluster.cpus_per_rank or 1)}"
    else:
        yield f"ntasks-per-node={cluster.ranks_of_node}"
        if cluster.cpus_per_rank:
            yield f"cpus-per-task={cluster.cpus_per_rank}"
    if cluster.gpus_per_node:
        yield f"gres=gpu:{f'{cluster.gpu_type}:' if cluster.gpu_type else ''}{cluster.gpus_per_node}"
    if cluster.memory is not None:
        yield "mem=0" if cluster.memory == WHOLE_NODE else f"mem={math.ceil(int(cluster.memory) / 2**20)}M"
    if cluster.exclusive:
        yield "exclusive"
    if cluster.time_limit:
        yield f"time={render_time(cluster.time_limit)}"
    yield f"signal=B:USR1@{math.ceil(cluster.signal_before_limit)}"
    yield "requeue"
    for option in cluster.sbatch_options:
        name, equals, value = option.removeprefix("--").partition("=")
        yield f"{name}{equals}{_quote_option(value)}"


def _setup(cluster: ClusterConfig) -> Iterator[str]:
    if cluster.modules:
        yield f"module load {shlex.join(cluster.modules)} || exit"
    if cluster.venv:
        yield f"export PATH={shlex.quote(_absolute(cluster.venv) + '/bin')}:$PATH"
    if cluster.scratch:
        yield f"export TMPDIR={_scratch(cluster.scratch)}"
    for name, value in cluster.env.items():
        yield f"export {name}={shlex.quote(value)}"
    if cluster.secrets_file:
        yield f"set -a; . {shlex.quote(_absolute(cluster.secrets_file))} || exit; set +a"


def _srun(cluster: ClusterConfig, job: Job, python: str) -> Iterator[str]:
    """The command, one option or so on each line."""
    ranks = cluster.ranks_of_node
    yield f'srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$((SLURM_JOB_NUM_NODES * {ranks}))" --ntasks-per-node={ranks}'
    yield (f"--cpus-per-task={cluster.cpus_per_rank} " if cluster.cpus_per_rank else "") + (
        f"--mpi={cluster.mpi} --kill-on-bad-exit=0 --wait={TASK_GRACE_SECONDS}"
    )
    yield f'--open-mode=append --output="$run/logs/{RANK_LOG}"'
    yield from _container(cluster, job)
    interpreter = cluster.container.python if cluster.container else python
    yield f'{shlex.quote(interpreter)} "$run/code" train "$run/{JOB_CONFIG}"'


def _container(cluster: ClusterConfig, job: Job) -> Iterator[str]:
    container = cluster.container
    if container is None:
        return
    own = dict.fromkeys(str(folder) for folder in (job.run_dir, job.work_dir))
    mounts = [*(f"{folder}:{folder}" for folder in own), *container.mounts]
    image = os.path.expanduser(container.image)
    if container.kind == "pyxis":
        yield f"--container-image={shlex.quote(image)}"
        yield f"--container-mounts={shlex.quote(','.join(_two_ended(mount) for mount in mounts))}"
        yield shlex.join([f"--container-workdir={job.work_dir}", *container.options])
        return
    gpus = ["--nv"] if cluster.gpus_per_node else []
    yield shlex.join(["apptainer", "exec", *gpus, "--pwd", str(job.work_dir), *container.options])
    yield shlex.join([word for mount in mounts for word in ("--bind", mount)])
    yield shlex.quote(image)


def _two_ended(mount: str) -> str:
    return mount if ":" in mount else f"{mount}:{mount}"


def _absolute(path: str) -> str:
    return os.path.abspath(os.path.expanduser(path))


def _scratch(pattern: str) -> str:
    """`/scratch/%u/%j` as shell text."""
    variables = {"%j": '"$SLURM_JOB_ID"', "%u": '"$USER"'}
    return "".join(variables.get(part) or shlex.quote(part) for part in re.split("(%[ju])", pattern) if part)


def _quote_option(value: str) -> str:
    """As the lines of `#SBATCH` are read: in double quotes, where a backslash takes the next character as it is."""
    if re.fullmatch(r"[\w./:=,@%+-]*", value, re.ASCII):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def job_name(run_dir: Path) -> str:
    """A name for Slurm's lists: the folder's, in letters that need no quotes."""
    return re.sub(r"[^A-Za-z0-9_.+-]+", "_", run_dir.name).strip("_") or "gptdist"


def check_paths(paths: Sequence[Path], in_container: bool) -> Iterator[str]:
    """What in the paths of a job a batch script, or a container, cannot hold."""
    for path in paths:
        text = str(path)
        if not text.isprintable() or re.search(r"[\\%]", text):
            yield (
                f"the folder {text!r} has a line break, an invisible character, a backslash or a percent sign in its "
                "path; Slurm gives them another meaning in names of logs. Use another folder: --run-dir."
            )
        elif in_container and re.search("[:,]", text):
            yield (
                f"the folder {text!r} has a colon or a comma in its path, which divide the mounts of a container. Use "
                "another folder: --run-dir."
            )
