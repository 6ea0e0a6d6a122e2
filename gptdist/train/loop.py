"""The training loop: what happens in each step, and between steps.

Knows the order of things and nothing of how they are done: the engine takes the step, the loader has the batch, `save`,
`evaluate` and `sample` are handed in. Every decision is taken alike on all ranks.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gptdist.config.sections import CheckpointConfig, MonitorConfig, OptimizerConfig, ScheduleConfig, TrainConfig
from gptdist.data.corpora import short_names
from gptdist.data.loader import BatchLoader
from gptdist.data.samples import SampleSource
from gptdist.engine.engine import StepReport, TrainEngine
from gptdist.monitor.sinks import Sinks
from gptdist.monitor.throughput import Throughput, memory_bytes
from gptdist.train.guards import SkipCounter, StopSignals, find_stop_file, take_stop_file
from gptdist.train.lost_shards import AgreeingLoader
from gptdist.train.progress import Progress
from gptdist.train.schedule import batch_size_at, learning_rate, total_samples


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

    save: Callable[[Progress], Path]
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
        progress: Progress,
        sinks: Sinks,
        throughput: Throughput,
        run_dir: Path,
    ) -> None:
        self.engine = engine
        self.loader = loader
        self.sections = sections
        self.actions = actions
        self.progress = progress
        self.sinks = sinks
        self.throughput = throughput
        self.run_dir = run_dir
        self.is_first = engine.groups.global_rank == 0
        self._saved_step = progress.step if progress.step else None
        self._skips = SkipCounter(sections.train.max_skipped_steps, progress.skipped_in_a_row, progress.skipped_total)

    def run(self) -> str | None:
        """Train. None when the last step is done; else why it stopped early, with everything saved to go on later."""
        train = self.sections.train
        if self.progress.step == 0:
            self._evaluate()
        self.loader.start(self.progress.samples, self._batch_size_at)
        reason = None
        with StopSignals() as signals:
            while self.progress.step < train.steps and reason is None:
                reason = self._step(signals)
                self._between_steps(last=self.progress.step == train.steps)
        self._save()
        return reason

    def _step(self, signals: StopSignals) -> str | None:
        """One optimizer step; the reason to stop after it, if there is one."""
        progress, train = self.progress, self.sections.train
        started = time.perf_counter()
        batch = self.loader.next()
        step = progress.step + 1
        rate = learning_rate(step, self.sections.optimizer, self.sections.schedule, train.steps)
        # Only rank 0 looks for the file: a shared disk must not be asked by thousands of ranks.
        wished = signals.requested is not None or (self.is_first and find_stop_file(self.run_dir) is not None)
        report = self.engine.train_step(batch.tokens, rate, step, stop_requested=wished)
        progress.step = step
        progress.samples += batch.global_batch_size
        progress.loss = report.loss
        tokens = batch.global_batch_size * self.engine.model.sequence_length
        self.throughput.update(tokens, time.perf_counter() - started, batch.wait_seconds)
        self._note(report, rate)
        if report.stop_requested:
            return self._stop_reason(signals)
        return f"train.stop_after ({step})" if step == train.stop_after and step < train.steps else None

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
            self._skips.update(report.skipped, progress.step)
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
        }
        if self._skips.total:
            values["train/skipped_steps"] = float(self._skips.total)
        if train.precision == "fp16":
            values["train/loss_scale"] = report.loss_scale
        self.sinks.log(progress.step, values)

    def _between_steps(self, last: bool) -> None:
        step = self.progress.step
        if last or _due(step, self.sections.train.eval_interval):
            self._evaluate()
        if self.actions.sample and _due(step, self.sections.monitor.sample_interval):
            self.sinks.text(step, "sample", self.actions.sample())
        if _due(step, self.sections.checkpoint.interval):
            self._save()

    def _evaluate(self) -> None:
        if self.actions.evaluate:
            self.sinks.log(self.progress.step, self.actions.evaluate(self.progress))

    def _save(self) -> None:
        if self._saved_step != self.progress.step:
            self.actions.save(self.progress)
            self._saved_step = self.progress.step

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
