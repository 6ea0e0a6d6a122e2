"""Shards that may stay unreadable, with several ranks: lost to one is lost to all, before a batch is trained on.

Ranks that hold parts of one model must be given the same tokens, and a shard may fail on one of them only. Used where
`data.max_unreadable_shards` allows any; each batch then costs a message between the ranks.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from gptdist.comms import Comms
from gptdist.data.loader import BatchLoader, LoadedBatch
from gptdist.data.reader import LostShard, TokenReader
from gptdist.data.samples import SampleSource
from gptdist.errors import CorpusError


class AgreeingLoader:
    """A BatchLoader whose `next` all ranks call together: it fails on all, and all batches lack the same shards."""

    def __init__(self, loader: BatchLoader, comms: Comms, allowed: int) -> None:
        self._loader = loader
        self._comms = comms
        self._allowed = allowed
        self._batch_size_at: Callable[[int], int] = lambda sample: 0

    @property
    def source(self) -> SampleSource:
        return self._loader.source

    def start(self, first_sample: int, batch_size_at: Callable[[int], int]) -> None:
        self._batch_size_at = batch_size_at
        self._loader.start(first_sample, batch_size_at)

    def next(self) -> LoadedBatch:
        waited = 0.0
        while True:
            with self._comms.together():
                batch = self._loader.next()
            waited += batch.wait_seconds
            lost = share_losses(self._comms, batch.lost, self._allowed)
            if lost is None:
                return replace(batch, wait_seconds=waited)
            # What is read ahead is not of these losses either: read it again.
            self._loader.close()
            self.source.lose(lost)
            self._loader.start(batch.first_sample, self._batch_size_at)

    def close(self) -> None:
        self._loader.close()


def share_losses(comms: Comms, own: Sequence[LostShard], allowed: int) -> list[LostShard] | None:
    """What any rank has lost, on every rank; None where all have lost the same.

    Raises CorpusError, on all ranks, where that is more than `allowed`.
    """
    of_ranks = [[LostShard(*row) for row in rows] for rows in comms.gather(own)]
    lost = {(shard.corpus, shard.number): shard for shards in of_ranks for shard in shards}
    if len(lost) > allowed:
        listed = "".join(f"\n  {shard.message}" for shard in lost.values())
        raise CorpusError(
            f"{len(lost)} shards cannot be read, taking all ranks together; data.max_unreadable_shards is "
            f"{allowed}.{listed}"
        )
    if all(len(shards) == len(lost) for shards in of_ranks):
        return None
    return list(lost.values())


def lose_alike(comms: Comms, read: Callable[[], None], readers: Sequence[TokenReader], allowed: int) -> None:
    """Do `read`, which reads from `readers`, until all ranks have lost the same shards of them. Fails on all ranks."""
    by_name = {reader.corpus: reader for reader in readers}
    lost: list[LostShard] | None = []
    while lost is not None:
        with comms.together():
            read()
        own = [shard for reader in readers for shard in reader.lost]
        lost = share_losses(comms, own, allowed) if allowed else None
        for shard in lost or ():
            by_name[shard.corpus].lose(shard.number, shard.message)
