"""The grammar of the `gptdist` command: subcommands, options, and what to answer when one is misspelt.

Imports nothing heavy, so that `gptdist --help` and mistakes answer at once. What a subcommand does is `cli.py`'s.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.arguments.checkpoints import add_ckpt, add_drill
from launch.arguments.cluster import add_after_allocation, add_submit
from launch.arguments.data import add_data
from launch.arguments.models import add_eval, add_export, add_generate, add_import, add_serve
from launch.arguments.parser import Parser, add_command, from_zero, positive
from launch.arguments.runs import add_logs, add_status, add_stop

EPILOG = """exit codes: 0 done, 1 failed, 2 a mistake to mend, 75 stopped early and resumable, 93 do not requeue
Under torchrun, srun or mpirun, `gptdist train` is one rank. GPTDIST_DEBUG=1 shows tracebacks."""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; `command` says which it is. Exits 2 with one error where it cannot be read."""
    parsed, rest = build_parser().parse_known_args(argv)
    if parsed.command in ("train", "submit", "data order"):
        # argparse gives up on positional arguments once options follow them.
        parsed.overrides = [*parsed.overrides, *(word for word in rest if not word.startswith("-"))]
        rest = [word for word in rest if word.startswith("-")]
    if rest:
        parsed.parser.reject(rest)
    return parsed


def build_parser() -> Parser:
    """The whole command."""
    parser = Parser(prog="gptdist", description="Pretrain GPT models from raw text, on any layout.", epilog=EPILOG)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, dest="first_word")
    _add_train(parser, commands)
    add_submit(parser, commands)
    add_status(parser, commands)
    add_stop(parser, commands)
    add_logs(parser, commands)
    add_data(parser, commands)
    add_generate(parser, commands)
    add_serve(parser, commands)
    add_eval(parser, commands)
    add_export(parser, commands)
    add_import(parser, commands)
    add_ckpt(parser, commands)
    add_drill(parser, commands)
    add_after_allocation(parser, commands)
    add_command(parser, commands, "doctor", "what this machine has, and what that means for training")
    return parser


def _add_train(parser: Parser, commands: Any) -> None:
    train = add_command(parser, commands, "train", "train, or resume, the run that CONFIG describes")
    train.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, such as configs/runs/quickstart.yaml")
    train.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that override the file's"
    )
    train.add_argument("--nproc", type=positive, metavar="N", help="start N ranks on this machine (default: 1)")
    train.add_argument(
        "--hosts",
        metavar="A,B,C[:PORT]",
        help="machines that each start this same command, N ranks each; no Slurm, no ssh",
    )
    train.add_argument("--node", type=from_zero, metavar="K", help="which of --hosts this one is (default: found out)")
    train.add_argument("--fresh", action="store_true", help="ignore checkpoints of an earlier run")
    train.add_argument("--print-config", action="store_true", help="show every setting and its origin, and stop")
