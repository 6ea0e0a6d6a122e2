"""What people are told of ranks that failed or hang: who, on which host, in which step and phase, doing what.

Pure text from what agents said.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from launch.ranks.hang import Hang, Standing


@dataclass(frozen=True)
class RankStack:
    """The Python stack of a rank as lines, innermost last; `waits_in`: the collective seen in it."""

    global_rank: int
    text: str
    waits_in: str | None = None


def rank_list(ranks: Iterable[int]) -> str:
    """`rank 3`, `ranks 0-2, 5`."""
    ordered = sorted(ranks)
    runs = []
    for _, run in groupby(enumerate(ordered), lambda pair: pair[1] - pair[0]):
        numbers = [number for _, number in run]
        runs.append(str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}")
    return f"rank{'s' if len(ordered) > 1 else ''} {', '.join(runs)}"


def whereabouts(standing: Standing, host: str) -> str:
    """`on node1, in step 12: forward and backward, in all_reduce`."""
    return f"on {host}, {_doing(standing)}"


def hang_sentence(hang: Hang, host_of: Callable[[int], str]) -> str:
    """Who hangs, where and since when."""
    by_rank = {standing.global_rank: standing for standing in hang.standings}
    if not hang.culprits:
        still = min(standing.still_seconds for standing in hang.standings)
        place = _doing(hang.standings[0])
        return f"all ranks hang in the same place for {still:.0f} s ({place}): is the network between them broken?"
    first = by_rank[hang.culprits[0]]
    what = "is stopped (SIGSTOP, or a debugger)" if first.stopped else "hangs"
    others = [standing for standing in hang.standings if standing.global_rank not in hang.culprits]
    waiting = f"; {rank_list(standing.global_rank for standing in others)} wait" if others else ""
    waiting += "s" if len(others) == 1 else ""
    return (
        f"{rank_list(hang.culprits)} {what} for {first.still_seconds:.0f} s "
        f"({whereabouts(first, host_of(first.global_rank))}){waiting}"
    )


def hang_report(hang: Hang, host_of: Callable[[int], str], stacks: Mapping[int, RankStack]) -> str:
    """A line for each rank, and the stacks, those of the culprits first; equal ones once."""
    lines = [f"no rank has moved for longer than {hang.patience_seconds:.0f} s:"]
    for standing in hang.standings:
        mark = "  <- not where the others are" if standing.global_rank in hang.culprits else ""
        stopped = "stopped, " if standing.stopped else ""
        told = stacks.get(standing.global_rank)
        where = whereabouts(standing, host_of(standing.global_rank))
        seen = f", waits in {told.waits_in}" if told and told.waits_in else ""
        lines.append(f"  rank {standing.global_rank} {where}{seen}, {stopped}for {standing.still_seconds:.0f} s{mark}")
    for ranks, text in _grouped(hang, stacks):
        lines += [f"stack of {rank_list(ranks)}:", *(f"    {line}" for line in text.splitlines())]
    return "\n".join(lines)


def _doing(standing: Standing) -> str:
    """In the step after the last finished one."""
    inside = f", in {standing.collective}" if standing.collective else ""
    return f"in step {standing.step + 1}: {standing.phase}{inside}"


def _grouped(hang: Hang, stacks: Mapping[int, RankStack]) -> Sequence[tuple[list[int], str]]:
    groups: dict[str, list[int]] = {}
    for rank in sorted(stacks, key=lambda rank: (rank not in hang.culprits, rank)):
        groups.setdefault(stacks[rank].text, []).append(rank)
    return [(ranks, text) for text, ranks in groups.items()]
