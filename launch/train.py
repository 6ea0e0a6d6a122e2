"""One rank of a run, built in order: config, data, ranks, engine, state, loop. The same code under every launcher.

This is where the parts meet; each part is handed its own section and knows nothing of the others.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gptdist.checkpoint.saver import CheckpointSaver
from gptdist.checkpoint.write import set_aside_checkpoints
from gptdist.comms import Comms
from gptdist.config.check import check_run
from gptdist.config.load import LoadedRun, render_config
from gptdist.config.sections import RunConfig
from gptdist.data.corpora import build_source, open_corpora, open_stores, open_tokenizer, short_names
from gptdist.data.loader import BatchLoader, held_out_batches
from gptdist.data.manifest import Manifest
from gptdist.data.reader import TokenReader
from gptdist.data.samples import SampleSource
from gptdist.data.store import Store
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.durable import write_durably
from gptdist.engine.clock import StepClock
from gptdist.engine.engine import TrainEngine
from gptdist.engine.zero_config import memory_note
from gptdist.errors import EXIT_DONE, EXIT_RESUMABLE, ConfigError, StorageError
from gptdist.layout import Layout
from gptdist.model.parameters import flops_per_token, parameter_count
from gptdist.monitor.console import CorpusUse, RunHeader, render_run_header
from gptdist.monitor.heartbeat import Heartbeat
from gptdist.monitor.peaks import peak_flops
from gptdist.monitor.sinks import Sinks, build_sinks, check_sinks
from gptdist.monitor.throughput import Throughput
from gptdist.train.evaluate import blend_values, held_out_values
from gptdist.train.loop import Actions, Sections, TrainLoop
from gptdist.train.lost_shards import AgreeingLoader, lose_alike
from gptdist.train.progress import (
    Progress,
    check_same_on_all_ranks,
    data_identity,
    run_state,
)
from gptdist.train.rollback import gaps_of
from gptdist.train.sample import generate
from gptdist.train.save_clock import SaveClock
from gptdist.train.schedule import batch_size_at, total_samples
from gptdist.world import World
from launch.elastic import Fit, fit_layout
from launch.models.stored import checkpoints_dir
from launch.preflight.check import run_preflight
from launch.rendezvous import join, leave
from launch.saving import (
    check_room,
    note_verified,
    open_saver,
    open_uploader,
)
from launch.take_up import Start, go_back, take_up

CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class RunData:
    """The corpora of a run, opened, by their names in the config; `validation` has those with held-out text enough."""

    tokenizer: CorpusTokenizer
    train: Mapping[str, TokenReader]
    validation: Mapping[str, TokenReader]
    stores: Mapping[str, Store]

    def stop_fetching(self) -> None:
        """Whoever waits for a file from now on gets an error."""
        for store in self.stores.values():
            store.close()

    def close(self) -> None:
        """Let all files go."""
        self.stop_fetching()
        for reader in (*self.train.values(), *self.validation.values()):
            reader.close()

    @property
    def names(self) -> tuple[str, ...]:
        """The corpora as they may be shown: without what may be secret in a URL."""
        return tuple(reader.corpus for reader in self.train.values())

    @property
    def manifests(self) -> dict[str, Manifest]:
        return {name: reader.manifest for name, reader in self.train.items()}


def run_rank(loaded: LoadedRun, world: World, *, fresh: bool) -> int:
    """Train to the end or to a stop; returns the exit code. Raises GptdistError, the same on every rank."""
    fit = fit_layout(loaded.config, world.world_size)
    config = fit.config
    layout = check_run(config, world.world_size, loaded.origins)
    check_sinks(config.monitor)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    clock = StepClock(Heartbeat.open(world.heartbeat_fd))
    with clock.watching_collectives(device):
        comms = join(world, config.launch.timeout, device)
        try:
            if config.launch.preflight:
                clock.phase("preflight")
                run_preflight(config, layout, comms, device)
            clock.phase("loading")
            with comms.together():
                data = open_data(config)
            try:
                check_same_on_all_ranks(data_identity(config, data.manifests), data.names, comms)
                return _train(loaded, fit, layout, world, comms, data, fresh, clock)
            finally:
                data.close()
        finally:
            clock.phase("ending")
            leave()


def open_data(config: RunConfig) -> RunData:
    """Open the corpora and check that the model fits them. Raises CorpusError, or ConfigError for the model's sizes."""
    length = config.model.sequence_length
    stores = open_stores(config.data)
    train = open_corpora(config.data, "train", stores)
    for reader in train.values():
        reader.num_windows(length)
    tokenizer = open_tokenizer(train)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({config.model.vocab_size}) is smaller than the {tokenizer.vocab_size} ids of the "
            f"corpus's tokenizer ({next(iter(train))}). Set model.vocab_size: {tokenizer.vocab_size}."
        )
    held_out = open_corpora(config.data, "validation", stores)
    # One shorter than a window has nothing to evaluate on.
    validation = {name: reader for name, reader in held_out.items() if reader.num_tokens > length}
    return RunData(tokenizer, train, validation, stores)


