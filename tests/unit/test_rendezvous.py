"""From fake launcher environments to a World, without any launcher: grids over nodes, ranks and launchers."""

import itertools
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptdist.errors import ConfigError, LaunchError
from gptdist.world import World
from launch.cluster.slurm_notation import first_host, tasks_per_node
from launch.outer import find_world
from launch.rendezvous import LOOPBACK, open_listener

NODES = ([1], [2], [4], [2, 2], [3, 1], [2, 2, 2, 1])


def places(nodes: list[int]) -> Iterator[tuple[int, int, int]]:
    """(global rank, node rank, local rank) of every rank, nodes filled in order."""
    pairs = [(node, local) for node, size in enumerate(nodes) for local in range(size)]
    yield from ((global_rank, node, local) for global_rank, (node, local) in enumerate(pairs))


def torchrun_env(nodes: list[int], global_rank: int, node: int, local: int) -> dict[str, str]:
    return {
        "RANK": str(global_rank),
        "WORLD_SIZE": str(sum(nodes)),
        "LOCAL_RANK": str(local),
        "LOCAL_WORLD_SIZE": str(nodes[node]),
        "GROUP_RANK": str(node),
        "MASTER_ADDR": "node1",
        "MASTER_PORT": "29500",
    }


def slurm_notation(nodes: list[int]) -> str:
    parts = [(size, len(list(run))) for size, run in itertools.groupby(nodes)]
    return ",".join(f"{size}(x{count})" if count > 1 else str(size) for size, count in parts)


def srun_env(nodes: list[int], global_rank: int, node: int, local: int) -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "77",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": str(global_rank),
        "SLURM_NTASKS": str(sum(nodes)),
        "SLURM_STEP_NUM_TASKS": str(sum(nodes)),
        "SLURM_LOCALID": str(local),
        "SLURM_NODEID": str(node),
        "SLURM_STEP_TASKS_PER_NODE": slurm_notation(nodes),
        "SLURM_TASKS_PER_NODE": slurm_notation([8] * len(nodes)),
        "SLURM_STEP_NODELIST": "gpu[03-09]",
        "SLURM_JOB_NODELIST": "gpu[01-09]",
    }


def openmpi_env(nodes: list[int], global_rank: int, node: int, local: int) -> dict[str, str]:
    return {
        "OMPI_COMM_WORLD_RANK": str(global_rank),
        "OMPI_COMM_WORLD_SIZE": str(sum(nodes)),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(local),
        "OMPI_COMM_WORLD_LOCAL_SIZE": str(nodes[node]),
    }


def mpich_env(nodes: list[int], global_rank: int, node: int, local: int) -> dict[str, str]:
    return {
        "PMI_RANK": str(global_rank),
        "PMI_SIZE": str(sum(nodes)),
        "MPI_LOCALRANKID": str(local),
        "MPI_LOCALNRANKS": str(nodes[node]),
    }


