"""Small control messages between all ranks of a run: gather, broadcast, and agree on an error before anyone raises.

Messages are JSON in uint8 tensors (never pickle) over a gloo group, so they work the same beside NCCL. With one rank
everything here is the identity and needs no process group. Tensors of training never pass through here.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gptdist import errors
from gptdist.world import World

if TYPE_CHECKING:  # with one rank nothing of torch is needed, and tools of one rank start without it
    import torch.distributed as dist


class Comms:
    """The control channel of one run. Every method but `is_first` must be called by all ranks, in the same order."""

    is_broken = False
    """Set once a message has failed: another rank is gone or too late, and nothing that follows can be believed."""

    def __init__(self, world: World, group: "dist.ProcessGroup | None" = None) -> None:
        """`group`: a gloo group of all ranks; None with one rank."""
        if world.world_size > 1 and group is None:
            raise ValueError("a world of several ranks needs a gloo group for control messages")
        self.world = world
        self._group = group

    @property
    def is_first(self) -> bool:
        return self.world.is_first

    def gather(self, value: Any) -> list[Any]:
        """Every rank's `value` (anything JSON holds), indexed by global rank, on every rank."""
        if self.world.world_size == 1:
            return [value]
        with self._noting_breaks():
            return self._gather(value)

    def _gather(self, value: Any) -> list[Any]:
        import torch
        import torch.distributed as dist

        payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world.world_size)]
        dist.all_gather(sizes, torch.tensor([payload.numel()]), group=self._group)
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: payload.numel()] = payload
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(parts, padded, group=self._group)
        return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def broadcast(self, value: Any) -> Any:
        """Global rank 0's `value` on every rank; returns once every rank is here."""
        if self.world.world_size == 1:
            return value
        with self._noting_breaks():
            return self._broadcast(value)

    def _broadcast(self, value: Any) -> Any:
        """Not a gather: a manifest of megabytes, times thousands of ranks, would be gigabytes on each."""
        import torch
        import torch.distributed as dist

        content = json.dumps(value).encode() if self.is_first else b""
        size = torch.tensor([len(content)])
        dist.broadcast(size, src=0, group=self._group)
        payload = torch.empty(int(size), dtype=torch.uint8)
        if self.is_first:
            payload = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.broadcast(payload, src=0, group=self._group)
        dist.barrier(group=self._group)
        return json.loads(payload.numpy().tobytes())

    def barrier(self) -> None:
        """Returns once every rank is here."""
        if self.world.world_size > 1:
            import torch.distributed as dist

            with self._noting_breaks():
                dist.barrier(group=self._group)

    @contextmanager
    def _noting_breaks(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.is_broken = True
            raise

    def any(self, flag: bool) -> bool:
        """Whether any rank's flag is set."""
        return any(self.gather(bool(flag)))

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank if any rank brings an error: the lowest rank's, of its own gptdist class. Of a class that
        `errors` has not got, the other ranks raise the nearest base that it has."""
        mine = None if error is None else [[kind.__name__ for kind in type(error).__mro__], str(error)]
        for global_rank, found in enumerate(self.gather(mine)):
            if found is None:
                continue
            if error is not None and global_rank == self.world.global_rank:
                raise error
            names, text = found
            for kind in (getattr(errors, name, None) for name in names):
                if isinstance(kind, type) and issubclass(kind, errors.GptdistError):
                    raise kind(f"[rank {global_rank}] {text}")
            raise errors.GptdistError(f"[rank {global_rank}] {names[0]}: {text}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """A block that fails on all ranks if it fails on one. The block itself must not use collectives."""
        caught: Exception | None = None
        try:
            yield
        except Exception as error:
            caught = error
        self.agree(caught)