def write_run_folder(run_dir: Path, loaded: LoadedRun, data: RunData) -> None:
    """Make the run's folder, with the config as it was resolved and the tokenizer, so that it stands by itself."""
    files = {CONFIG_FILE: render_config(loaded).encode(), TOKENIZER_FILE: data.tokenizer.content}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_durably(run_dir / name, content)
    except OSError as error:
        raise StorageError(
            f"cannot write the run's folder {run_dir}: {error.strerror or error}. Set launch.run_dir to a folder that "
            "this user can write, on a disk with room."
        ) from error


def _train(
    loaded: LoadedRun,
    fit: Fit,
    layout: Layout,
    world: World,
    comms: Comms,
    data: RunData,
    fresh: bool,
    clock: StepClock,
) -> int:
    """`loaded` is as the user wrote it, and so the run's folder keeps it; what trains is what `fit` made of it."""
    config = fit.config
    end_of_text = data.tokenizer.end_of_text if config.data.mask_documents else None
    sections = (config.model, config.optimizer, config.parallel, config.train)
    engine = TrainEngine(*sections, layout, world, end_of_text, clock)
    try:
        identity = data_identity(config, data.manifests)
        start = take_up(config, layout, engine, comms, identity, fresh=fresh)
        progress = start.progress
        clock.heartbeat.resume(progress.step)
        done = progress.step >= config.train.steps
        if not done:
            _check_before_writing(config, layout, engine, comms, data, progress)
            _write_first(loaded, comms, data, fresh)
            if start.resumed_from and comms.is_first:
                note_verified(Path(start.resumed_from))
        if comms.is_first:
            print(render_run_header(_header(config, layout, engine, data, start)), flush=True)
            for note in (fit.note, *start.notes, *repeat_notes(config, data, progress), memory_note(config.parallel)):
                if note:
                    print(f"note    {note}", flush=True)
        if done:
            if comms.is_first:
                print(f"nothing to do: train.steps ({config.train.steps}) are done. Raise it to go on.", flush=True)
            return EXIT_DONE
        return _steps(config, layout, world, comms, data, engine, start, clock)
    finally:
        engine.close()


