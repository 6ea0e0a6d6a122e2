"""`gptdist data order`: which documents a run trains on when, and the proof that it uses each window once.

Knows the console; `data_tools/corpus/order.py` and `order_check.py` know the order.
"""

import argparse
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING

from gptdist.errors import EXIT_DONE, EXIT_FAILED, CheckpointError, ConfigError

if TYPE_CHECKING:
    from data_tools.corpus.order import RunOrder
    from gptdist.train.rollback import Rollback

REDRAW_SECONDS = 0.2


def main(args: argparse.Namespace) -> int:
    """What a run reads when; exit 1 where the proof that was asked for fails."""
    from data_tools.corpus.order import RunOrder
    from gptdist.config.check import check_run
    from gptdist.config.load import load_run
    from gptdist.train.rollback import gaps_of
    from gptdist.train.schedule import samples_at_step

    if args.epoch is not None and not args.check:
        raise ConfigError("--epoch is for --check.")
    loaded = load_run(args.config, args.overrides)
    config = loaded.config
    # The order is the same for any number of ranks, so the least that the layout needs stands for all.
    check_run(config, config.parallel.tensor * config.parallel.pipeline, loaded.origins)
    with closing(RunOrder(config, lambda step: samples_at_step(step, config.train, config.schedule))) as run:
        rollbacks = _recorded_rollbacks(run)
        run.source.gaps = gaps_of(rollbacks)
        for number, rollback in enumerate(rollbacks, 1):
            print(f"rollback {number}: {rollback.render()}")
        if args.check:
            return _check_order(run, args.epoch or 0)
        for line in run.step_lines(args.step) if args.step else run.document_lines(args.document):
            print(line)
    return EXIT_DONE


def _recorded_rollbacks(run: "RunOrder") -> "tuple[Rollback, ...]":
    """Those that the run's newest checkpoint tells of; none where there is no checkpoint.

    Raises CheckpointError where it was trained on other data: its sample numbers mean other text.
    """
    from gptdist.checkpoint.listing import find_step_folders
    from gptdist.checkpoint.manifest import load_manifest
    from gptdist.train.progress import check_same_data, data_identity, restored_rollbacks
    from gptdist.train.rollback import gaps_of
    from launch.models.stored import checkpoints_dir

    for path in find_step_folders(checkpoints_dir(run.config)) or ():
        try:
            state = load_manifest(path).state
        except CheckpointError:
            continue  # a damaged one is not what a run goes on from either
        rollbacks = restored_rollbacks(state)
        if rollbacks:
            identity = data_identity(run.config, {name: reader.manifest for name, reader in run.readers.items()})
            check_same_data(state["data"], identity, gaps_of(rollbacks).settled(state["samples"]), str(path))
        return rollbacks
    return ()


def _check_order(run: "RunOrder", epoch: int) -> int:
    from data_tools.corpus.order_check import prove_blend, prove_epoch, prove_gaps

    progress = ProgressLine() if sys.stderr.isatty() else None
    holds = True
    for name, order in run.source.orders.items():
        started = time.monotonic()
        proof = prove_epoch(order, epoch, progress)
        if progress:
            progress.clear()
        holds &= proof.holds
        verdict = "each window exactly once" if proof.holds else "NOT each window exactly once"
        print(
            f"{run.readers[name].corpus}: epoch {epoch}, {proof.samples:,} samples over {proof.windows:,} windows: "
            f"{proof.used:,} windows used, {proof.outside:,} outside the corpus: {verdict} "
            f"({time.monotonic() - started:.1f} s)",
            flush=True,
        )
    blend = prove_blend(run.source.blend, run.total_samples, progress)
    if progress:
        progress.clear()
    print(
        f"run: {blend.samples:,} samples: {blend.gaps:,} gaps or repeats in the counts of the corpora, none ever "
        f"further than {blend.furthest:.3f} of a sample from its weight"
    )
    holds &= blend.holds
    if run.source.gaps.ranges:
        gaps = prove_gaps(run.source.gaps, run.trained_samples)
        holds &= gaps.holds
        verdict = "each once" if gaps.holds else f"NOT each once: {gaps.wrong:,} twice, or passed over"
        print(f"run: {gaps.left_out:,} of {gaps.samples:,} samples passed over, {gaps.trained:,} trained on, {verdict}")
    return EXIT_DONE if holds else EXIT_FAILED


class ProgressLine:
    """`tokenize train  41 %`, redrawn in place on a terminal."""

    def __init__(self) -> None:
        self._drawn_at = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._drawn_at >= REDRAW_SECONDS:
            self._drawn_at = now
            sys.stderr.write(f"\r\x1b[K{stage}  {100 * done // max(1, total)} %")
            sys.stderr.flush()

    def clear(self) -> None:
        """Leave the terminal as it was."""
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()
