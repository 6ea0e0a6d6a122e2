"""How the ranks of a `World` find each other and become a process group; the only importer of mpi4py.

Sockets are on the loopback interface unless the ranks span several nodes. Reads of the environment only what tells
who serves torchrun's store; which rank this is, it is told (`launch/outer.py` or `launch/ranks/place.py` know).
"""

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from gptdist.errors import LaunchError
from gptdist.world import World

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from torch.distributed import Store

    from gptdist.comms import Comms

LOOPBACK = "127.0.0.1"
_LIBRARIES = {
    "mpirun (Open MPI)": "libmpi.so.40",
    "mpirun (MVAPICH)": "libmpi.so.12",
    "mpiexec (MPICH, Intel MPI)": "libmpi.so.12",
}
"""The library of each MPI launcher, on Linux."""


def open_listener(address: str, port: int) -> socket.socket:
    """A socket that listens on `address:port` (port 0: a free one). Raises LaunchError where the port is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restart must not wait for old connections
    try:
        listener.bind((address, port))
        listener.listen(4096)
    except OSError as error:
        listener.close()
        raise LaunchError(
            f"Ranks cannot meet on port {port} of {address or 'this machine'}: {error.strerror}. Another run may be "
            "using it: set launch.port to a free port (0 picks one), or end that run."
        ) from error
    return listener


def join(world: World, timeout_seconds: float, device: str) -> "Comms":
    """Connect all ranks; returns the control channel. `device`: "cpu" (gloo) or "cuda" (NCCL, with gloo for control).

    One rank gets a process group too, without any port. Raises LaunchError where ranks cannot find each other.
    """
    import torch
    import torch.distributed as dist

    if not world.master_address:
        world = _settle_over_mpi(world)
    timeout = timedelta(seconds=timeout_seconds)
    device_index = _device_index(world, torch.cuda.device_count()) if device == "cuda" else world.local_rank
    if device == "cuda":
        torch.cuda.set_device(device_index)
    _publish(world, device_index)
    store = _open_store(world, timeout)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=store,
        rank=world.global_rank,
        world_size=world.world_size,
        timeout=timeout,
    )
    # A group of its own on CPU as well: control messages may then run beside training's collectives.
    return open_channel(world, timeout_seconds)


def open_channel(world: World, timeout_seconds: float) -> "Comms":
    """One more control channel of all ranks, for a thread of its own. After `join`, on every rank."""
    import torch.distributed as dist

    from gptdist.comms import Comms

    if world.world_size == 1:
        return Comms(world)
    return Comms(world, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds)))


def leave() -> None:
    """End what `join` began; the environment is as it was."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    while _published:
        name, before = _published.popitem()
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before


_published: dict[str, str | None] = {}


def _publish(world: World, device_index: int) -> None:
    """DeepSpeed insists on these variables, and gloo and NCCL read their interface from them; nothing of ours does."""
    values = {
        "RANK": str(world.global_rank),
        "WORLD_SIZE": str(world.world_size),
        "LOCAL_RANK": str(device_index),  # DeepSpeed takes it for the index of the device
        "LOCAL_WORLD_SIZE": str(world.local_world_size),
        "MASTER_ADDR": world.master_address,
        "MASTER_PORT": str(world.master_port),
    }
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:
        values["OMPI_COMM_WORLD_LOCAL_RANK"] = values["LOCAL_RANK"]  # DeepSpeed asserts that the two agree
    if world.is_one_node:
        loopback = "lo" if sys.platform.startswith("linux") else "lo0"
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            values[name] = os.environ.get(name) or loopback
    for name, value in values.items():
        _published.setdefault(name, os.environ.get(name))
        os.environ[name] = value


