"""`gptdist data build|verify|show|order`: the data tools' answers on a console.

Knows nothing of formats; `data_tools/` does the work.
"""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from gptdist.errors import EXIT_DONE, EXIT_FAILED, ConfigError

if TYPE_CHECKING:
    from data_tools.order import RunOrder

REDRAW_SECONDS = 0.2


def build(args: argparse.Namespace) -> int:
    """Make a corpus; what the command line leaves out takes the data tools' own default."""
    from data_tools.build import build_corpus
    from data_tools.show import render_corpus

    optional: dict[str, Any] = {
        "validation_sources": args.validation,
        "validation_fraction": args.validation_fraction,
        "seed": args.seed,
        "max_bytes": args.max_bytes,
        "suffixes": args.suffixes,
        "exclude": args.exclude,
        "text_field": args.text_field,
        "on_bad_text": args.on_bad_text,
        "chunk_tokens": args.chunk_tokens,
        "shard_bytes": args.shard_bytes,
        "end_of_text": args.end_of_text,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    progress = ProgressLine() if sys.stderr.isatty() else None
    try:
        build_corpus(args.sources, args.out, args.tokenizer, progress=progress, **given)
    finally:
        if progress:
            progress.clear()
    print(render_corpus(args.out).rstrip())
    return EXIT_DONE


def verify(args: argparse.Namespace) -> int:
    """Print every problem found; exit 1 if there is one."""
    from data_tools.verify import verify_corpus

    problems = verify_corpus(args.corpus)
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"{args.corpus}: every byte is as it was built")
    return EXIT_FAILED if problems else EXIT_DONE


def show(args: argparse.Namespace) -> int:
    """Print a summary."""
    from data_tools.show import render_corpus

    print(render_corpus(args.corpus).rstrip())
    return EXIT_DONE


def order(args: argparse.Namespace) -> int:
    """What a run reads when; exit 1 where the proof that was asked for fails."""
    from data_tools.order import RunOrder
    from gptdist.config.check import check_run
    from gptdist.config.load import load_run
    from gptdist.train.schedule import samples_at_step

    if args.epoch is not None and not args.check:
        raise ConfigError("--epoch is for --check.")
    loaded = load_run(args.config, args.overrides)
    config = loaded.config
    # The order is the same for any number of ranks, so the least that the layout needs stands for all.
    check_run(config, config.parallel.tensor * config.parallel.pipeline, loaded.origins)
    run = RunOrder(config, lambda step: samples_at_step(step, config.train, config.schedule))
    if args.check:
        return _check_order(run, args.epoch or 0)
    for line in run.step_lines(args.step) if args.step else run.document_lines(args.document):
        print(line)
    return EXIT_DONE


def _check_order(run: "RunOrder", epoch: int) -> int:
    from data_tools.order_check import prove_blend, prove_epoch

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
            f"{name}: epoch {epoch}, {proof.samples:,} samples over {proof.windows:,} windows: {proof.used:,} windows "
            f"used, {proof.outside:,} outside the corpus: {verdict} ({time.monotonic() - started:.1f} s)",
            flush=True,
        )
    blend = prove_blend(run.source.blend, run.total_samples, progress)
    if progress:
        progress.clear()
    print(
        f"run: {blend.samples:,} samples: {blend.gaps:,} gaps or repeats in the counts of the corpora, none ever "
        f"further than {blend.furthest:.3f} of a sample from its weight"
    )
    return EXIT_DONE if holds and blend.holds else EXIT_FAILED


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
