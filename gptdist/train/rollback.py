"""A rollback: where a run goes back to after a loss spike, which samples it passes over, and when it gives up.

Pure; what is recorded here rides in every later checkpoint, and is all that there is to know of it: a run that resumes
takes the same samples as the one that went back. Reading the checkpoint is `launch/take_up.py`'s.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gptdist.data.gaps import Gaps
from gptdist.errors import TooManySpikes
from gptdist.train.spikes import Spike


@dataclass(frozen=True)
class Rollback:
    """From `step` back to the checkpoint of `to_step`; sample numbers `first_sample` to `stop_sample` - 1 are passed
    over from then on."""

    step: int
    to_step: int
    first_sample: int
    stop_sample: int
    why: str

    @classmethod
    def restored(cls, record: Mapping[str, Any]) -> "Rollback":
        """From its JSON, the fields by name."""
        step, to_step, first, stop = (int(record[name]) for name in ("step", "to_step", "first_sample", "stop_sample"))
        return cls(step, to_step, first, stop, str(record["why"]))

    def render(self) -> str:
        """`back from step 613 to step 500; samples 9,800 to 9,999 are passed over. step 613: loss ...`"""
        return (
            f"back from step {self.step:,} to step {self.to_step:,}; samples {self.first_sample:,} to "
            f"{self.stop_sample - 1:,} are passed over. {self.why}"
        )


def gaps_of(rollbacks: Iterable[Rollback]) -> Gaps:
    """The samples that a run passes over."""
    return Gaps.of((rollback.first_sample, rollback.stop_sample) for rollback in rollbacks)


def plan_rollback(spike: Spike, to_step: int, samples: int, earlier: Sequence[Rollback]) -> Rollback:
    """The rollback for a spike that was found after `samples` samples: its suspect window is passed over."""
    gaps = gaps_of(earlier)
    return Rollback(spike.step, to_step, gaps.number(spike.first_sample), gaps.stop(samples), spike.text)


def check_may_roll_back(spike: Spike, earlier: Sequence[Rollback], allowed: int) -> None:
    """Raises TooManySpikes where the run has gone back as often as it may."""
    if len(earlier) < allowed:
        return
    record = "".join(f"\n  {rollback.render()}" for rollback in earlier)
    raise TooManySpikes(
        f"the loss spiked once more, and train.max_rollbacks ({allowed}) rollbacks were made: {spike.text}. Lower "
        "optimizer.learning_rate, lengthen schedule.warmup_steps, or look at the samples that were passed over "
        "(gptdist data order CONFIG --check); then run the same command again, with a higher train.max_rollbacks."
        f"{record}"
    )
