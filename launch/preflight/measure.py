"""What a rank measures of its device, of its links to the ranks it will talk to most, and of its node's clock.

Knows tensors and collectives. Which numbers are bad is `judge.py`'s to say. All that is multiplied or added are
small whole numbers, so that results are exact in fp32 on any device, in any order.
"""

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from gptdist.comms import Comms
from gptdist.layout import Layout
from launch.preflight.judge import Complaint, Link, Severity

DEVICE_SECONDS = 15.0
"""A device that has not answered after this long is broken. Its first product also loads CUDA's libraries, from a disk
that all nodes may share; the whole of preflight has 20."""
LINK_SECONDS = 5.0
"""A pair of ranks that has not exchanged a few megabytes after this long is broken."""
CLOCK_ROUNDS = 5
wall_clock = time.time


@dataclass(frozen=True)
class Effort:
    """How much to measure. Times count only where there are nodes to compare."""

    matmul_size: int
    matmul_repeats: int
    link_bytes: int
    link_repeats: int


def effort_of(device: str, nodes: int) -> Effort:
    """Milliseconds on the processors of one machine, which share its cores and memory; a second or so elsewhere."""
    if device == "cpu":
        return Effort(256, 1, 64 << 10, 1) if nodes == 1 else Effort(384, 20, 4 << 20, 6)
    return Effort(4096, 10, 64 << 20, 4)


def check_device(device: str, effort: Effort) -> tuple[float | None, Complaint | None]:
    """Seconds of one matrix product, or what is wrong with the device."""
    try:
        # A GPU that hangs, hangs whoever asks it: then that is a thread, and this rank can still say so.
        seconds, wrong = _multiply(device, effort) if device == "cpu" else _in_time(_multiply, device, effort)
        problem = f"computed {wrong:,} of {effort.matmul_size**2:,} elements of a known product wrong" if wrong else ""
    except TimeoutError:
        problem = f"gave no answer within {DEVICE_SECONDS:g} s"
    except RuntimeError as error:  # CUDA's errors
        problem = f"failed: {str(error).splitlines()[0]}"
    if problem:
        return None, Complaint("matmul", f"{device_name(device)} {problem}", everywhere=Severity.BROKEN)
    return seconds, None


