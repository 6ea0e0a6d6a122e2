"""One rank of a run, built in order: config, data, ranks, engine, state, loop. The same code under every launcher.

This is where the parts meet; each part is handed its own section and knows nothing of the others.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from gptdist.checkpoint.folder import free_bytes, write_durably
from gptdist.checkpoint.read import Checkpoint, find_latest
from gptdist.checkpoint.write import save_checkpoint, set_aside_checkpoints
from gptdist.comms import Comms
from gptdist.config.check import check_run
from gptdist.config.load import LoadedRun, render_config
from gptdist.config.sections import RunConfig
from gptdist.data.loader import BatchLoader, held_out_batches
from gptdist.data.order import WindowOrder
from gptdist.data.reader import TokenReader
from gptdist.data.tokenizer import CorpusTokenizer
from gptdist.engine.engine import TrainEngine
from gptdist.engine.zero_config import memory_note
from gptdist.errors import EXIT_DONE, EXIT_RESUMABLE, ConfigError, CorpusError, StorageError
from gptdist.layout import Layout
from gptdist.model.parameters import flops_per_token, parameter_count
from gptdist.monitor.console import RunHeader, render_run_header
from gptdist.monitor.peaks import peak_flops
from gptdist.monitor.sinks import Sinks, build_sinks, check_sinks
from gptdist.monitor.throughput import Throughput
from gptdist.train.evaluate import held_out_values
from gptdist.train.loop import Actions, Sections, TrainLoop
from gptdist.train.progress import (
    Progress,
    check_same_data,
    check_same_model,
    data_identity,
    restored_progress,
    run_state,
)
from gptdist.train.sample import generate
from gptdist.train.schedule import batch_size_at, total_samples
from gptdist.world import World
from launch.rendezvous import join, leave

CONFIG_FILE = "config.yaml"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class RunData:
    """The corpus of a run, opened."""

    tokenizer: CorpusTokenizer
    train: TokenReader
    validation: TokenReader | None


def run_rank(loaded: LoadedRun, world: World, *, fresh: bool) -> int:
    """Train to the end or to a stop; returns the exit code. Raises GptdistError, the same on every rank."""
    config = loaded.config
    layout = check_run(config, world.world_size, loaded.origins)
    check_sinks(config.monitor)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    comms = join(world, config.launch.timeout, device)
    try:
        with comms.together():
            data = open_data(config)
        return _train(loaded, layout, world, comms, data, fresh)
    finally:
        leave()


def open_data(config: RunConfig) -> RunData:
    """Open the corpus and check that the model fits it. Raises CorpusError, or ConfigError for the model's sizes."""
    corpus_dir = Path(config.data.corpus)
    train = TokenReader(corpus_dir, "train", config.data.verify)
    train.num_windows(config.model.sequence_length)
    tokenizer = CorpusTokenizer.load(corpus_dir)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size ({config.model.vocab_size}) is smaller than the {tokenizer.vocab_size} ids of the "
            f"corpus's tokenizer ({corpus_dir}). Set model.vocab_size: {tokenizer.vocab_size}."
        )
    validation = None
    if "validation" in train.manifest.splits:
        validation = TokenReader(corpus_dir, "validation", config.data.verify)
        try:
            validation.num_windows(config.model.sequence_length)
        except CorpusError:
            validation = None  # shorter than one window: nothing to evaluate on
    return RunData(tokenizer, train, validation)


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


def checkpoints_dir(config: RunConfig) -> Path:
    """Where the run's checkpoints are."""
    return Path(config.checkpoint.dir or Path(config.launch.run_dir) / "checkpoints")


def _train(loaded: LoadedRun, layout: Layout, world: World, comms: Comms, data: RunData, fresh: bool) -> int:
    config = loaded.config
    end_of_text = data.tokenizer.end_of_text if config.data.mask_documents else None
    engine = TrainEngine(config.model, config.optimizer, config.parallel, config.train, layout, world, end_of_text)
    try:
        progress, resumed_from = _take_up(config, engine, comms, data, fresh)
        done = progress.step >= config.train.steps
        if not done:
            _check_before_writing(config, layout, engine, comms, data, progress)
            _write_first(loaded, comms, data, fresh)
        if comms.is_first:
            print(render_run_header(_header(config, layout, engine, data, progress, resumed_from)), flush=True)
            if note := memory_note(config.parallel):
                print(f"note    {note}", flush=True)
        if done:
            if comms.is_first:
                print(f"nothing to do: train.steps ({config.train.steps}) are done. Raise it to go on.", flush=True)
            return EXIT_DONE
        loader = _build_loader(config, layout, engine, data)
        try:
            with _sinks(config, comms, progress) as sinks:
                loop = _build_loop(config, layout, engine, comms, data, loader, progress, sinks)
                stopped = loop.run()
        finally:
            loader.close()
        if comms.is_first:
            where = checkpoints_dir(config)
            end = f"stopped: {stopped}; run the same command to go on" if stopped else "done"
            print(f"{end}. Step {progress.step} is saved in {where}", flush=True)
        return EXIT_RESUMABLE if stopped else EXIT_DONE
    finally:
        engine.close()


