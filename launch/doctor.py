"""`gptdist doctor`: what this machine has, and what that means for training. Looks, and changes nothing.

Every line is `ok`, `absent` with what it means, or `PROBLEM` with a remedy; only a PROBLEM makes the exit code 1.
Anything that might hang or crash is asked in a process of its own, with a time limit.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gptdist.errors import EXIT_DONE, EXIT_FAILED

NEEDED = (
    "torch",
    "deepspeed",
    "megatron-core",
    "webdataset",
    "tokenizers",
    "safetensors",
    "pydantic",
    "numpy",
    "pyyaml",
)
WATCHING = ("tensorboard", "rich", "wandb")
ABSENT_MEANS = {
    "tensorboard": "no curves; the JSON lines file still has every number",
    "rich": "no progress bar",
    "wandb": "optional: pip install 'gptdist[wandb]' to log to Weights & Biases",
}
SMALLEST_SHM_BYTES = 64 << 20
SMALLEST_DISK_BYTES = 2 << 30
PROBE_SECONDS = 180

ENGINES_PROBE = """
import json, logging, warnings
warnings.simplefilter("ignore"); logging.disable(logging.WARNING)
import torch, deepspeed, megatron.core
import gptdist.engine.engine
gpus = []
for index in range(torch.cuda.device_count()):
    properties = torch.cuda.get_device_properties(index)
    gpus.append([properties.name, properties.total_memory, properties.major >= 8])
print("PROBE" + json.dumps({"gpus": gpus, "cuda": torch.version.cuda, "nccl": torch.distributed.is_nccl_available()}))
"""
GLOO_PROBE = """
import sys
from launch.ranks.local import launch_local
def add_ones(world, payload):
    import torch, torch.distributed as dist
    from launch.rendezvous import join, leave
    join(world, 30.0, "cpu")
    total = torch.ones(1)
    dist.all_reduce(total)
    leave()
    return 0 if total.item() == world.world_size else 1
sys.exit(launch_local(2, add_ones, preload=("torch.distributed",), timeout_seconds=60))
"""
MPI_PROBE = """
from mpi4py import MPI
print("PROBE" + MPI.Get_library_version().splitlines()[0].strip(" \\0"))
"""


@dataclass(frozen=True)
class Finding:
    """One line. `state`: ok, absent or PROBLEM."""

    subject: str
    state: str
    text: str


def main(args: argparse.Namespace) -> int:
    """Print each finding as it comes; exit 1 only if something needed is broken."""
    problems = 0
    for finding in examine():
        problems += finding.state == "PROBLEM"
        print(render_finding(finding), flush=True)
    print(render_conclusion(problems))
    return EXIT_FAILED if problems else EXIT_DONE


def render_doctor() -> tuple[str, int]:
    """All findings as text, and the exit code."""
    findings = list(examine())
    problems = sum(finding.state == "PROBLEM" for finding in findings)
    text = "\n".join([*map(render_finding, findings), render_conclusion(problems)])
    return text, EXIT_FAILED if problems else EXIT_DONE


def render_finding(finding: Finding) -> str:
    """One line, its columns aligned with the other lines'."""
    return f"{finding.subject:<13}  {finding.state:<7}  {finding.text}"


def render_conclusion(problems: int) -> str:
    """The last line."""
    return f"{problems} to mend." if problems else "Everything that training here needs works."


def examine() -> Iterator[Finding]:
    """Every check in turn."""
    yield _python()
    for name in NEEDED:
        yield _package(name, "PROBLEM", f"not installed: pip install {name}, or install gptdist again")
    for name in WATCHING:
        yield _package(name, "absent", ABSENT_MEANS[name])
    yield _processor()
    yield from _engines()
    yield _gloo()
    yield _mpi()
    yield _slurm()
    yield _disk(Path.cwd())
    yield _shared_memory(Path("/dev/shm"))


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _package(name: str, otherwise: str, meaning: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, otherwise, meaning)


def _processor() -> Finding:
    from launch.ranks.warm import available_cores

    cores = available_cores()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Finding(
        "processor", "ok", f"{cores} cores, {render_bytes(memory)} of memory: --nproc {cores} keeps them busy"
    )


