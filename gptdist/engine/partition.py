"""This rank's share of the optimizer state, as ranges of its parameters.

Checkpoints and initial weights go through it. Pure bookkeeping over torch tensors; knows no engine. A share is a few
flat fp32 tensors (master weights) with their two Adam moments beside them; each range of them belongs to a range of one
local parameter, hence to boxes of logical tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gptdist.checkpoint.logical import Box, FlatFragment, Piece, fragments_of_range
from gptdist.checkpoint.read import Checkpoint
from gptdist.checkpoint.snapshot import as_tensor, dtype_name, host_array

KINDS = ("weight", "exp_avg", "exp_avg_sq")


class StateSource(Protocol):
    """Where state is read from: a checkpoint, or the initial weights."""

    def read(self, name: str, box: Box) -> Tensor:
        """The `box` of `kind/logical name`, contiguous."""
        ...


class TensorSource:
    """A checkpoint as a source of torch tensors."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """`box` (default: all) of a logical tensor, contiguous, on the CPU, owned by the caller."""
        return as_tensor(self._checkpoint.read(name, box), self._checkpoint.dtype(name))

    def read_into(self, out: Tensor, name: str, box: Box) -> None:
        """Fill `out`, flat, with the `box`: straight from the file where it is memory of the stored kind."""
        if out.device.type == "cpu" and out.is_contiguous() and dtype_name(out.dtype) == self._checkpoint.dtype(name):
            self._checkpoint.read(name, box, host_array(out.view(box.shape)))
        else:
            out.copy_(self.read(name, box).reshape(-1))


def read_into(out: Tensor, source: StateSource, name: str, box: Box) -> None:
    """Fill `out`, flat, with the `box` of `kind/logical name`."""
    if isinstance(source, TensorSource):
        source.read_into(out, name, box)
    else:
        out.copy_(source.read(name, box).reshape(-1))


@dataclass(frozen=True)
class ParameterRange:
    """Elements [start, start + count) of a local parameter are elements [offset, offset + count) of `flat`."""

    pieces: list[Piece]
    local_shape: tuple[int, ...]
    start: int
    count: int
    offset: int
    owned: bool = True  # False: another rank holds the same and writes it

    def fragments(self, first: int, last: int) -> list[FlatFragment]:
        """The boxes held by elements [first, last) of this range; positions count from `first`."""
        return fragments_of_range(self.local_shape, self.pieces, self.start + first, self.start + last)


@dataclass
class FlatState:
    """One flat fp32 master tensor, its moments, and the parameter ranges it is made of."""

    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor  # scalar: optimizer steps taken, as torch's AdamW keeps it
    ranges: list[ParameterRange]

    def tensor(self, kind: str) -> Tensor:
        return {"weight": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}[kind].detach()


@torch.no_grad()
def read_state(states: list[FlatState], source: StateSource, kinds: tuple[str, ...] = KINDS) -> None:
    """Fill the share from `source`; moments not read are zeroed, and so is everything that is padding."""
    for state in states:
        for kind in KINDS:
            flat = state.tensor(kind)
            filled = []
            for part in state.ranges if kind in kinds else ():
                for fragment in part.fragments(0, part.count):
                    start, stop = part.offset + fragment.start, part.offset + fragment.stop
                    read_into(flat[start:stop], source, f"{kind}/{fragment.name}", fragment.box)
                    filled.append((start, stop))
            _zero_between(flat, filled)


def _zero_between(flat: Tensor, filled: list[tuple[int, int]]) -> None:
    """Zero what is in none of the ranges: writing all of it first would cost a pass over the memory."""
    end = 0
    for start, stop in sorted(filled):
        flat[end:start].zero_()
        end = stop
    flat[end:].zero_()


def owned_fragments(
    states: list[FlatState], share: int, shares: int
) -> Iterator[tuple[str, tuple[int, ...], Box, Tensor]]:
    """(kind/name, logical shape, box, data) of the `share`-th of `shares` equal parts of each range.

    With ZeRO the share is the whole (`shares` 1); where data ranks hold the same state, each writes its part.
    """
    for state in states:
        for part in state.ranges:
            if not part.owned:
                continue
            first, last = part.count * share // shares, part.count * (share + 1) // shares
            for fragment in part.fragments(first, last):
                start = part.offset + first + fragment.start
                for kind in KINDS:
                    data = state.tensor(kind)[start : start + fragment.stop - fragment.start]
                    yield f"{kind}/{fragment.name}", fragment.shape, fragment.box, data.view(fragment.box.shape)
