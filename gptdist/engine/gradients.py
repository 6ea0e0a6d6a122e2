"""Whole gradients of a step in one flat fp32 buffer, and their one reduction over data ranks.

Pure torch. Every `parameter.grad` is a view into the buffer, in fp32 whatever the parameter's dtype, so autograd itself
accumulates micro-batches in fp32; the step then reduces the buffer with a single collective, in the order of memory: no
buckets, whose order could differ after a restart, and no copies.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class FlatGradients:
    """The gradients of `parameters`, laid out one after the other (padded at the end to `numel`)."""

    def __init__(self, parameters: Sequence[nn.Parameter], numel: int, data: dist.ProcessGroup) -> None:
        self.parameters = parameters
        self.data = data
        self.flat = torch.zeros(numel, dtype=torch.float32, device=parameters[0].device)
        self._views = []
        offset = 0
        for parameter in parameters:
            if parameter.dtype != torch.float32:
                parameter.grad_dtype = torch.float32
            self._views.append(self.flat[offset : offset + parameter.numel()].view(parameter.shape))
            offset += parameter.numel()
        self.used = offset
        self._reduced: Tensor | None = None  # the part of the buffer that holds no gradients of this rank any more
        self._sum_before = torch.zeros((), device=self.flat.device)  # of that part's

    def clear(self) -> None:
        """Zero the buffer and point every parameter's gradient at it, before the first backward of a step."""
        self.flat.zero_()
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view

    def reduce(self, scatter: bool) -> Tensor:
        """Average over data ranks. `scatter`: only this rank's equal part is right and returned, else the whole."""
        ranks = self.data.size()
        part = self.flat.numel() // ranks
        mine = self.flat[self.data.rank() * part :][:part] if scatter else self.flat
        if ranks == 1:
            return mine
        # What is overwritten here could not be told apart later; a sum is finite only if all of it is.
        self._reduced, self._sum_before = mine, mine.sum()
        if scatter and self.flat.device.type == "cpu":
            # gloo scatters by reducing everything everywhere: twice the bytes, and a copy of the buffer.
            parts = torch.empty_like(self.flat)
            dist.all_to_all_single(parts, self.flat, group=self.data)
            return torch.mean(parts.view(ranks, part), dim=0, out=mine)
        if scatter:
            dist.reduce_scatter_tensor(mine, self.flat, group=self.data)
        else:
            dist.all_reduce(self.flat, group=self.data)
        return mine.mul_(1.0 / ranks)

    def own_are_finite(self) -> bool:
        """After `reduce`: whether this rank's gradients were finite before it."""
        start = 0 if self._reduced is None else self._reduced.storage_offset() - self.flat.storage_offset()
        stop = start if self._reduced is None else start + self._reduced.numel()
        kept = (self.flat[:start], self.flat[stop:], self._sum_before)
        return all(bool(torch.isfinite(values).all()) for values in kept)

    def slices(self, part: Tensor) -> Iterator[tuple[nn.Parameter | None, Tensor]]:
        """(parameter, its elements in `part`), in order; a last (None, padding) where `part` reaches past them."""
        start = part.storage_offset() - self.flat.storage_offset()
        offset = 0
        for parameter in self.parameters:
            first = max(offset, start)
            offset += parameter.numel()
            last = min(offset, start + part.numel())
            if first < last:
                yield parameter, part[first - start : last - start]
        if self.used < start + part.numel():
            yield None, part[max(self.used - start, 0) :]