def _engines() -> Iterator[Finding]:
    code, said, complaint = _probe(ENGINES_PROBE)
    if code:
        yield Finding("engines", "PROBLEM", f"torch, deepspeed and megatron-core do not import together: {complaint}")
        return
    found = json.loads(said)
    yield Finding("engines", "ok", "torch, deepspeed and megatron-core import and fit together")
    if not found["gpus"]:
        built = f"built for CUDA {found['cuda']}, but no GPU is visible" if found["cuda"] else "built without CUDA"
        yield Finding("gpu", "absent", f"torch is {built}: training runs on the processor, with gloo, in fp32 or bf16")
        return
    for index, (name, memory, bf16) in enumerate(found["gpus"]):
        precision = "bf16" if bf16 else "no bf16: set train.precision to fp16"
        yield Finding(f"gpu {index}", "ok", f"{name}, {render_bytes(memory)}, {precision}")
    if found["nccl"]:
        yield Finding("nccl", "ok", "GPUs exchange gradients with it")
    else:
        yield Finding("nccl", "PROBLEM", "this torch has GPUs but no NCCL: install a Linux CUDA build of torch")


def _gloo() -> Finding:
    code, _, complaint = _probe(GLOO_PROBE)
    if code:
        return Finding("gloo", "PROBLEM", f"two ranks on this machine could not add two numbers: {complaint}")
    return Finding("gloo", "ok", "two ranks were started here and exchanged a tensor over loopback")


def _mpi() -> Finding:
    if importlib.util.find_spec("mpi4py") is None:
        return Finding(
            "mpi", "absent", "mpi4py is not installed: ranks cannot be started with mpirun; --nproc, torchrun, srun can"
        )
    code, said, _ = _probe(MPI_PROBE)
    if code:
        meaning = "mpirun cannot start ranks; --nproc, torchrun and srun need no MPI"
        return Finding("mpi", "absent", f"mpi4py {_version('mpi4py')} finds no MPI library (libmpi): {meaning}")
    runner = shutil.which("mpirun") or shutil.which("mpiexec")
    return Finding(
        "mpi", "ok", f"{said}; {f'started by {runner}' if runner else 'but neither mpirun nor mpiexec is on PATH'}"
    )


def _slurm() -> Finding:
    if not (shutil.which("srun") and shutil.which("sinfo")):
        return Finding("slurm", "absent", "no srun and sinfo on PATH: jobs run on this machine only")
    try:
        answer = subprocess.run(
            ["sinfo", "--noheader", "--format=%D %T"], capture_output=True, text=True, timeout=10, check=False
        )
    except subprocess.TimeoutExpired:
        return Finding("slurm", "absent", "srun is installed, but the controller did not answer within 10 s")
    if answer.returncode:
        return Finding("slurm", "absent", f"srun is installed, but no cluster answers: {_last_line(answer.stderr)}")
    nodes = ", ".join(line.strip() for line in answer.stdout.splitlines() if line.strip())
    inside = f"; inside job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
    return Finding("slurm", "ok", f"nodes: {nodes or 'none'}{inside}; `srun gptdist train CONFIG` is one rank a task")


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    if free < SMALLEST_DISK_BYTES:
        return Finding(
            "disk", "PROBLEM", f"{render_bytes(free)} free at {folder}: runs and checkpoints will not fit; free some"
        )
    return Finding("disk", "ok", f"{render_bytes(free)} free at {folder}")


def _shared_memory(folder: Path) -> Finding:
    if not folder.is_dir():
        return Finding("shared memory", "absent", f"no {folder}: NCCL between GPUs of one node would be slow or fail")
    usage = shutil.disk_usage(folder)
    if usage.free < SMALLEST_SHM_BYTES:
        remedy = "start the container with --shm-size=1g or more; NCCL dies of a bus error without"
        return Finding("shared memory", "PROBLEM", f"{render_bytes(usage.free)} free at {folder}: {remedy}")
    return Finding("shared memory", "ok", f"{render_bytes(usage.free)} free at {folder}")


def render_bytes(count: float) -> str:
    """`15.6 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def _probe(source: str) -> tuple[int, str, str]:
    """Exit code, what was printed after PROBE, and the last line of complaint of a small program run apart."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        answer = subprocess.run(
            [sys.executable, "-c", source],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        return 1, "", f"no answer within {PROBE_SECONDS} s"
    said = next((line.removeprefix("PROBE") for line in answer.stdout.splitlines() if line.startswith("PROBE")), "")
    return answer.returncode, said, _last_line(answer.stderr)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "without a word"


def _version(name: str) -> str:
    return importlib.metadata.version(name)
