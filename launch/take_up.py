"""Where a run begins: its own newest good checkpoint, another run's weights, or initial ones; where it goes back to.

Every rank calls it, and every decision and error is the same on all of them. Nothing is written; going back deletes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptdist.checkpoint.copying import withdraw_checkpoints
from gptdist.checkpoint.read import Checkpoint, find_latest, open_newest
from gptdist.checkpoint.retention import EVALUATION_LOSS
from gptdist.checkpoint.write import remove_checkpoints
from gptdist.comms import Comms
from gptdist.config.sections import RunConfig
from gptdist.engine.engine import TrainEngine
from gptdist.engine.partition import TensorSource
from gptdist.errors import GptdistError
from gptdist.layout import Layout
from gptdist.remote import RemoteFolder
from gptdist.train.compatible import check_can_begin, check_resumable, check_same_model, resume_notes
from gptdist.train.progress import Progress, check_same_data, restored_progress
from gptdist.train.rollback import gaps_of
from launch.models.stored import checkpoints_dir
from launch.saving import check_upload_is_new, find_checkpoint

WITHDRAW_ATTEMPTS = 3
"""All ranks wait meanwhile."""


@dataclass(frozen=True)
class Start:
    """Where a run stands once its engine has its state. With neither checkpoint, weights are the initial ones."""

    progress: Progress
    resumed_from: str | None = None
    begun_with: str | None = None
    notes: tuple[str, ...] = ()
    evaluation_loss: float | None = None  # of the step it resumed from, where there was an evaluation


def take_up(
    config: RunConfig, layout: Layout, engine: TrainEngine, comms: Comms, identity: Mapping[str, Any], *, fresh: bool
) -> Start:
    """Fill the engine and say where the run is. `identity`: the `data_identity` of what it will be trained on.

    Raises CheckpointError where there are checkpoints and none is good, or where the config forbids going on.
    """
    found = None if fresh else find_checkpoint(config, comms)
    if found is not None:
        _say_skipped(found.skipped, comms)
        with found.checkpoint as checkpoint:
            return _resume(checkpoint, config, layout, engine, comms, identity)
    if fresh:
        check_upload_is_new(config, comms)
    if config.checkpoint.start_from is not None:
        found = open_newest(Path(config.checkpoint.start_from), comms, trust_others=config.checkpoint.trust_others)
        _say_skipped(found.skipped, comms)
        with found.checkpoint as checkpoint:
            return _begin_with(checkpoint, config, engine, comms, identity)
    engine.initialise()
    return Start(Progress())


def go_back(
    before_step: int, config: RunConfig, layout: Layout, engine: TrainEngine, comms: Comms, identity: Mapping[str, Any]
) -> Start | None:
    """Fill the engine, which has trained on, from the newest good checkpoint before a step, and delete those from that
    step on, here and behind checkpoint.upload. None, and nothing was done, where the run has no checkpoint before it.

    Not while a save is under way. Raises NoGoodCheckpoint.
    """
    folder = checkpoints_dir(config)
    found = find_latest(folder, comms, before_step=before_step, trust_others=config.checkpoint.trust_others)
    if found is None:
        return None
    _say_skipped(found.skipped, comms)
    with found.checkpoint as checkpoint:
        start = _resume(checkpoint, config, layout, engine, comms, identity)
    remove_checkpoints(folder, before_step, comms)
    if config.checkpoint.upload is not None and comms.is_first:
        try:
            withdraw_checkpoints(RemoteFolder(config.checkpoint.upload, WITHDRAW_ATTEMPTS), before_step)
        except GptdistError as error:  # like a failed upload, no reason to stop
            _warn(f"checkpoints from step {before_step} on may still be behind checkpoint.upload: {error}")
    return start


def weight_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Logical name -> shape of a checkpoint's weights."""
    names = checkpoint.names("weight/")
    return {name.removeprefix("weight/"): checkpoint.shape(name) for name in names}


def _resume(
    checkpoint: Checkpoint,
    config: RunConfig,
    layout: Layout,
    engine: TrainEngine,
    comms: Comms,
    identity: Mapping[str, Any],
) -> Start:
    state, where = checkpoint.state, str(checkpoint.path)
    check_resumable(checkpoint.names(), state, config, where)
    check_same_model(weight_shapes(checkpoint), config.model, where)
    progress = restored_progress(state)
    check_same_data(state["data"], dict(identity), gaps_of(progress.rollbacks).settled(progress.samples), where)
    with comms.together():
        engine.read(TensorSource(checkpoint), state["engine"])
    engine.refresh()
    notes = resume_notes(state, config, layout.describe())
    return Start(progress, resumed_from=where, notes=tuple(notes), evaluation_loss=state.get(EVALUATION_LOSS))


def _begin_with(
    checkpoint: Checkpoint, config: RunConfig, engine: TrainEngine, comms: Comms, identity: Mapping[str, Any]
) -> Start:
    where = str(checkpoint.path)
    check_can_begin(checkpoint.state, config.model, identity["tokenizer"], where)
    check_same_model(weight_shapes(checkpoint), config.model, where, "or leave out checkpoint.start_from")
    with comms.together():
        engine.read_weights(TensorSource(checkpoint))
    engine.refresh()
    return Start(Progress(), begun_with=where)


def _say_skipped(skipped: list[str], comms: Comms) -> None:
    if comms.is_first:
        for reason in skipped:
            _warn(f"passed over a checkpoint: {reason}")


def _warn(text: str) -> None:
    print(f"warning: {text}", flush=True)
