"""The grammar of `gptdist ckpt ...` and `gptdist drill ...`.

What the commands do is in `ckpt.py`, `ckpt_rewrite.py`, `ckpt_copy.py` and `drill.py`.
"""

import tempfile
from pathlib import Path
from typing import Any

from launch.arguments.parser import Parser, add_command, positive, words


def add_ckpt(parser: Parser, commands: Any) -> None:
    checkpoints = add_command(parser, commands, "ckpt", "checkpoints: list, verify, diff, reshard, average, copy")
    subcommands = checkpoints.add_subparsers(metavar="COMMAND", required=True, dest="second_word")
    listing = add_command(checkpoints, subcommands, "list", "the checkpoints, one a line")
    listing.add_argument("path", type=Path, metavar="RUN_OR_CHECKPOINTS_DIR")
    verify = add_command(checkpoints, subcommands, "verify", "check every byte of a checkpoint, or of all in a folder")
    verify.add_argument("path", type=Path, metavar="CHECKPOINT_OR_RUN_DIR")
    diff = add_command(checkpoints, subcommands, "diff", "which tensors and run state differ; exit 1 where any do")
    diff.add_argument("one", type=Path, metavar="A", help="checkpoint, or a folder whose newest is meant")
    diff.add_argument("other", type=Path, metavar="B")
    diff.add_argument("--all", action="store_true", help="every tensor, not the most different alone")
    reshard = add_command(checkpoints, subcommands, "reshard", "write a checkpoint anew as N files of equal size")
    reshard.add_argument("source", type=Path, metavar="SRC", help="checkpoint, or a folder whose newest is meant")
    reshard.add_argument("destination", type=Path, metavar="DST", help="the new checkpoint; must not exist yet")
    reshard.add_argument("--ranks", type=positive, required=True, metavar="N", help="how many files")
    average = add_command(checkpoints, subcommands, "average", "the mean of the weights of checkpoints of one model")
    average.add_argument("sources", nargs="+", type=Path, metavar="CHECKPOINT")
    average.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new one; must not exist yet")
    copying = add_command(checkpoints, subcommands, "copy", "copy a checkpoint between folders and URLs, verified")
    copying.add_argument("source", metavar="SRC", help="checkpoint, a folder whose newest is meant, or a URL")
    copying.add_argument(
        "destination", metavar="DST", help="the new checkpoint, or its URL; a folder must not exist yet"
    )
    for command in (listing, verify, diff, reshard, average, copying):
        command.add_argument("--trust-others", action="store_true", help="also take what other users own or may write")


def add_drill(parser: Parser, commands: Any) -> None:
    drill = add_command(parser, commands, "drill", "faults on purpose, to a small run; or to checkpoints")
    drill.add_argument("--ranks", type=positive, default=2, metavar="N", help="ranks that train (default: 2)")
    drill.add_argument("--faults", type=words, metavar="NAME,...", help="only these; docs/drills.md lists all")
    drill.add_argument("--soak", type=positive, metavar="N", help="instead, kill any process at any moment, N times")
    drill.add_argument("--lab", action="store_true", help="instead, faults of nodes, on a Slurm that boots here")
    subcommands = drill.add_subparsers(metavar="COMMAND", dest="second_word")
    checkpoint = add_command(drill, subcommands, "checkpoint", "kill, starve and damage saves and checkpoints")
    checkpoint.add_argument("--ranks", type=positive, default=2, metavar="N", help="ranks that save (default: 2)")
    checkpoint.add_argument("--kills", type=positive, default=100, metavar="N", help="kills at random moments")
    checkpoint.add_argument("--flips", type=positive, default=200, metavar="N", help="flipped bits")
    checkpoint.add_argument("--truncations", type=positive, default=60, metavar="N", help="truncated files")
    for command in (drill, checkpoint):
        command.add_argument(
            "--seed", type=int, default=1234, metavar="N", help="of what is drawn: ranks, moments, places"
        )
        command.add_argument(
            "--work", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR", help="where (default: temporary)"
        )
        command.add_argument("--out", type=Path, metavar="FILE", help="also write the certificate as JSON")
