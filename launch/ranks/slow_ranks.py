"""Which ranks hold the others up, judged from how long each one's own work took in the last steps.

Pure: knows times, and how much work the layout gives each rank; no process and no clock. Everyone's step is as long as
the slowest rank's, so what counts is a step without the time a rank waited in collectives. Where that time is not known
(such as of collectives that run beside a GPU's computing) all ranks look alike, and none is named.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, median_low

from gptdist.config.sections import ModelConfig
from gptdist.layout import Layout
from gptdist.model.parameters import flops_per_token
from gptdist.monitor.heartbeat import StepTimes

WINDOW = 16
"""Steps that are looked at."""
OFTEN = 12
"""In so many of them a rank has to be slow: garbage collection, an evaluation or a save make single steps slow."""
LEAST_SECONDS = 0.5
"""What the rank must have cost the run in the window. Steps of milliseconds are uneven on any machine, and no loss."""

UNEQUAL_FACTOR = 2.0
"""How much slower still a rank has to be where nobody does the same work: loads are estimates."""

_PARTS = ("waiting for data", "forward", "backward", "the rest of the step")


@dataclass(frozen=True)
class SlowRank:
    """A rank that needs `factor` times as long as its peers for its own part of a step; medians of steps, seconds.
    `part`: where most of it goes."""

    global_rank: int
    factor: float
    seconds: float
    peers_seconds: float
    part: str
    first_step: int
    last_step: int

    def describe(self) -> str:
        """One clause."""
        return (
            f"rank {self.global_rank} is {self.factor:.1f} times slower than its peers: {self.seconds:.3g} s of its "
            f"own a step against {self.peers_seconds:.3g} s, most of the difference in {self.part} (steps "
            f"{self.first_step} to {self.last_step})"
        )


class SlowRanks:
    """What was said of slow ranks so far, so that each is named once, and again only after it was as fast as others."""

    def __init__(self, factor: float, loads: Mapping[int, float] | None = None) -> None:
        self._factor, self._loads = factor, loads
        self._named: set[int] = set()

    def look(self, recent: Mapping[int, Sequence[StepTimes]]) -> list[SlowRank]:
        """Ranks that are slow and were not named yet, by the recent steps of all ranks."""
        slow = find_slow_ranks(recent, self._factor, self._loads)
        new = [rank for rank in slow if rank.global_rank not in self._named]
        self._named = {rank.global_rank for rank in slow}
        return new


def find_slow_ranks(
    recent: Mapping[int, Sequence[StepTimes]], factor: float, loads: Mapping[int, float] | None = None
) -> list[SlowRank]:
    """Ranks whose own time was more than `factor` times their peers' in most of the last steps, the slowest first.

    `recent`: each rank's last steps, in order; those that all have are compared. `loads`: each rank's share of the
    work, in any unit (`rank_loads`); None: all have the same. Peers have the same load. A rank without any is compared
    with all others, as they stand and by load, and has to be UNEQUAL_FACTOR times as slow again.
    """
    by_step = {rank: {times.step: times for times in steps} for rank, steps in recent.items()}
    if len(by_step) < 2:
        return []
    steps = sorted(set.intersection(*(set(times) for times in by_step.values())))[-WINDOW:]
    if len(steps) < WINDOW:
        return []
    window = {rank: [times[step] for step in steps] for rank, times in by_step.items()}
    own = {rank: [times.seconds - times.collective_wait for times in row] for rank, row in window.items()}
    loads = loads or dict.fromkeys(own, 1.0)
    slow = []
    for rank in own:
        others = [other for other in own if other != rank]
        peers = [other for other in others if loads[other] == loads[rank]]
        others, bar = (peers, factor) if peers else (others, factor * UNEQUAL_FACTOR)
        # Never scaled down: where a load is light, what does not depend on it counts most.
        scale = {other: max(1.0, loads[rank] / loads[other]) for other in others}
        typical = [median_low(scale[other] * own[other][at] for other in others) for at in range(WINDOW)]
        pairs = list(zip(own[rank], typical, strict=True))
        often = sum(mine > bar * theirs for mine, theirs in pairs)
        if often >= OFTEN and sum(mine - theirs for mine, theirs in pairs) >= LEAST_SECONDS:
            mine, theirs = median(own[rank]), median(typical)
            part = _where(window[rank], [window[other] for other in others])
            slow.append(SlowRank(rank, mine / max(theirs, 1e-9), mine, theirs, part, steps[0], steps[-1]))
    return sorted(slow, key=lambda found: -found.factor)


def rank_loads(model: ModelConfig, layout: Layout) -> dict[int, float]:
    """FLOPs per token of each rank's pipeline stage: its layers, and the output head on the last one.

    Looking up embeddings costs none to speak of, but updating them does: the first stage is no other one's peer.
    """
    head = 6.0 * model.vocab_size * model.hidden_size
    layer = (flops_per_token(model) - head) / model.num_layers
    of_stage = []
    for stage in range(layout.pipeline):
        layers = sum(len(layout.layers(model.num_layers, stage, chunk)) for chunk in range(layout.virtual_pipeline))
        ends = (head if stage == layout.pipeline - 1 else 0.0) + (model.hidden_size if stage == 0 else 0)
        of_stage.append(layers * layer + ends)
    return {rank: of_stage[layout.pipeline_stage(rank)] for rank in range(layout.world_size)}


def _where(mine: Sequence[StepTimes], others: Collection[Sequence[StepTimes]]) -> str:
    """The part of the step in which a rank loses most against the others."""
    typical = [median(column) for column in zip(*(_parts(times) for row in others for times in row), strict=True)]
    medians = [median(column) for column in zip(*(_parts(times) for times in mine), strict=True)]
    losses = [here - there for here, there in zip(medians, typical, strict=True)]
    return _PARTS[losses.index(max(losses))]


def _parts(times: StepTimes) -> tuple[float, ...]:
    rest = times.compute - times.forward - times.backward
    return times.data_wait, times.forward, times.backward, rest