def _open_store(world: World, timeout: timedelta) -> "Store":
    import torch.distributed as dist

    if world.world_size == 1:
        return dist.HashStore()
    # torchrun's agent usually serves the store itself, and says so with this variable.
    serves = world.is_first and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    listen_fd = world.listen_fd
    if serves and listen_fd < 0:
        listen_fd = open_listener(LOOPBACK if world.is_one_node else "", world.master_port).detach()
    if not serves:
        _await_listener(world, timeout.total_seconds())
    try:
        store = dist.TCPStore(
            world.master_address,
            world.master_port,
            world.world_size,
            is_master=serves,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listen_fd if serves else None,
        )
        prefixed = dist.PrefixStore(f"gptdist/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        prefixed.set(f"here/{world.global_rank}", "1")
        _await_all(prefixed, world, timeout)
    except dist.DistError as error:
        raise LaunchError(_lost(world, timeout.total_seconds(), str(error).splitlines()[0])) from error
    return prefixed


def _await_all(store: "Store", world: World, timeout: timedelta) -> None:
    """Name the ranks that did not come, rather than let the first collective time out."""
    import torch.distributed as dist

    try:
        store.wait([f"here/{other}" for other in range(world.world_size)], timeout)
    except dist.DistError as error:
        absent = [other for other in range(world.world_size) if not store.check([f"here/{other}"])]
        raise LaunchError(
            f"Of {world.world_size} ranks, {len(absent)} did not join at {world.master_address}:{world.master_port} "
            f"within {timeout.total_seconds():g} s: "
            f"{', '.join(map(str, absent[:16]))}{' ...' if len(absent) > 16 else ''}. See what these ranks printed; "
            "raise launch.timeout if they are only slow."
        ) from error


def _await_listener(world: World, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    while True:
        try:
            socket.create_connection((world.master_address, world.master_port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LaunchError(_lost(world, timeout_seconds, str(error))) from error
        time.sleep(0.05)


def _lost(world: World, timeout_seconds: float, reason: str) -> str:
    return (
        f"Rank {world.global_rank} of {world.world_size} could not reach {world.master_address}:{world.master_port} "
        f"within {timeout_seconds:g} s: {reason}. Check that rank 0 runs, that the port is free there and open between "
        "the nodes; raise launch.timeout if ranks start slowly."
    )


def _device_index(world: World, device_count: int) -> int:
    if world.local_rank < device_count:
        return world.local_rank
    if device_count == 1 and world.launcher not in ("local", "single", "torchrun"):
        return 0  # srun and mpirun may show each task only its own GPU
    raise LaunchError(
        f"Local rank {world.local_rank} has no GPU of its own: this process sees {device_count} for "
        f"{world.local_world_size} ranks. Start at most {device_count} ranks a node, or show more GPUs "
        "(CUDA_VISIBLE_DEVICES)."
    )


@contextmanager
def mpi_executor(world: World) -> Iterator["Executor | None"]:
    """On rank 0 an executor whose workers are the other ranks; None on these, once they have done its work."""
    ranks = _mpi_ranks(world)
    from mpi4py.futures import MPICommExecutor

    with MPICommExecutor(ranks, root=0) as executor:
        yield executor  # type: ignore[misc]


def _mpi_ranks(world: World) -> Any:
    """MPI's communicator of all ranks of `world`."""
    library = _LIBRARIES.get(world.launcher)
    if library is not None:
        # Of several MPI libraries, the one whose mpirun it was; mpi4py would take the first it finds.
        os.environ.setdefault("MPI4PY_LIBMPI", os.pathsep.join([f"{sys.exec_prefix}/lib/{library}", library]))
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise LaunchError(
            f"{world.launcher} started this rank, but mpi4py cannot load an MPI library "
            f"({str(error).splitlines()[0]}). Put the "
            f"launcher's MPI library on LD_LIBRARY_PATH, or start the ranks with torchrun or srun."
        ) from error
    ranks = MPI.COMM_WORLD
    if (ranks.Get_size(), ranks.Get_rank()) != (world.world_size, world.global_rank):
        library = MPI.Get_library_version().split("\n")[0].strip(" \0")
        raise LaunchError(
            f"{world.launcher} says rank {world.global_rank} of {world.world_size}, but mpi4py sees rank "
            f"{ranks.Get_rank()} of {ranks.Get_size()}: it uses another MPI ({library}) than the one that started it. "
            "Use that library's own mpirun, or put the other library first on LD_LIBRARY_PATH."
        )
    return ranks


def _settle_over_mpi(world: World) -> World:
    """mpirun names no address: rank 0 opens the port and broadcasts where."""
    ranks = _mpi_ranks(world)
    message = bytearray(512)
    listener, problem = None, ""
    if world.is_first:
        address = LOOPBACK if world.is_one_node else _own_address()
        try:
            listener = open_listener(LOOPBACK if world.is_one_node else "", world.master_port)
            found = f"{address} {listener.getsockname()[1]}"
        except LaunchError as error:
            problem, found = str(error), ""
        message[: len(found)] = found.encode()
    ranks.Bcast(message, root=0)  # a plain buffer: the lower-case call would pickle
    words = message.rstrip(b"\0").decode().split()
    if not words:
        raise LaunchError(problem or "[rank 0] could not open a port for the ranks to meet; see its message.")
    return replace(
        world, master_address=words[0], master_port=int(words[1]), listen_fd=listener.detach() if listener else -1
    )


def _own_address() -> str:
    """How other nodes reach this one: its address, or its name where that resolves to a loopback address here."""
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return name
    return name if address.startswith("127.") else address
