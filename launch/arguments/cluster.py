"""The grammar of what has to do with Slurm: `gptdist submit`, and what a job calls when its ranks have ended.

What the commands do is in `submit.py` and `after_allocation.py`.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from launch.arguments.parser import Parser, add_command, positive


def add_submit(parser: Parser, commands: Any) -> None:
    submit = add_command(parser, commands, "submit", "train the run that CONFIG describes as a job of a Slurm cluster")
    submit.add_argument("config", type=Path, metavar="CONFIG", help="YAML file, as for `gptdist train`")
    submit.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="section.key=value",
        help="settings that override the files'; cluster.key=value those of the cluster",
    )
    submit.add_argument(
        "--cluster", type=Path, required=True, metavar="FILE", help="YAML file, such as configs/clusters/gpu.yaml"
    )
    submit.add_argument("--run-dir", type=Path, metavar="DIR", help="folder of the run (default: launch.run_dir)")
    submit.add_argument("--name", type=_name, metavar="NAME", help="of the job (default: the folder's)")
    submit.add_argument(
        "--chain",
        type=positive,
        default=1,
        metavar="N",
        help="submit N jobs at once, each to go on after the one before",
    )
    submit.add_argument("--dry-run", action="store_true", help="show the script and what Slurm says; submit nothing")


def add_after_allocation(parser: Parser, commands: Any) -> None:
    after = add_command(
        parser, commands, "after-allocation", "how a run goes on when its ranks have ended; its batch script asks"
    )
    after.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    after.add_argument("--srun-exit", type=int, default=0, metavar="CODE", help="what srun ended with")


def _name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.+-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no name for a job: letters, digits and _ . + -")
    return text
