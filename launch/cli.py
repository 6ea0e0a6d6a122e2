"""The `gptdist` command: START HERE. Reads the command line, does what it says, answers with one clear error or none.

Loads what a subcommand needs only when it runs. Knows how a run is begun (here, or as one rank of an outer launcher);
what a rank then does is in `train.py`.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from gptdist.errors import EXIT_DONE, EXIT_FAILED, GptdistError
from gptdist.world import World
from launch.arguments import parse_arguments
from launch.outer import find_allocation, find_place, find_world
from launch.verdict import EXIT_INTERRUPTED

HANDLERS = {
    "train": "launch.cli:train",
    "submit": "launch.submit:main",
    "after-allocation": "launch.after_allocation:main",
    "status": "launch.status:main",
    "stop": "launch.stop:main",
    "logs": "launch.logs:main",
    "data build": "launch.data_build:main",
    "data verify": "launch.data:verify",
    "data show": "launch.data:show",
    "data index": "launch.data:index",
    "data order": "launch.data_order:main",
    "generate": "launch.generate:main",
    "serve": "launch.serve:main",
    "eval": "launch.evaluate:main",
    "export": "launch.export:main",
    "import": "launch.import_model:main",
    "ckpt list": "launch.ckpt:list_all",
    "ckpt verify": "launch.ckpt:verify",
    "ckpt diff": "launch.ckpt_rewrite:diff",
    "ckpt reshard": "launch.ckpt_rewrite:reshard_one",
    "ckpt average": "launch.ckpt_rewrite:average_some",
    "ckpt copy": "launch.ckpt_copy:main",
    "drill checkpoint": "launch.drill:checkpoint",
    "doctor": "launch.doctor:main",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code (`gptdist/errors.py` lists them)."""
    args = parse_arguments(argv)
    module, _, function = HANDLERS[args.command].partition(":")
    try:
        handler: Callable[[argparse.Namespace], int | None] = getattr(importlib.import_module(module), function)
        code = handler(args) or EXIT_DONE
        if sys.stdout is not None:  # `>&-`
            sys.stdout.flush()
        return code
    except GptdistError as error:
        show_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; the interpreter's own flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED


def show_error(error: GptdistError) -> None:
    """`error: ...` on stderr; the traceback only where GPTDIST_DEBUG asks for it."""
    if os.environ.get("GPTDIST_DEBUG"):
        traceback.print_exception(error)
    print(f"error: {error}", file=sys.stderr, flush=True)


def train(args: argparse.Namespace) -> int:
    """`gptdist train`: one rank under torchrun or mpirun; under srun an agent with one; else `--nproc` ranks here."""
    from gptdist.config.check import check_run
    from gptdist.config.load import load_run, render_config
    from launch.elastic import fit_layout
    from launch.place import Place
    from launch.run_folder import KEY

    world = find_world(os.environ, nproc=args.nproc)
    nproc = args.nproc or 1
    try:
        loaded = load_run(args.config, args.overrides)
        if args.print_config:
            if world is None or world.is_first:
                print(render_config(loaded), end="")
            return EXIT_DONE
        if world is not None:
            check_run(fit_layout(loaded.config, world.world_size).config, world.world_size, loaded.origins)
        else:
            fit = fit_layout(loaded.config, nproc, nodes=1)
            check_run(fit.config, fit.ranks, loaded.origins)
            if fit.idle:
                print(f"note    {fit.idle}", flush=True)
            nproc = fit.ranks
    except GptdistError as error:
        if world is not None and world.local_rank > 0:
            return error.exit_code  # the node's first rank reads the same file and says the same
        raise
    from launch.train_ranks import train_ranks

    if world is None:
        return train_ranks(Place.alone(nproc), loaded, run_rank, fresh=args.fresh)
    port = loaded.config.launch.port
    world = find_world(os.environ, port=port) or world
    place = find_place(os.environ, world, port, Path(loaded.config.launch.run_dir) / KEY)
    if place is None:
        return _train_under_launcher(loaded, world, args.fresh)
    return train_ranks(place, loaded, run_rank, find_allocation(os.environ), fresh=args.fresh)


def run_rank(world: World, payload: tuple[Any, bool]) -> int:
    """One rank of a run. `payload`: the loaded run, and whether to ignore checkpoints, but for its own."""
    from launch.train import run_rank as train_rank

    loaded, fresh = payload
    return train_rank(loaded, world, fresh=fresh and world.generation == 0)


def _train_under_launcher(loaded: Any, world: World, fresh: bool) -> int:
    """One rank, which its launcher watches."""
    from launch.run_lock import hold_run

    run_dir = Path(loaded.config.launch.run_dir)
    try:
        with hold_run(run_dir, world.launcher) if world.is_first else nullcontext():
            return run_rank(world, (loaded, fresh))
    except GptdistError as error:
        if not world.is_first and str(error).startswith("[rank "):
            return error.exit_code  # another rank's error, agreed on by all; the first rank shows it
        raise


if __name__ == "__main__":
    sys.exit(main())
