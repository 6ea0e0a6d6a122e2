"""The training loop: what happens in each step, and between steps.

Knows the order of things and nothing of how they are done: the engine takes the step, the loader has the batch, the
saver saves, `state`, `evaluate` and `sample` are handed in. Every decision is taken alike on all ranks: what one rank
alone wishes rides on the step's all-reduce.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptdist.checkpoint.saver import CheckpointSaver
from gptdist.config.sections import CheckpointConfig, MonitorConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from gptdist.data.corpora import short_names
from gptdist.data.loader import BatchLoader
from gptdist.data.samples import SampleSource
from gptdist.engine.engine import StepReport, TrainEngine, Wishes
from gptdist.monitor.sinks import Sinks
from gptdist.monitor.throughput import Throughput, memory_bytes
from gptdist.train.guards import SkipCounter, StopSignals, find_stop_file, on_ranks, take_stop_file
from gptdist.train.lost_shards import AgreeingLoader
from gptdist.train.progress import Progress
from gptdist.train.rollback import check_may_roll_back, gaps_of, plan_rollback
from gptdist.train.save_clock import SaveClock
from gptdist.train.schedule import batch_size_at, learning_rate, total_samples
from gptdist.train.spikes import Spike, SpikeWatch


@dataclass(frozen=True)
class Sections:
    """The parts of a run's config that the loop follows."""

    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig
    checkpoint: CheckpointConfig
    monitor: MonitorConfig


@dataclass(frozen=True)
class Actions:
    """What the loop does between steps; each is called by all ranks. None: the run has no such thing."""

    state: Callable[[Progress, float | None], dict[str, Any]]  # of a checkpoint; the loss of this step's evaluation
    go_back: Callable[[int], tuple[Progress, float | None] | None]  # to before a step; where it is, with that loss
    evaluate: Callable[[Progress], Mapping[str, float]] | None
    sample: Callable[[], str] | None