def known_product(size: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Two fp32 matrices [size, size] and their exact product: a[i, k] = p[i] + q[k] and b[k, j] = r[k] s[j] make
    (p[i] sum(r) + sum(q r)) s[j], and every partial sum is a whole number far below 2^24."""
    index = torch.arange(size, device=device)
    p, q, r, s = index % 7 - 3, 3 * index % 5 - 2, 2 * index % 7 - 2, index % 5 + 1
    product = torch.outer(p * r.sum() + (q * r).sum(), s)
    return (p[:, None] + q).float(), torch.outer(r, s).float(), product.float()


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """What is checked."""
    return a @ b


def pair_rounds(layout: Layout) -> list[list[tuple[int, int]]]:
    """The neighbours in every group of the layout, as rounds in which no rank is in two pairs; each pair once.

    Groups of one kind share no rank, so that their rounds run side by side.
    """
    rounds: list[list[tuple[int, int]]] = []
    sizes = (layout.tensor, layout.data, layout.pipeline)
    for kind, size in enumerate(sizes):
        if size == 1:
            continue
        width, depth = (sizes[place] for place in range(3) if place != kind)
        groups = [
            [_rank_at(layout, kind, member, x, y) for member in range(size)] for x in range(width) for y in range(depth)
        ]
        ring = [(place, (place + 1) % size) for place in range(size if size > 2 else 1)]
        odd_one = [ring.pop()] if size % 2 else []
        for part in (ring[0::2], ring[1::2], odd_one):
            pairs = [(group[one], group[other]) for group in groups for one, other in part]
            if pairs:
                rounds.append(pairs)
    return rounds


def measure_links(layout: Layout, comms: Comms, device: str, effort: Effort) -> list[Link]:
    """What this rank saw of an all-reduce with each of its neighbours in the layout's groups. On every rank."""
    world = comms.world
    if world.world_size == 1:
        return []
    total = torch.tensor([world.global_rank + 1], device=device)
    dist.all_reduce(total)  # connects all ranks, which later collectives need anyway: NCCL takes seconds
    links = []
    for pairs in pair_rounds(layout):
        comms.barrier()  # a rank that waited in vain must not keep its next peer waiting
        mine = next((pair for pair in pairs if world.global_rank in pair), None)
        if mine is None:
            continue
        peer = mine[0] + mine[1] - world.global_rank
        links.append(Link(*mine, _speed(peer, world.global_rank, device, effort)))
    return links


def measure_clocks(comms: Comms, nodes: Sequence[int]) -> dict[int, float]:
    """Seconds that each node's clock is ahead of the first's, to some milliseconds. `nodes`: of each rank."""
    times = []
    for _ in range(CLOCK_ROUNDS):
        comms.barrier()
        times.append(wall_clock())
    of_ranks = comms.gather(times)
    first_of_node = {node: rank for rank, node in reversed(list(enumerate(nodes)))}
    return {
        node: statistics.median(here - there for here, there in zip(of_ranks[rank], of_ranks[0], strict=True))
        for node, rank in sorted(first_of_node.items())
    }


def _multiply(device: str, effort: Effort) -> tuple[float, int]:
    """The least time of a product, and how many elements of one were wrong."""
    a, b, expected = known_product(effort.matmul_size, device)
    wrong = int((multiply(a, b) != expected).sum())
    times = []
    for _ in range(effort.matmul_repeats):
        start = time.perf_counter()
        multiply(a, b)
        _finish(device)
        times.append(time.perf_counter() - start)
    return min(times), wrong


def _in_time(function: Callable[[str, Effort], tuple[float, int]], device: str, effort: Effort) -> tuple[float, int]:
    answers: list[tuple[float, int] | BaseException] = []
    index = torch.cuda.current_device()

    def work() -> None:
        try:
            with torch.cuda.device(index):  # each thread has a device of its own
                answers.append(function(device, effort))
        except BaseException as error:
            answers.append(error)

    thread = threading.Thread(target=work, daemon=True, name="preflight")
    thread.start()
    thread.join(DEVICE_SECONDS)
    if not answers:
        raise TimeoutError
    answer = answers[0]
    if isinstance(answer, BaseException):
        raise answer
    return answer


def _speed(peer: int, global_rank: int, device: str, effort: Effort) -> float | None:
    """Bytes a second that go each way in an all-reduce of two; None where the sum is wrong or late."""
    mine = torch.full((effort.link_bytes // 4,), float(global_rank + 1), device=device)
    best, right = float("inf"), True
    try:
        for repeat in range(effort.link_repeats + 1):  # the first connects the two
            _finish(device)
            start = time.perf_counter()
            sent = exchange(mine, peer)
            if repeat:
                best = min(best, time.perf_counter() - start)
            right &= bool((mine + sent == global_rank + peer + 2).all())  # the peer goes on, whatever this one got
    except RuntimeError:  # gloo's and NCCL's words for a peer that is late or gone
        return None
    return 4 * mine.numel() / best if right else None


def exchange(tensor: Tensor, peer: int) -> Tensor:
    """What the peer gives for `tensor`. Raises RuntimeError where it does not within LINK_SECONDS."""
    received = torch.zeros_like(tensor)
    both = [dist.P2POp(dist.isend, tensor, peer), dist.P2POp(dist.irecv, received, peer)]
    deadline = time.monotonic() + LINK_SECONDS
    for work in dist.batch_isend_irecv(both):
        if tensor.is_cuda:
            work.wait()  # lets the stream wait, not us; with a limit of time NCCL looks only every so many milliseconds
        else:
            work.wait(timedelta(seconds=LINK_SECONDS))
    while tensor.is_cuda and not torch.cuda.current_stream().query():
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {peer} did not answer in time")
    return received


def _finish(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def device_name(device: str) -> str:
    """`cpu`, or which GPU."""
    return "cpu" if device == "cpu" else f"{device}:{torch.cuda.current_device()}"


def _rank_at(layout: Layout, kind: int, member: int, x: int, y: int) -> int:
    """The global rank of `member` of a tensor (0), data (1) or pipeline (2) group; the other two places are x and y."""
    return layout.global_rank(*((member, x, y), (x, member, y), (x, y, member))[kind])
