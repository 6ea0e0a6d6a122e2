"""`gptdist ckpt diff`, `reshard` and `average`: checkpoints compared, and new ones made of old ones, offline.

One process, a little memory, no torch.
"""

import argparse
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

from gptdist.checkpoint.average import average
from gptdist.checkpoint.compare import Comparison, TensorDifference, compare
from gptdist.checkpoint.manifest import Manifest
from gptdist.checkpoint.read import Checkpoint, is_checkpoint, open_newest
from gptdist.checkpoint.rewrite import reshard
from gptdist.errors import EXIT_DONE, EXIT_FAILED
from gptdist.monitor.console import render_bytes
from launch.checkpoints.show import print_table

_ROWS = 40
_COLUMNS: dict[str, Literal["left", "right"]] = {
    "tensor": "left",
    "elements": "right",
    "max difference": "right",
    "relative": "right",
    "": "left",
}


def reshard_one(args: argparse.Namespace) -> int:
    """Write a checkpoint anew as files of equal size."""
    with ExitStack() as opened:
        # One that was named need not be hashed: its digests are checked while it is written.
        source = _open(args.source, opened, args.trust_others, verify=not is_checkpoint(args.source))
        written = reshard(source, args.destination, args.ranks)
        print(f"{source.path} is now {_describe(args.destination, written)}; every digest is the same", flush=True)
    return EXIT_DONE


def average_some(args: argparse.Namespace) -> int:
    """Write the mean of weights."""
    with ExitStack() as opened:
        sources = [_open(path, opened, args.trust_others, verify=True) for path in args.sources]
        written = average(sources, args.out)
        names = ", ".join(str(source.path) for source in sources)
        print(f"the mean of {names} is {_describe(args.out, written)}; it has weights alone", flush=True)
    return EXIT_DONE


def diff(args: argparse.Namespace) -> int:
    """Print what is different; exit 1 where anything is that matters to training on."""
    with ExitStack() as opened:
        one, other = (_open(path, opened, args.trust_others, verify=False) for path in (args.one, args.other))
        comparison = compare(one, other)
        _print_tensors(comparison, None if args.all else _ROWS)
        _print_state(comparison)
        print(_summary(one, other, comparison), flush=True)
    return EXIT_DONE if comparison.same else EXIT_FAILED


def _open(path: Path, opened: ExitStack, trust_others: bool, *, verify: bool) -> Checkpoint:
    found = open_newest(path, verify=verify, trust_others=trust_others)
    for reason in found.skipped:
        print(f"warning: passed over a checkpoint: {reason}", file=sys.stderr, flush=True)
    return opened.enter_context(found.checkpoint)


def _describe(path: Path, manifest: Manifest) -> str:
    files = len(manifest.files)
    return f"{path}: step {manifest.step}, {files} file{'s' * (files != 1)}, {render_bytes(manifest.total_bytes)}"


def _print_tensors(comparison: Comparison, most: int | None) -> None:
    if not comparison.tensors:
        return
    # The worst first, where not all are shown.
    worst = sorted(comparison.tensors, key=lambda found: (found.problem is None, -found.relative))
    shown = sorted(worst[:most], key=lambda found: found.name)
    print_table(_COLUMNS, [_row(found) for found in shown])
    if len(worst) > len(worst[:most]):
        print(f"... and {len(worst) - len(worst[:most])} less different (--all shows them)")


def _row(found: TensorDifference) -> list[str]:
    if found.problem is not None:
        return [found.name, "-", "-", "-", found.problem]
    return [found.name, f"{found.elements:,} of {found.size:,}", f"{found.largest:.3g}", f"{found.relative:.3g}", ""]


def _print_state(comparison: Comparison) -> None:
    for found in comparison.state:
        note = "  (says how it was made)" if found.is_description else ""
        print(f"state {found.path}: {_short(found.one)}, then {_short(found.other)}{note}")


def _summary(one: Checkpoint, other: Checkpoint, comparison: Comparison) -> str:
    different = len(comparison.tensors)
    total = comparison.equal + different
    tensors = f"all {total} tensors are equal" if not different else f"{different} of {total} tensors differ"
    matters = sum(not found.is_description for found in comparison.state)
    state = f"{matters} values of the run's state differ" if matters else "the run's state is equal"
    return f"{one.path} and {other.path}: {tensors}, {state}"


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