LAUNCHERS = {
    "torchrun": torchrun_env,
    "srun": srun_env,
    "mpirun (Open MPI)": openmpi_env,
    "mpiexec (MPICH, Intel MPI)": mpich_env,
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("nodes", NODES, ids=str)
def test_every_rank_finds_its_place(launcher: str, nodes: list[int]) -> None:
    for global_rank, node, local in places(nodes):
        world = find_world(LAUNCHERS[launcher](nodes, global_rank, node, local))
        assert world is not None
        assert (world.global_rank, world.world_size) == (global_rank, sum(nodes))
        assert (world.local_rank, world.local_world_size) == (local, nodes[node])
        assert world.launcher == launcher
        assert world.is_one_node == (len(nodes) == 1)
        if launcher in ("torchrun", "srun"):
            assert world.node_rank == node


def test_nobody_started_us() -> None:
    assert find_world({}) is None
    assert find_world({"PATH": "/bin", "RANK": "0", "LOCAL_RANK": "0"}) is None


def test_torchrun_names_its_address() -> None:
    world = find_world(torchrun_env([2, 2], 3, 1, 1), port=1234)
    assert world == World(3, 4, 1, 2, 1, "node1", 29500, "torchrun")


def test_slurm_ranks_meet_on_the_first_host_and_one_port() -> None:
    worlds = [find_world(srun_env([2, 2], *place)) for place in places([2, 2])]
    assert {(world.master_address, world.master_port) for world in worlds if world} == {("gpu03", 10240 + 37 * 77)}
    assert find_world(srun_env([2], 1, 0, 1)).master_address == LOOPBACK  # type: ignore[union-attr]
    assert find_world(srun_env([2], 1, 0, 1), port=5555).master_port == 5555  # type: ignore[union-attr]


@pytest.mark.parametrize("job", [1, 541, 99_999, 67_108_863])
def test_slurm_port_stays_below_the_ephemeral_ones(job: int) -> None:
    world = find_world({**srun_env([1], 0, 0, 0), "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": "4"})
    assert world is not None and 10240 <= world.master_port < 32768


def test_mpi_ranks_settle_the_address_later() -> None:
    world = find_world(openmpi_env([2], 0, 0, 0), port=4242)
    assert world is not None and (world.master_address, world.master_port) == ("", 4242)


@pytest.mark.parametrize("missing", ["SLURM_STEP_ID", "SLURM_PROCID"])
def test_inside_sbatch_or_salloc_is_not_a_rank(missing: str) -> None:
    environment = srun_env([4], 0, 0, 0)
    del environment[missing]
    assert find_world(environment, nproc=4) is None


@pytest.mark.parametrize("step", [0xFFFFFFFA, 0xFFFFFFFB])
def test_slurms_own_steps_are_not_ranks(step: int) -> None:
    assert find_world({**srun_env([4], 0, 0, 0), "SLURM_STEP_ID": str(step)}) is None


def test_the_innermost_launcher_counts() -> None:
    inside = {**srun_env([1], 0, 0, 0), **openmpi_env([4], 2, 0, 2)}
    assert find_world(inside).launcher == "mpirun (Open MPI)"  # type: ignore[union-attr]
    inside |= torchrun_env([2], 1, 0, 1)
    assert find_world(inside).launcher == "torchrun"  # type: ignore[union-attr]
    pmi2 = {**srun_env([2], 1, 0, 1), "PMI_RANK": "1", "PMI_SIZE": "2"}
    assert find_world(pmi2).launcher == "srun"  # type: ignore[union-attr]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_nproc_under_a_launcher(launcher: str) -> None:
    environment = LAUNCHERS[launcher]([4], 1, 0, 1)
    with pytest.raises(ConfigError, match=r"--nproc 2 .*rank 1 of 4 under"):
        find_world(environment, nproc=2)
    assert find_world(environment, nproc=1) == find_world(environment)
    assert find_world(LAUNCHERS[launcher]([1], 0, 0, 0), nproc=8) is None, "one task may start ranks of its own"


@pytest.mark.parametrize(
    ("launcher", "change", "says"),
    [
        ("torchrun", {"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
        ("torchrun", {"LOCAL_RANK": None}, "LOCAL_RANK is not set"),
        ("torchrun", {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ("torchrun", {"RANK": "7"}, "rank 7 of 4"),
        ("torchrun", {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "1"}, "local rank 1 of 1"),
        ("torchrun", {"LOCAL_WORLD_SIZE": "8"}, "local rank 1 of 8"),
        ("srun", {"SLURM_STEP_TASKS_PER_NODE": "2(y3)", "SLURM_NTASKS_PER_NODE": None}, "cannot be read"),
        ("srun", {"SLURM_STEP_TASKS_PER_NODE": None}, "does not say how many"),
        (
            "srun",
            {"SLURM_STEP_NODELIST": None, "SLURM_JOB_NODELIST": None},
            "SLURM_STEP_NODELIST or SLURM_JOB_NODELIST",
        ),
        ("srun", {"SLURM_JOB_ID": None}, "SLURM_JOB_ID or SLURM_JOBID is not set"),
        ("mpiexec (MPICH, Intel MPI)", {"MPI_LOCALRANKID": None}, "MPI_LOCALRANKID is not set"),
    ],
)
def test_contradictions_are_named(launcher: str, change: dict[str, str | None], says: str) -> None:
    environment = {**LAUNCHERS[launcher]([2, 2], 1, 0, 1), **change}
    with pytest.raises(LaunchError, match=says.replace("(", r"\(")):
        find_world({name: value for name, value in environment.items() if value is not None})


def test_slurm_falls_back_to_what_was_asked_for() -> None:
    environment = {**srun_env([2, 2], 3, 1, 1), "SLURM_NTASKS_PER_NODE": "2"}
    del environment["SLURM_STEP_TASKS_PER_NODE"]
    assert find_world(environment).local_world_size == 2  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[03-05,9],gpu1", "node03"),
        ("node[007]", "node007"),
        ("rack[1-2]n[3-4]", "rack1n3"),
        ("tux[1,5]-ib,a", "tux1-ib"),
        ("a.example.org,b", "a.example.org"),
    ],
)
def test_first_host(node_list: str, host: str) -> None:
    assert first_host(node_list) == host


@pytest.mark.parametrize("node_list", ["", "[", "node[", "a b", "$(reboot)", "[]"])
def test_unreadable_node_lists(node_list: str) -> None:
    with pytest.raises(LaunchError, match="node list"):
        first_host(node_list)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12))
def test_tasks_per_node_round_trip(nodes: list[int]) -> None:
    assert tasks_per_node(slurm_notation(nodes)) == nodes


@pytest.mark.parametrize("text", ["", "x", "2(x)", "2(3)", "2,,1", "-1"])
def test_unreadable_tasks_per_node(text: str) -> None:
    with pytest.raises(LaunchError, match="tasks per node"):
        tasks_per_node(text)


def test_a_port_in_use_is_named_with_its_remedy() -> None:
    with open_listener(LOOPBACK, 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"port {port} of 127.0.0.1.*launch.port"):
            open_listener(LOOPBACK, port)
    with open_listener(LOOPBACK, port) as again:
        assert again.getsockname() == (LOOPBACK, port)
        with pytest.raises(OSError), socket.create_connection(("127.0.0.2", port), timeout=1):
            pass