def _take_up(
    config: RunConfig, engine: TrainEngine, comms: Comms, data: RunData, fresh: bool
) -> tuple[Progress, str | None]:
    """The newest good checkpoint's state in the engine, or initial weights. Returns where the run is, and from what."""
    found = None if fresh else find_latest(checkpoints_dir(config), comms)
    if found is None:
        engine.initialise()
        return Progress(), None
    if comms.is_first:
        for reason in found.skipped:
            print(f"warning: passed over a checkpoint: {reason}", flush=True)
    with found.checkpoint as checkpoint:
        check_same_model(weight_shapes(checkpoint), config.model, str(checkpoint.path))
        current = data_identity(config, data.train.manifest)
        check_same_data(checkpoint.state["data"], current, str(checkpoint.path))
        with comms.together():
            engine.read(checkpoint, checkpoint.state["engine"])
        engine.refresh()
        return restored_progress(checkpoint.state), str(checkpoint.path)


def _check_before_writing(
    config: RunConfig, layout: Layout, engine: TrainEngine, comms: Comms, data: RunData, progress: Progress
) -> None:
    """What can still be the user's mistake, while no file was made or changed: damaged data, a disk too small."""
    with comms.together():
        loader = _build_loader(config, layout, engine, data)
        try:
            loader.start(progress.samples, lambda sample: batch_size_at(sample, config.train, config.schedule))
            loader.next()
        finally:
            loader.close()
        if data.validation:
            length, train = config.model.sequence_length, config.train
            rank, size = engine.groups.data_rank, layout.data
            for _ in held_out_batches(data.validation, length, train.eval_samples, train.micro_batch_size, rank, size):
                pass
        if comms.is_first:
            _check_room(config)


def _check_room(config: RunConfig) -> None:
    """Raise StorageError where not even one checkpoint fits: weights and two moments, 4 bytes each."""
    folder = checkpoints_dir(config)
    needed, free = 12 * parameter_count(config.model), free_bytes(folder)
    if free < needed:
        raise StorageError(
            f"{folder} has room for {free:,} bytes, one checkpoint of this model needs {needed:,}. Free some space, or "
            "set checkpoint.dir to a larger disk."
        )


def _write_first(loaded: LoadedRun, comms: Comms, data: RunData, fresh: bool) -> None:
    """The run's folder; with `fresh`, what was in its way is set aside."""
    config = loaded.config
    moved = set_aside_checkpoints(checkpoints_dir(config), comms) if fresh else None
    with comms.together():
        if comms.is_first:
            write_run_folder(Path(config.launch.run_dir), loaded, data)
    if moved and comms.is_first:
        print(f"--fresh: earlier checkpoints are now in {moved}", flush=True)


def weight_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Logical name -> shape of a checkpoint's weights."""
    names = checkpoint.names("weight/")
    return {name.removeprefix("weight/"): checkpoint.shape(name) for name in names}


def _build_loader(config: RunConfig, layout: Layout, engine: TrainEngine, data: RunData) -> BatchLoader:
    length = config.model.sequence_length
    order = WindowOrder(config.data.seed, data.train.num_windows(length))
    return BatchLoader(
        data.train,
        order,
        length,
        config.train.micro_batch_size,
        engine.groups.data_rank,
        layout.data,
        config.data.prefetch,
    )


def _sinks(config: RunConfig, comms: Comms, progress: Progress) -> Sinks:
    if not comms.is_first:
        return Sinks()
    return build_sinks(config.monitor, Path(config.launch.run_dir), progress.step, config.train.steps)


def _build_loop(
    config: RunConfig,
    layout: Layout,
    engine: TrainEngine,
    comms: Comms,
    data: RunData,
    loader: BatchLoader,
    progress: Progress,
    sinks: Sinks,
) -> TrainLoop:
    def save(progress: Progress) -> Path:
        state = run_state(progress, config, layout.describe(), data.train.manifest, engine.state())
        return save_checkpoint(
            checkpoints_dir(config), progress.step, engine.fragments(), state, comms, config.checkpoint.keep
        )

    def evaluate() -> dict[str, float]:
        assert data.validation is not None
        return held_out_values(engine, data.validation, config.train.eval_samples, config.train.micro_batch_size)

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
        Actions(save, evaluate if data.validation else None, sample if config.monitor.sample_interval else None),
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
    progress: Progress,
    resumed_from: str | None,
) -> RunHeader:
    device = torch.cuda.get_device_name() if engine.network.device.type == "cuda" else "cpu"
    split = data.train.manifest.split("train")
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
        resumed_from=resumed_from,
        start_step=progress.step,
        start_sample=progress.samples,
        data=f"{config.data.corpus}: {split.tokens:,} tokens in {split.documents:,} documents",
    )
