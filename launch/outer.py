"""From an outer launcher's environment (torchrun, mpirun, srun) to a `World`; None where we are nobody's rank.

Holds the table of every launcher's variables. Pure: it is handed an environment, opens no socket and imports no MPI.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gptdist.errors import ConfigError, LaunchError
from gptdist.world import World
from launch.cluster.slurm_notation import first_host, tasks_per_node
from launch.ranks.place import Allocation, Place

LOOPBACK = "127.0.0.1"
CONTROL_PORTS = 16
"""Ports where the lead of several agents may listen: the first of them that is free."""
SLURM_PSEUDO_STEPS = 0xFFFFFFF0
"""Step ids from here on are Slurm's own (batch script, interactive shell, extern): not a task of a parallel step."""


@dataclass(frozen=True)
class Launcher:
    """What one launcher calls our things; of several names the first that is set counts. `marks`: all set = it started
    us."""

    name: str
    marks: tuple[str, ...]
    global_rank: tuple[str, ...]
    world_size: tuple[str, ...]
    local_rank: tuple[str, ...]
    local_world_size: tuple[str, ...] = ()
    node_rank: tuple[str, ...] = ()


# Order matters: torchrun runs inside Slurm and MPI jobs; mpirun starts its daemons with srun, so SLURM_* are set below
# it as well; and srun --mpi=pmi2 sets PMI_RANK, which alone says nothing about mpirun.
LAUNCHERS = (
    Launcher(
        name="torchrun",
        marks=("RANK", "WORLD_SIZE"),
        global_rank=("RANK",),
        world_size=("WORLD_SIZE",),
        local_rank=("LOCAL_RANK",),
        local_world_size=("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
        node_rank=("GROUP_RANK", "CROSS_RANK"),
    ),
    Launcher(
        name="mpirun (Open MPI)",
        marks=("OMPI_COMM_WORLD_RANK",),
        global_rank=("OMPI_COMM_WORLD_RANK",),
        world_size=("OMPI_COMM_WORLD_SIZE",),
        local_rank=("OMPI_COMM_WORLD_LOCAL_RANK",),
        local_world_size=("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(
        name="mpirun (MVAPICH)",
        marks=("MV2_COMM_WORLD_RANK",),
        global_rank=("MV2_COMM_WORLD_RANK",),
        world_size=("MV2_COMM_WORLD_SIZE",),
        local_rank=("MV2_COMM_WORLD_LOCAL_RANK",),
        local_world_size=("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(
        name="mpiexec (MPICH, Intel MPI)",
        marks=("PMI_RANK", "MPI_LOCALRANKID"),
        global_rank=("PMI_RANK",),
        world_size=("PMI_SIZE",),
        local_rank=("MPI_LOCALRANKID",),
        local_world_size=("MPI_LOCALNRANKS",),
    ),
    Launcher(
        name="srun",
        marks=("SLURM_PROCID", "SLURM_STEP_ID"),
        global_rank=("SLURM_PROCID",),
        world_size=("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
        local_rank=("SLURM_LOCALID",),
        node_rank=("SLURM_NODEID",),
    ),
    Launcher(
        name="an MPI launcher",
        marks=("PMI_RANK", "PMI_SIZE"),
        global_rank=("PMI_RANK",),
        world_size=("PMI_SIZE",),
        local_rank=("MPI_LOCALRANKID",),
        local_world_size=("MPI_LOCALNRANKS",),
    ),
)


def find_world(env: Mapping[str, str], *, nproc: int | None = None, port: int = 0) -> World | None:
    """This process's place if an outer launcher started it as one of several ranks, else None: then start ranks here.

    `nproc`: ranks asked for on the command line; a lone outer task may start them, one of several may not
    (ConfigError). `port`: where ranks should meet, 0 for the launcher's own choice. With mpirun the address is settled
    in `join`. Raises LaunchError where the launcher's variables are missing or contradict each other.
    """
    launcher = next((found for found in LAUNCHERS if all(env.get(mark) for mark in found.marks)), None)
    if launcher is None or (
        launcher.name == "srun" and _number(env, launcher, ("SLURM_STEP_ID",)) >= SLURM_PSEUDO_STEPS
    ):
        return None
    world = _read_world(env, launcher, port)
    if nproc is not None and nproc > 1 and world.world_size > 1:
        raise ConfigError(
            f"--nproc {nproc} asks for ranks to be started here, but this process already is rank {world.global_rank} "
            f"of {world.world_size} under {launcher.name}. Drop --nproc, or start one task only."
        )
    if world.world_size == 1 and nproc is not None:
        return None
    return world


def count_nodes(env: Mapping[str, str]) -> int | None:
    """The nodes of the step that srun started this process in; None where it did not, or does not say."""
    names = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    found = next((env[name] for name in names if env.get(name)), "")
    return int(found) if env.get("SLURM_STEP_ID") and found.isdecimal() else None


def find_place(env: Mapping[str, str], world: World, port: int, key_file: Path) -> Place | None:
    """Where an agent that starts this one rank stands, under a launcher that leaves restarts to us; None under others.

    `world`: of `find_world`. `port`: launch.port, which is where ranks meet; agents then meet above it.
    """
    if world.launcher != "srun":
        return None
    launcher = next(found for found in LAUNCHERS if found.name == "srun")
    first = port + 1 if port else _slurm_port(env, launcher)
    step = _number(env, launcher, ("SLURM_STEP_ID",))
    allocation = find_allocation(env)
    return Place(
        world_size=world.world_size,
        first_rank=world.global_rank,
        first_local_rank=world.local_rank,
        local_world_size=world.local_world_size,
        node_rank=world.node_rank,
        launcher=world.launcher,
        lead_host=world.master_address,
        lead_ports=tuple(range(first, first + CONTROL_PORTS)),
        identity=f"{allocation.name}, step {step}, restart {allocation.restart}",
        key_file=key_file,
        host=world.host,
    )


def find_allocation(env: Mapping[str, str]) -> Allocation:
    """The job that an srun task belongs to."""
    launcher = next(found for found in LAUNCHERS if found.name == "srun")
    job = _number(env, launcher, ("SLURM_JOB_ID", "SLURM_JOBID"))
    restart = _number(env, launcher, ("SLURM_RESTART_COUNT",)) if env.get("SLURM_RESTART_COUNT") else 0
    return Allocation(f"slurm {job}", restart, can_requeue=True)


def _read_world(env: Mapping[str, str], launcher: Launcher, port: int) -> World:
    world_size = _number(env, launcher, launcher.world_size)
    global_rank = _number(env, launcher, launcher.global_rank)
    local_rank = _number(env, launcher, launcher.local_rank)
    if launcher.name == "srun":
        local_world_size = _slurm_local_size(env, launcher, world_size)
    else:
        local_world_size = _number(env, launcher, launcher.local_world_size)
    node_rank = global_rank // max(1, local_world_size)
    if any(env.get(name) for name in launcher.node_rank):
        node_rank = _number(env, launcher, launcher.node_rank)
    if not (0 <= global_rank < world_size and 0 <= local_rank < local_world_size <= world_size):
        raise LaunchError(
            f"{launcher.name} says rank {global_rank} of {world_size}, local rank {local_rank} of {local_world_size}: "
            "a rank must be below its size, and a node cannot hold more ranks than there are. Look for stale "
            f"{', '.join((*launcher.global_rank, *launcher.world_size, *launcher.local_rank))} in the environment."
        )
    address, own_port = _meeting_point(env, launcher, world_size == local_world_size, port)
    world = World(global_rank, world_size, local_rank, local_world_size, node_rank, address, own_port, launcher.name)
    # What the scheduler excludes is a name of its own for a node, which need not be the machine's.
    node = env.get("SLURMD_NODENAME") if launcher.name == "srun" else None
    return replace(world, host=node) if node else world


def _meeting_point(env: Mapping[str, str], launcher: Launcher, one_node: bool, port: int) -> tuple[str, int]:
    if launcher.name == "torchrun":
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
        if missing:
            raise LaunchError(_missing(launcher, missing))
        return env["MASTER_ADDR"], _number(env, launcher, ("MASTER_PORT",))
    if launcher.name != "srun":
        return "", port  # rank 0 picks it and broadcasts it over MPI, in join()
    if not port:
        port = _slurm_port(env, launcher)
    if one_node:
        return LOOPBACK, port
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")
    nodes = next((env[name] for name in names if env.get(name)), None)
    if nodes is None:
        raise LaunchError(_missing(launcher, names))
    return first_host(nodes), port


def _slurm_port(env: Mapping[str, str], launcher: Launcher) -> int:
    """Stable over a step, different between jobs on a shared node, below the ports that Linux hands out by itself."""
    job = _number(env, launcher, ("SLURM_JOB_ID", "SLURM_JOBID"))
    return 10240 + (37 * job + _number(env, launcher, ("SLURM_STEP_ID",))) % 20000


def _slurm_local_size(env: Mapping[str, str], launcher: Launcher, world_size: int) -> int:
    node_rank = _number(env, launcher, ("SLURM_NODEID",))
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if env.get(name):
            sizes = tasks_per_node(env[name])
            if sum(sizes) == world_size and node_rank < len(sizes):
                return sizes[node_rank]  # the job's own value differs from a smaller step's: then it does not add up
    if env.get("SLURM_NTASKS_PER_NODE"):
        return min(world_size, _number(env, launcher, ("SLURM_NTASKS_PER_NODE",)))
    if world_size == 1:
        return 1
    raise LaunchError(
        f"srun started {world_size} tasks, but SLURM_STEP_TASKS_PER_NODE "
        f"({env.get('SLURM_STEP_TASKS_PER_NODE') or env.get('SLURM_TASKS_PER_NODE') or 'not set'}) does not say how "
        f"many are on node {node_rank}. Start the ranks with srun itself, and pass its environment on unchanged."
    )


def _number(env: Mapping[str, str], launcher: Launcher, names: tuple[str, ...]) -> int:
    name = next((name for name in names if env.get(name)), None)
    if name is None:
        raise LaunchError(_missing(launcher, names))
    if not env[name].strip().isdecimal():
        raise LaunchError(f"{name} is {env[name]!r}, but {launcher.name} sets it to a whole number. Unset or mend it.")
    return int(env[name])


def _missing(launcher: Launcher, names: tuple[str, ...] | list[str]) -> str:
    return (
        f"{', '.join(launcher.marks)} say that {launcher.name} started this process, but {' or '.join(names)} is not "
        f"set. Start it with {launcher.name} itself, or unset {launcher.marks[0]}."
    )