class TrainLoop:
    """Steps from `progress` to the end, or until someone asks to stop."""

    def __init__(
        self,
        engine: TrainEngine,
        loader: BatchLoader | AgreeingLoader,
        sections: Sections,
        actions: Actions,
        saver: CheckpointSaver,
        save_clock: SaveClock,
        progress: Progress,
        sinks: Sinks,
        throughput: Throughput,
        run_dir: Path,
    ) -> None:
        self.engine = engine
        self.clock = engine.clock
        self.loader = loader
        self.sections = sections
        self.actions = actions
        self.saver = saver
        self.save_clock = save_clock
        self.progress = progress
        self.sinks = sinks
        self.throughput = throughput
        self.run_dir = run_dir
        self.is_first = engine.groups.global_rank == 0
        self._saved_step = progress.step if progress.step else None
        self._measured_step: int | None = None  # of the last save whose times were taken
        self._evaluation: tuple[int, float | None] = (-1, None)  # step, loss
        self._stand_at_progress()

    def _stand_at_progress(self) -> None:
        """What follows from the counters, once they are another run's, or of another step."""
        train, progress = self.sections.train, self.progress
        self._skips = SkipCounter(train.max_skipped_steps, progress.skipped_in_a_row, progress.skipped_total)
        self._spikes = SpikeWatch(train, progress.step, progress.samples, progress.spikes)

    def run(self) -> str | None:
        """Train. None when the last step is done; else why it stopped early, with everything saved to go on later."""
        train = self.sections.train
        if self.progress.step == 0:
            self._evaluate()
        self.loader.start(self.progress.samples, self._batch_size_at)
        reason = None
        with StopSignals() as signals:
            while self.progress.step < train.steps and reason is None:
                report, reason = self._step(signals)
                spike = self._look_for_spike(report)
                if spike is None or not self._roll_back(spike):
                    self._between_steps(report, last=self.progress.step == train.steps)
            # Signals are still only noted: a second one must not end the save that the first one asked for.
            self._save()
            self._finish_saving()
        return reason

    def _step(self, signals: StopSignals) -> tuple[StepReport, str | None]:
        """One optimizer step; and the reason to stop after it, if there is one."""
        progress, train = self.progress, self.sections.train
        self.clock.begin_step()
        batch = self.loader.next()
        step = progress.step + 1
        rate = learning_rate(step, self.sections.optimizer, self.sections.schedule, train.steps)
        # Only rank 0 looks for the file: a shared disk must not be asked by thousands of ranks.
        wishes = Wishes(
            stop=signals.requested is not None or (self.is_first and find_stop_file(self.run_dir) is not None),
            save=self.is_first and self.save_clock.is_due(),
            settle_save=self.saver.poll(),
        )
        report = self.engine.train_step(batch.tokens, rate, step, wishes)
        times = self.clock.end_step(step, batch.wait_seconds)
        progress.step = step
        progress.samples += batch.global_batch_size
        progress.loss = report.loss
        tokens = batch.global_batch_size * self.engine.model.sequence_length
        self.throughput.update(tokens, times.seconds, times.data_wait)
        self._note(report, rate)
        if report.wished.stop:
            return report, self._stop_reason(signals)
        return report, f"train.stop_after ({step})" if step == train.stop_after and step < train.steps else None

    def _note(self, report: StepReport, rate: float) -> None:
        progress, train = self.progress, self.sections.train
        samples_left = total_samples(train, self.sections.schedule) - progress.samples
        remaining = samples_left * self.engine.model.sequence_length
        self.sinks.advance(progress.step, self.throughput.eta_seconds(remaining))
        # fp16 finds its loss scale by skipping; those steps are how it works, until the scale can fall no further.
        searching = train.precision == "fp16" and report.skipped and report.loss_scale > 1
        if searching:
            self._skips.total += 1
        else:
            if report.skipped:
                where = on_ranks(report.culprits)
                self.sinks.text(progress.step, "skipped step", f"the loss or a gradient was not finite{where}")
            self._skips.update(report.skipped, progress.step, report.culprits)
        progress.skipped_in_a_row, progress.skipped_total = self._skips.in_a_row, self._skips.total
        if progress.step % self.sections.monitor.log_interval and progress.step not in (1, train.steps):
            return
        values = {
            "train/loss": report.loss,
            "train/learning_rate": rate,
            "train/grad_norm": report.grad_norm,
            "train/samples": float(progress.samples),
            "memory/bytes": float(memory_bytes(self.engine.network.device.type)),
            **self.throughput.interval(remaining),
            **epoch_values(self.loader.source, progress.samples),
            **self.loader.source.passed_over(),
            **self._save_values(),
        }
        if self._skips.total:
            values["train/skipped_steps"] = float(self._skips.total)
        if self._spikes.total:
            values["train/spikes"] = float(self._spikes.total)
        if progress.rollbacks:
            values["train/rollbacks"] = float(len(progress.rollbacks))
            values["data/left_out_samples"] = float(self.loader.source.gaps.total)
        if train.precision == "fp16":
            values["train/loss_scale"] = report.loss_scale
        self.sinks.log(progress.step, values)

    # -- spikes ------------------------------------------------------------------------------------------------------

    def _look_for_spike(self, report: StepReport) -> Spike | None:
        """The same on every rank, as the report is."""
        progress, source = self.progress, self.loader.source
        if self.sections.train.spike_action == "off":
            return None
        phase = source.blend.phase_at(source.gaps.number(progress.samples - 1))
        spike = self._spikes.update(
            progress.step,
            progress.samples,
            report.loss,
            report.grad_norm,
            skipped=report.skipped,
            level=phase.from_sample,
        )
        if spike:
            self.sinks.text(progress.step, "loss spike", spike.text)
        return spike

    def _roll_back(self, spike: Spike) -> bool:
        """Go back to before a spike, if that is asked for, and there is a checkpoint to go back to."""
        train, earlier = self.sections.train, self.progress.rollbacks
        if train.spike_action != "rollback":
            return False
        check_may_roll_back(spike, earlier, train.max_rollbacks)
        self.clock.phase("saving")
        self.saver.wait()
        while self.saver.poll():
            self._settle_save()
        self.clock.phase("loading")
        found = self.actions.go_back(spike.first_step)
        if found is None:
            self.sinks.text(spike.step, "no rollback", f"there is no checkpoint from before step {spike.first_step}")
            return False
        restored, evaluation_loss = found
        rollback = plan_rollback(spike, restored.step, self.progress.samples, earlier)
        restored.rollbacks = (*earlier, rollback)
        self.progress.become(restored)
        self._stand_at_progress()
        self._evaluation = (restored.step, evaluation_loss)
        self.loader.close()
        self.loader.source.gaps = gaps_of(restored.rollbacks)
        self.loader.start(restored.samples, self._batch_size_at)
        self.sinks.text(
            restored.step, f"rollback {len(restored.rollbacks)} of {train.max_rollbacks}", rollback.render()
        )
        # Saved at once, with what is passed over from here on: a restart must not meet the spike again.
        self._saved_step = None
        self._save()
        return True

    def _between_steps(self, report: StepReport, last: bool) -> None:
        step, interval = self.progress.step, self.sections.checkpoint.interval
        if report.wished.settle_save:
            self._settle_save()
        if last or _due(step, self.sections.train.eval_interval):
            self._evaluate()
        if self.actions.sample and _due(step, self.sections.monitor.sample_interval):
            self.clock.phase("sampling text")
            self.sinks.text(step, "sample", self.actions.sample())
        if report.wished.save or (interval != "auto" and _due(step, interval)):
            self._save()

    def _evaluate(self) -> None:
        if self.actions.evaluate:
            self.clock.phase("evaluating")
            values = self.actions.evaluate(self.progress)
            self._evaluation = (self.progress.step, values.get("eval/loss"))
            self.sinks.log(self.progress.step, values)

    # -- saving ------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        step = self.progress.step
        if self._saved_step == step:
            return
        self.clock.phase("saving")
        self.save_clock.began()
        self.progress.spikes = self._spikes.state()
        loss = self._evaluation[1] if self._evaluation[0] == step else None
        self.saver.save(step, self.engine.fragments(), self.actions.state(self.progress, loss))
        self._saved_step = step
        if not self.saver.background and self.saver.poll():
            self._settle_save()

    def _settle_save(self) -> None:
        """A save failed, and all ranks know: end the run, or say so and go on."""
        self.clock.phase("saving")
        outcome = self.saver.settle()
        assert outcome.error is not None
        allowed = self.sections.checkpoint.max_failed_saves
        if outcome.failed_in_a_row > allowed:
            raise outcome.error
        if self.is_first:
            print(
                f"warning: step {outcome.step} was not saved, training goes on ({outcome.failed_in_a_row} in a row; "
                f"checkpoint.max_failed_saves allows {allowed}): {outcome.error}",
                file=sys.stderr,
                flush=True,
            )

    def _finish_saving(self) -> None:
        """Nobody may say "saved" before the last save is over and good; that one has no next one to make up for it."""
        self.clock.phase("saving")
        last = self.saver.wait()
        if last is not None and last.error is not None:
            raise last.error
        while self.saver.poll():
            self._settle_save()

    def _save_values(self) -> dict[str, float]:
        """What the last save took, once."""
        last = self.saver.last
        if last is None or last.error is not None or last.step == self._measured_step:
            return {}
        self._measured_step = last.step
        self.save_clock.measured(last.stall_seconds, last.seconds)
        return {"checkpoint/stall_seconds": last.stall_seconds, "checkpoint/save_seconds": last.seconds}

    def _stop_reason(self, signals: StopSignals) -> str:
        if self.is_first and find_stop_file(self.run_dir) is not None:
            return take_stop_file(self.run_dir)
        return signals.requested or "a stop request on another rank"

    def _batch_size_at(self, sample: int) -> int:
        return batch_size_at(sample, self.sections.train, self.sections.schedule)


def epoch_values(source: SampleSource, samples: int) -> dict[str, float]:
    """`data/epoch`: how often the corpus has been read through; of a blend, `data/epoch/NAME` of each."""
    epochs = source.epochs(samples)
    if len(epochs) == 1:
        return {"data/epoch": next(iter(epochs.values()))}
    names = short_names(source.blend.corpora)
    return {f"data/epoch/{names[name]}": value for name, value in epochs.items()}


def _due(step: int, interval: int) -> bool:
    return interval > 0 and step % interval == 0
