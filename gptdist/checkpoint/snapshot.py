"""Training state on its way out of torch: the only file here that knows torch.

A `Fragment` is a view of a rank's memory, on any device; what is written is a `HostFragment`, a view or a copy of it.
Knows memory and devices; no files and no threads.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from gptdist.checkpoint.fragment import HostFragment
from gptdist.checkpoint.logical import Box, Shape

_LEAST_COPIED_AT_ONCE = 16 << 20


@dataclass(frozen=True)
class Fragment:
    """`data` is `box` of the logical tensor `name`, whose whole shape is `shape`. A view will do, on any device."""

    name: str
    shape: Shape
    box: Box
    data: torch.Tensor


def to_host(fragments: Iterable[Fragment]) -> list[HostFragment]:
    """The same fragments for writing: views of what is on the CPU, copies of what is not."""
    return [
        HostFragment(part.name, part.shape, part.box, dtype_name(part.data.dtype), host_array(part.data))
        for part in fragments
    ]


def host_array(data: torch.Tensor) -> np.ndarray:
    """The tensor as numpy sees it; a view where it is on the CPU."""
    data = data.detach().cpu()
    return (data.view(torch.uint16) if data.dtype is torch.bfloat16 else data).numpy()


def as_tensor(data: np.ndarray, dtype: str) -> torch.Tensor:
    """The inverse of `host_array`, over the same memory."""
    tensor = torch.from_numpy(data)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


class HostBuffers:
    """Memory for a copy of a rank's fragments: allocated and touched once, pinned where they are on a GPU.

    The copy lies in the order of the file, and neighbours in the state are neighbours in it, so that copying is a few
    large moves. What `copy` returns is valid until the next `copy`.
    """

    def __init__(self, fragments: Sequence[Fragment]) -> None:
        self._plan(fragments)

    @torch.no_grad()
    def copy(self, fragments: Sequence[Fragment]) -> list[HostFragment]:
        """The fragments as they are now. All of the copy is there when it returns."""
        if not self._planned_for(fragments):
            self._plan(fragments)
        if self._host_moves:
            # numpy lets go of the interpreter while it copies; one core alone does not use what the memory can do.
            # The threads end here: one that waited for the next save would keep the process from ending.
            with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="checkpoint-copy") as threads:
                list(threads.map(_copy_bytes, self._host_moves))
        for target, source in self._moves:
            target.copy_(source, non_blocking=True)
        for device in self._devices:
            # On the stream that computes: what changes the state next is queued after these copies.
            torch.cuda.current_stream(device).synchronize()
        return self._copies

    @property
    def bytes(self) -> int:
        return self._memory.numel()

    def _planned_for(self, fragments: Sequence[Fragment]) -> bool:
        """The state does not move in memory from step to step; where it did, the plan is made anew."""
        if len(fragments) != len(self._fragments):
            return False
        return all(
            new is old
            or (
                (new.name, new.shape, new.box, new.data.dtype, new.data.stride())
                == (old.name, old.shape, old.box, old.data.dtype, old.data.stride())
                and new.data.data_ptr() == old.data.data_ptr()
            )
            for new, old in zip(fragments, self._fragments, strict=True)
        )

    @torch.no_grad()
    def _plan(self, fragments: Sequence[Fragment]) -> None:
        self._fragments = list(fragments)
        # Wide elements first, as in the file; then by where they lie, so that moves can be joined.
        ordered = sorted(fragments, key=lambda part: (-part.data.element_size(), part.data.data_ptr()))
        devices = {part.data.device for part in ordered}
        self._devices = [device for device in devices if device.type == "cuda"]
        size = sum(part.data.numel() * part.data.element_size() for part in ordered)
        self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=bool(self._devices))
        self._memory.zero_()  # pages are made when they are first written, and that is slow
        self._moves: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._copies: list[HostFragment] = []
        offset = 0
        for part in ordered:
            after = offset + part.data.numel() * part.data.element_size()
            target = self._memory[offset:after].view(part.data.dtype).view(part.data.shape)
            self._copies.append(
                HostFragment(part.name, part.shape, part.box, dtype_name(part.data.dtype), host_array(target))
            )
            if part.data.numel():
                self._add_move(target, part.data.detach())
            offset = after
        on_host = [move for move in self._moves if move[1].device.type == "cpu" and move[1].is_contiguous()]
        self._moves = [move for move in self._moves if move[1].device.type != "cpu" or not move[1].is_contiguous()]
        threads = torch.get_num_threads()
        self._host_moves = [
            cut for target, source in on_host for cut in _cut(_bytes_of(target), _bytes_of(source), threads)
        ]

    def _add_move(self, target: torch.Tensor, source: torch.Tensor) -> None:
        if not source.is_contiguous():
            self._moves.append((target, source))
            return
        target, source = target.view(-1), source.view(-1)
        if self._moves:
            before, source_before = self._moves[-1]
            if _follows(source_before, source):
                self._moves[-1] = (_longer(before, len(source)), _longer(source_before, len(source)))
                return
        self._moves.append((target, source))


def _bytes_of(data: torch.Tensor) -> np.ndarray:
    return data.reshape(-1).view(torch.uint8).numpy()


def _cut(target: np.ndarray, source: np.ndarray, parts: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Equal parts, one a thread: memory is copied fastest in pieces far larger than the caches."""
    size = max(_LEAST_COPIED_AT_ONCE, -(-len(target) // parts))
    for first in range(0, len(target), size):
        yield target[first : first + size], source[first : first + size]


def _copy_bytes(move: tuple[np.ndarray, np.ndarray]) -> None:
    np.copyto(*move)


def _follows(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether two flat tensors are neighbours in the same memory."""
    return (
        before.ndim == 1
        and before.is_contiguous()
        and before.dtype == after.dtype
        and before.untyped_storage().data_ptr() == after.untyped_storage().data_ptr()
        and before.storage_offset() + before.numel() == after.storage_offset()
    )


def _longer(flat: torch.Tensor, by: int) -> torch.Tensor:
    return flat.as_strided((len(flat) + by,), (1,), flat.storage_offset())
