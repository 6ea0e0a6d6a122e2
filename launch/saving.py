"""How a run saves: its saver, built from the config, and what is checked of the disk before training.

Knows the `checkpoint` section, folders, a URL and ranks. Must not know engines, or what is saved.
"""

from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from gptdist.checkpoint.copying import complete_checkpoints, fetch_newest
from gptdist.checkpoint.folder import rubbish_bytes
from gptdist.checkpoint.manifest import load_manifest
from gptdist.checkpoint.read import Checkpoint, FoundCheckpoint, find_latest
from gptdist.checkpoint.retention import Retention
from gptdist.checkpoint.room import look_for_room
from gptdist.checkpoint.saver import CheckpointSaver
from gptdist.checkpoint.uploads import Uploader
from gptdist.checkpoint.verified import mark_verified, verified_at
from gptdist.checkpoint.write import SaveOptions
from gptdist.comms import Comms
from gptdist.config.sections import RunConfig
from gptdist.errors import CheckpointError, ConfigError, NoGoodCheckpoint, StorageError
from gptdist.model.parameters import parameter_count
from gptdist.monitor.heartbeat import Heartbeat
from gptdist.remote import RemoteFolder, without_secrets
from gptdist.train.spikes import steps_to_look_back
from gptdist.world import World
from launch.models.stored import checkpoints_dir
from launch.ranks.hang import LONGEST_SAVE_SECONDS, LONGEST_UPLOAD_SECONDS
from launch.rendezvous import open_channel


def retention_of(config: RunConfig) -> Retention:
    """What stays; where the run may go back after a spike, so does one that is older than any suspect window."""
    checkpoint, train = config.checkpoint, config.train
    behind = steps_to_look_back(train) if train.spike_action == "rollback" else 0
    return Retention(checkpoint.keep, checkpoint.keep_every, checkpoint.keep_best, behind)


def open_uploader(config: RunConfig, world: World) -> Uploader | None:
    """What copies finished checkpoints to checkpoint.upload, on every rank; None where there is no such URL."""
    if config.checkpoint.upload is None:
        return None
    return Uploader(config.checkpoint.upload, open_channel(world, LONGEST_UPLOAD_SECONDS))


def open_saver(
    config: RunConfig, world: World, resumed_from: Path | None, uploader: Uploader | None, heartbeat: Heartbeat
) -> CheckpointSaver:
    """The saver of this run, on every rank. Its thread begins with the first save."""
    checkpoint = config.checkpoint

    def on_saved(step: int, path: Path, seconds: float) -> None:
        heartbeat.saved(step, seconds)
        if uploader:
            uploader.submit(path)

    def protected() -> Collection[Path]:
        uploading = uploader.pending() if uploader else []
        # Where each save is read back, a newer one is verified whenever something is about to be deleted.
        return uploading if checkpoint.read_back or resumed_from is None else [*uploading, resumed_from]

    options = SaveOptions(
        retention_of(config),
        checkpoint.read_back,
        Path(checkpoint.staging_dir) if checkpoint.staging_dir else None,
        protected,
        checkpoint.trust_others,
    )
    channel = open_channel(world, max(config.launch.timeout, LONGEST_SAVE_SECONDS))
    background = checkpoint.background and saves_midway(config)
    return CheckpointSaver(
        checkpoints_dir(config),
        channel,
        options,
        background=background,
        on_saved=on_saved,
    )


def find_checkpoint(config: RunConfig, comms: Comms) -> FoundCheckpoint | None:
    """What the run resumes from: the newest good checkpoint of its folder, else the newest complete one of its URL."""
    folder, url, trust = checkpoints_dir(config), config.checkpoint.upload, config.checkpoint.trust_others
    none_good: NoGoodCheckpoint | None = None
    try:
        found = find_latest(folder, comms, trust_others=trust)
    except NoGoodCheckpoint as error:
        if url is None:
            raise
        found, none_good = None, error
    if found is not None or url is None:
        return found
    # A channel that waits for whoever downloads longest; training's would give that rank up.
    path, skipped = fetch_newest(RemoteFolder(url), folder, open_channel(comms.world, LONGEST_UPLOAD_SECONDS))
    if path is not None:
        # `skipped` were newer, so they come first.
        return FoundCheckpoint(Checkpoint.open(path, verify=True, comms=comms, trust_others=trust), skipped)
    if none_good is not None or skipped:
        reasons = [str(none_good)] if none_good is not None else []
        behind = "".join(f"\n  {reason}" for reason in skipped)
        reasons.append(f"{without_secrets(url)} has {f'none that is good:{behind}' if skipped else 'no checkpoint'}")
        raise NoGoodCheckpoint("\n".join(reasons))
    return None


def check_upload_is_new(config: RunConfig, comms: Comms) -> None:
    """Of a run that starts anew. Raises ConfigError where an earlier run's checkpoints are behind its URL: a later
    resume could take them for this run's."""
    if config.checkpoint.upload is None:
        return
    with comms.together():
        if comms.is_first:
            remote = RemoteFolder(config.checkpoint.upload)
            earlier = complete_checkpoints(remote)
            if earlier:
                raise ConfigError(
                    f"checkpoint.upload ({remote.shown()}) has {len(earlier)} checkpoint(s) of an earlier run, the "
                    f"newest {earlier[0]}; a run that starts anew must not mix with them. Set it to another folder."
                )


def saves_midway(config: RunConfig) -> bool:
    """Whether the run saves while it still has steps to do: else a copy of the state would be of no use."""
    interval = config.checkpoint.interval
    by_steps = interval == "auto" or 0 < interval < config.train.steps
    return by_steps or config.checkpoint.interval_minutes is not None


def note_verified(resumed_from: Path) -> None:
    """A run has read every byte of the checkpoint that it resumed from: then it is one to rely on."""
    with suppress(OSError, CheckpointError):  # it may be another user's
        manifest = load_manifest(resumed_from)
        if verified_at(resumed_from, manifest) is None:
            mark_verified(resumed_from, manifest)


def check_room(config: RunConfig) -> str | None:
    """What to warn of before the first save. Raises StorageError where not even one checkpoint fits."""
    folder = checkpoints_dir(config)
    try:
        # Weights and two moments, 4 bytes each.
        room = look_for_room(folder, 12 * parameter_count(config.model), retention_of(config))
        room = replace(room, free=room.free + rubbish_bytes(folder))  # the first save begins by deleting it
    except OSError as error:
        raise StorageError(
            f"{folder} cannot be read: {error.strerror or error}. Set checkpoint.dir to a folder that this user can "
            "read and write."
        ) from error
    room.check("a checkpoint")
    return room.warning
