"""What is saved, when and where to."""

import os
from collections.abc import Iterator

from gptdist.config.rules.rule import Broken, Rule, nearest
from gptdist.config.sections import CheckpointConfig, RunConfig


def rule_start_from(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """A run resumes its own checkpoints by itself; weights to begin with are another's."""
    start, run_dir, own = config.checkpoint.start_from, config.launch.run_dir, config.checkpoint.dir
    if start is None:
        return
    keys = {"launch.run_dir": run_dir, "checkpoint.dir": own or os.path.join(run_dir, "checkpoints")}
    for key, folder in keys.items():
        if os.path.normpath(start) == os.path.normpath(folder):
            text = (
                f"checkpoint.start_from ({start}) is where this run keeps its own checkpoints, which it resumes by "
                "itself. Leave start_from out to go on with them, or begin a run elsewhere: set launch.run_dir."
            )
            yield Broken(text, ("checkpoint.start_from", key))
            return


def rule_save_interval(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """`auto` sets the time between saves by itself, and only it needs to know how often nodes fail."""
    checkpoint, defaults = config.checkpoint, CheckpointConfig()
    if checkpoint.interval == "auto":
        if checkpoint.interval_minutes is not None:
            text = (
                f"checkpoint.interval auto chooses the time between saves, and checkpoint.interval_minutes "
                f"({checkpoint.interval_minutes:g}) sets it. Leave one of them out."
            )
            yield Broken(text, ("checkpoint.interval", "checkpoint.interval_minutes"))
    elif checkpoint.node_mtbf != defaults.node_mtbf:
        text = (
            f"checkpoint.node_mtbf ({checkpoint.node_mtbf:g} s) is for checkpoint.interval: auto; the interval is "
            f"{checkpoint.interval}. Set checkpoint.interval: auto, or leave checkpoint.node_mtbf out."
        )
        yield Broken(text, ("checkpoint.node_mtbf", "checkpoint.interval"))


def rule_keep_best(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """The best are chosen by the evaluation of their own step, so each save needs one."""
    checkpoint, every = config.checkpoint, config.train.eval_interval
    if not checkpoint.keep_best:
        return
    interval = checkpoint.interval
    if interval == "auto" or checkpoint.interval_minutes is not None:
        key = "checkpoint.interval" if interval == "auto" else "checkpoint.interval_minutes"
        text = (
            f"checkpoint.keep_best ({checkpoint.keep_best}) needs an evaluation at each save, and {key} saves by the "
            "clock, at steps that have none. Set checkpoint.interval to a multiple of train.eval_interval, or "
            "checkpoint.keep_best: 0."
        )
        yield Broken(text, ("checkpoint.keep_best", key))
    elif interval and (not every or interval % every):
        near = f"checkpoint.interval {nearest(interval, every)}" if every else f"train.eval_interval: {interval}"
        text = (
            f"checkpoint.keep_best ({checkpoint.keep_best}) needs an evaluation at each save: checkpoint.interval "
            f"({interval}) must be a multiple of train.eval_interval ({every}). Use {near}, or checkpoint.keep_best: 0."
        )
        yield Broken(text, ("checkpoint.keep_best", "checkpoint.interval", "train.eval_interval"))


def rule_staging_dir(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """What is staged in the folder of checkpoints itself would be written twice for nothing."""
    staging, folder = config.checkpoint.staging_dir, config.checkpoint.dir
    if staging is not None and folder is not None and os.path.normpath(staging) == os.path.normpath(folder):
        text = (
            f"checkpoint.staging_dir ({staging}) is checkpoint.dir. Set it to a folder on the node's own disk, or "
            "leave it out."
        )
        yield Broken(text, ("checkpoint.staging_dir", "checkpoint.dir"))


def rule_upload_url(config: RunConfig, world_size: int) -> Iterator[Broken]:
    """checkpoint.upload is a URL; a folder is checkpoint.dir's."""
    upload = config.checkpoint.upload
    if upload is not None and "://" not in upload:
        text = (
            f"checkpoint.upload ({upload}) is no URL. Write s3://BUCKET/FOLDER, gs://..., or file:///FOLDER; the "
            "folder to save to is checkpoint.dir."
        )
        yield Broken(text, ("checkpoint.upload",))


RULES: tuple[Rule, ...] = (
    rule_start_from,
    rule_save_interval,
    rule_keep_best,
    rule_staging_dir,
    rule_upload_url,
)
