"""Fresh rank processes on GPUs, or with the GPUs hidden: whether torch sees one is settled when a process starts.

Not the pool of the CPU tests: a fork server that has touched CUDA cannot fork. Knows nothing of models.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing

from gptdist.world import World

Device = Literal["gpu", "cpu"]


def run(function: Callable[..., Any], world_size: int, *args: Any, device: Device = "gpu") -> list[Any]:
    """`function(world, *args)` on `world_size` fresh ranks; what each returned (a few kilobytes), by global rank.

    Raises torch.multiprocessing.ProcessRaisedException with the traceback of the first rank that fails.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    answers = torch.multiprocessing.get_context("spawn").SimpleQueue()
    with _visible(device):
        torch.multiprocessing.spawn(_rank, (world_size, store.port, answers, function, args), nprocs=world_size)
    return [answer for _, answer in sorted((answers.get() for _ in range(world_size)), key=lambda pair: pair[0])]


@contextmanager
def _visible(device: Device) -> Iterator[None]:
    """Children inherit the environment that is in force when they start."""
    before = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")}
    if device == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _rank(
    global_rank: int, world_size: int, port: int, answers: Any, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")  # no TF32: its 10 bits would hide every other difference
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(global_rank)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=global_rank, world_size=world_size)
    try:
        answer = function(World(global_rank, world_size, global_rank, world_size), *args)
    finally:
        dist.destroy_process_group()
    answers.put((global_rank, answer))