def _steps(
    config: RunConfig,
    layout: Layout,
    world: World,
    comms: Comms,
    data: RunData,
    engine: TrainEngine,
    start: Start,
    clock: StepClock,
) -> int:
    """From where the run begins to its end or a stop, with all that works beside the steps; returns the exit code."""
    progress = start.progress
    uploader = open_uploader(config, world)
    resumed_from = Path(start.resumed_from) if start.resumed_from else None
    saver = open_saver(config, world, resumed_from, uploader, clock.heartbeat)
    if saver.background:
        with comms.together():
            saver.prepare(engine.fragments())
    plain = _build_loader(config, layout, engine, data, progress)
    allowed = config.data.max_unreadable_shards
    loader = AgreeingLoader(plain, comms, allowed) if allowed else plain
    patience = config.launch.timeout  # after an error: a save that is being written is worth finishing
    try:
        with _sinks(config, comms, progress) as sinks:
            loop = _build_loop(config, world, layout, engine, comms, data, loader, saver, progress, sinks)
            stopped = loop.run()
    except KeyboardInterrupt:
        patience = 0.0  # the second Ctrl-C, which was promised to end the run at once
        raise
    finally:
        clock.phase("ending")
        saver.close(patience)
        data.stop_fetching()  # the reading thread may be waiting for a shard
        loader.close()
    if comms.is_first:
        where = checkpoints_dir(config)
        end = f"stopped: {stopped}; run the same command to go on" if stopped else "done"
        print(f"{end}. Step {progress.step} is saved in {where}", flush=True)
    if uploader:
        clock.phase("uploading")
        uploader.close()
    return EXIT_RESUMABLE if stopped else EXIT_DONE


def _check_before_writing(
    config: RunConfig, layout: Layout, engine: TrainEngine, comms: Comms, data: RunData, progress: Progress
) -> None:
    """What can still be the user's mistake, while no file was made or changed: damaged data, a disk too small."""
    with comms.together():
        loader = _build_loader(config, layout, engine, data, progress)
        try:
            loader.start(progress.samples, lambda sample: batch_size_at(sample, config.train, config.schedule))
            loader.next()
        finally:
            loader.close()
        if comms.is_first:
            warning = check_room(config)
            if warning:
                print(f"warning: {warning}", file=sys.stderr, flush=True)
    _read_held_out(config, engine, comms, data)


def _read_held_out(config: RunConfig, engine: TrainEngine, comms: Comms, data: RunData) -> None:
    """Read what an evaluation reads, so that what cannot be read ends all ranks, or is passed over by all."""
    length, train = config.model.sequence_length, config.train
    rank, size = engine.groups.data_rank, engine.layout.data
    readers = tuple(data.validation.values())

    def read() -> None:
        for reader in readers:
            for _ in held_out_batches(reader, length, train.eval_samples, train.micro_batch_size, rank, size):
                pass

    lose_alike(comms, read, readers, config.data.max_unreadable_shards)


def _write_first(loaded: LoadedRun, comms: Comms, data: RunData, fresh: bool) -> None:
    """The run's folder; with `fresh`, what was in its way is set aside."""
    config = loaded.config
    moved = set_aside_checkpoints(checkpoints_dir(config), comms) if fresh else None
    with comms.together():
        if comms.is_first:
            write_run_folder(Path(config.launch.run_dir), loaded, data)
    if moved and comms.is_first:
        print(f"--fresh: earlier checkpoints are now in {moved}", flush=True)


def _build_loader(
    config: RunConfig, layout: Layout, engine: TrainEngine, data: RunData, progress: Progress
) -> BatchLoader:
    return BatchLoader(
        run_source(config, data, progress),
        config.train.micro_batch_size,
        engine.groups.data_rank,
        layout.data,
        config.data.prefetch,
    )


def run_source(config: RunConfig, data: RunData, progress: Progress) -> SampleSource:
    """The samples of the run, but for those that it is known to pass over."""
    return build_source(config.data, data.train, config.model.sequence_length, gaps_of(progress.rollbacks))


def _sinks(config: RunConfig, comms: Comms, progress: Progress) -> Sinks:
    if not comms.is_first:
        return Sinks()
    return build_sinks(config.monitor, Path(config.launch.run_dir), progress.step, config.train.steps)


