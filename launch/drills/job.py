"""A command of gptdist whose ranks are drilled: `python -m launch.drills.job FOLDER train CONFIG ...`.

FOLDER is the drill's, with the plan of what strikes; the rest is what a user types after `gptdist`.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptdist.world import World
from launch import cli
from launch.drills.rank_faults import DrilledRank

RankFunction = Callable[..., int]


def drilled(run_rank: RankFunction, record_dir: Path) -> RankFunction:
    """The same rank, struck as the plan in `record_dir` says."""

    def run_drilled(loaded: Any, world: World, *, fresh: bool) -> int:
        with DrilledRank(record_dir, world).watched():
            return run_rank(loaded, world, fresh=fresh)

    return run_drilled


def main() -> int:
    """Run the command."""
    import launch.train

    launch.train.run_rank = drilled(launch.train.run_rank, Path(sys.argv[1]))
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
