"""What a rank does for `benchmarks.launch`: import what training imports, meet the others, add, say when that was.

Also the process that starts such ranks as `gptdist train --nproc` does. Knows nothing of what is compared.
"""

import os
import sys
import time
from pathlib import Path

from gptdist.world import World

TRAINING = "launch.train"


def meet(world: World, said_at: str) -> None:
    """One all-reduce; the first rank writes when it was done, on the clock that all processes of a machine share."""
    import torch
    import torch.distributed as dist

    from launch.rendezvous import join, leave

    join(world, 300.0, "cpu")
    total = torch.ones(1)
    dist.all_reduce(total)
    if total.item() != world.world_size:
        raise RuntimeError(f"{world.world_size} ranks added up to {total.item()}")
    if world.is_first:
        Path(said_at).write_text(str(time.monotonic()))
    leave()


def main() -> int:
    """`python -m benchmarks.launch_rank FILE [N]`: start N ranks; without N, be one that torchrun started."""
    said_at, *nproc = sys.argv[1:]
    if nproc:
        from launch.ranks.local import launch_local

        return launch_local(int(nproc[0]), meet, said_at, preload=(TRAINING,))
    import importlib

    from launch.outer import find_world

    importlib.import_module(TRAINING)
    world = find_world(os.environ)
    if world is None:
        raise RuntimeError("nobody started this as a rank; give the number of ranks to start")
    meet(world, said_at)
    return 0


if __name__ == "__main__":
    sys.exit(main())
