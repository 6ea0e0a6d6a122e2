"""The grammar of what looks after runs: `status`, `stop` and `logs`.

What the commands do is in `status.py`, `stop.py` and `logs.py`.
"""

from pathlib import Path
from typing import Any

from launch.arguments.parser import Parser, add_command, from_zero, seconds

_RUN = "the run's folder, launch.run_dir"


def add_status(parser: Parser, commands: Any) -> None:
    status = add_command(parser, commands, "status", "how far runs are: step, loss, goodput, saves, restarts and why")
    status.add_argument(
        "run", type=Path, nargs="?", metavar="RUN", help=f"{_RUN} (default: all below runs, all in squeue)"
    )
    status.add_argument("--json", action="store_true", help="for programs: one object, without RUN a list of them")
    status.add_argument(
        "--watch", type=seconds, nargs="?", const=5.0, metavar="INTERVAL", help="again and again (default: every 5s)"
    )


def add_stop(parser: Parser, commands: Any) -> None:
    stop = add_command(parser, commands, "stop", "have a run save and end, and not be requeued")
    stop.add_argument("run", type=Path, metavar="RUN", help=_RUN)
    stop.add_argument(
        "--patience",
        type=seconds,
        default=600.0,
        metavar="TIME",
        help="how long it may take to answer before its job is cancelled (default: 10m)",
    )


def add_logs(parser: Parser, commands: Any) -> None:
    logs = add_command(parser, commands, "logs", "what the ranks of a run wrote")
    logs.add_argument("run", type=Path, metavar="RUN", help=_RUN)
    logs.add_argument(
        "--rank", type=from_zero, metavar="R", help="of this rank (default: rank 0, and the job's script)"
    )
    logs.add_argument("--follow", action="store_true", help="go on as it is written, until the run is over")