def _build_loop(
    config: RunConfig,
    world: World,
    layout: Layout,
    engine: TrainEngine,
    comms: Comms,
    data: RunData,
    loader: BatchLoader | AgreeingLoader,
    saver: CheckpointSaver,
    progress: Progress,
    sinks: Sinks,
) -> TrainLoop:
    def state(progress: Progress, evaluation_loss: float | None) -> dict[str, Any]:
        return run_state(progress, config, layout.describe(), data.manifests, engine.state(), evaluation_loss)

    def back(before_step: int) -> tuple[Progress, float | None] | None:
        start = go_back(before_step, config, layout, engine, comms, data_identity(config, data.manifests))
        return None if start is None else (start.progress, start.evaluation_loss)

    names = short_names(tuple(data.train))

    def evaluate(progress: Progress) -> dict[str, float]:
        train = config.train
        if any(reader.wants_ahead for reader in data.validation.values()):
            _read_held_out(config, engine, comms, data)  # it may have to be fetched again
        by_corpus = {
            names[name]: held_out_values(engine, reader, train.eval_samples, train.micro_batch_size)
            for name, reader in data.validation.items()
        }
        if len(data.train) == 1:
            return next(iter(by_corpus.values()))
        last = max(0, loader.source.gaps.stop(progress.samples) - 1)  # sample trained on
        phase = loader.source.blend.phase_at(last)
        return blend_values(by_corpus, {names[name]: phase.share(name) for name in data.train})

    def sample() -> str:
        prompt = data.tokenizer.encode(config.monitor.sample_prompt) or [data.tokenizer.end_of_text]
        ids = generate(engine, comms, prompt, config.monitor.sample_tokens, end_of_text=data.tokenizer.end_of_text)
        return config.monitor.sample_prompt + data.tokenizer.decode(ids)

    peak = config.monitor.peak_tflops and config.monitor.peak_tflops * 1e12
    if peak is None and torch.cuda.is_available():
        peak = peak_flops(torch.cuda.get_device_name(), config.train.precision)
    return TrainLoop(
        engine,
        loader,
        Sections(config.train, config.optimizer, config.schedule, config.checkpoint, config.monitor),
        Actions(state, back, evaluate if data.validation else None, sample if config.monitor.sample_interval else None),
        saver,
        SaveClock(config.checkpoint, world.world_size // world.local_world_size),
        progress,
        sinks,
        Throughput(flops_per_token(config.model), layout.world_size, peak),
        Path(config.launch.run_dir),
    )


def _header(
    config: RunConfig,
    layout: Layout,
    engine: TrainEngine,
    data: RunData,
    start: Start,
) -> RunHeader:
    device = torch.cuda.get_device_name() if engine.network.device.type == "cuda" else "cpu"
    return RunHeader(
        parameters=parameter_count(config.model),
        layout=layout.describe(),
        devices=f"{layout.world_size} x {device}",
        precision=config.train.precision,
        global_batch_size=config.train.global_batch_size,
        sequence_length=config.model.sequence_length,
        steps=config.train.steps,
        total_samples=total_samples(config.train, config.schedule),
        run_dir=config.launch.run_dir,
        resumed_from=start.resumed_from,
        begun_with=start.begun_with,
        start_step=start.progress.step,
        start_sample=start.progress.samples,
        corpora=corpus_uses(config, data, start.progress),
    )


def corpus_uses(config: RunConfig, data: RunData, progress: Progress) -> tuple[CorpusUse, ...]:
    """How much of each corpus the whole run takes, with what it passes over."""
    source, trained_on = run_source(config, data, progress), total_samples(config.train, config.schedule)
    samples = source.gaps.stop(trained_on)
    counts, epochs = source.blend.counts(samples), source.epochs(trained_on)
    uses = []
    for (name, reader), count in zip(data.train.items(), counts, strict=True):
        split = reader.manifest.split("train")
        uses.append(CorpusUse(reader.corpus, split.tokens, split.documents, count / samples, epochs[name]))
    return tuple(uses)


def repeat_notes(config: RunConfig, data: RunData, progress: Progress) -> list[str]:
    """What to know before a run that reads a corpus more than once."""
    uses = corpus_uses(config, data, progress)
    return [f"{use.name} will be read {use.epochs:.3g} times" for use in uses if use.epochs > 1]
