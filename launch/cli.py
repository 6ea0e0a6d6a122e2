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
from typing import TYPE_CHECKING, Any

from gptdist.errors import EXIT_DONE, EXIT_FAILED, ConfigError, GptdistError
from gptdist.world import World
from launch.arguments.command import parse_arguments
from launch.outer import count_nodes, find_allocation, find_place, find_world
from launch.ranks.verdict import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from gptdist.config.load import LoadedRun
    from launch.hosts import Machine

HANDLERS = {
    "train": "launch.cli:train",
    "submit": "launch.cluster.submit:main",
    "after-allocation": "launch.cluster.after_allocation:main",
    "status": "launch.runs.status:main",
    "stop": "launch.runs.stop:main",
    "logs": "launch.runs.logs:main",
    "data build": "launch.corpora.build:main",
    "data verify": "launch.corpora.show:verify",
    "data show": "launch.corpora.show:show",
    "data index": "launch.corpora.show:index",
    "data order": "launch.corpora.order:main",
    "generate": "launch.models.generate:main",
    "serve": "launch.models.serve:main",
    "eval": "launch.models.evaluate:main",
    "export": "launch.models.export:main",
    "import": "launch.models.import_model:main",
    "ckpt list": "launch.checkpoints.show:list_all",
    "ckpt verify": "launch.checkpoints.show:verify",
    "ckpt diff": "launch.checkpoints.rewrite:diff",
    "ckpt reshard": "launch.checkpoints.rewrite:reshard_one",
    "ckpt average": "launch.checkpoints.rewrite:average_some",
    "ckpt copy": "launch.checkpoints.copy:main",
    "drill": "launch.drills.command:run",
    "drill checkpoint": "launch.drills.command:checkpoint",
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

    world = find_world(os.environ, nproc=args.nproc)
    machine = _find_machine(args, world)
    ranks = world.world_size if world else (args.nproc or 1) * machine.count
    try:
        loaded = load_run(args.config, args.overrides)
        first = machine.node == 0 if world is None else world.is_first
        if args.print_config:
            if first:
                print(render_config(loaded), end="")
            return EXIT_DONE
        fit = fit_layout(loaded.config, ranks, machine.count if world is None else count_nodes(os.environ))
        may_idle = world is None or world.launcher == "srun"  # elsewhere a rank is not ours to leave out
        check_run(fit.config, fit.ranks if may_idle else ranks, loaded.origins)
    except GptdistError as error:
        if world is not None and world.local_rank > 0:
            return error.exit_code  # the node's first rank reads the same file and says the same
        raise
    if fit.idle and first:
        print(f"note    {fit.idle}", flush=True)
    return _train(args, loaded, world, machine, fit.ranks)


def _find_machine(args: argparse.Namespace, world: World | None) -> "Machine":
    """This machine among those of `--hosts`."""
    from launch.hosts import Machine, find_machine

    if args.hosts is None and args.node is None:
        return Machine()
    if args.hosts is None or world is not None:
        missing = (
            "there is no --hosts" if args.hosts is None else f"{world.launcher if world else ''} started this rank"
        )
        raise ConfigError(
            f"--hosts and --node are for machines that nobody starts ranks on; {missing}. Give --hosts on each "
            "machine, or leave both out."
        )
    return find_machine(args.hosts, args.node)


def _train(args: argparse.Namespace, loaded: "LoadedRun", world: World | None, machine: "Machine", ranks: int) -> int:
    """Train on the first `ranks` of all; the others' processes end at once."""
    from launch.cluster.run_folder import KEY
    from launch.elastic import seat
    from launch.hosts import place_among
    from launch.ranks.train_ranks import train_ranks

    launch = loaded.config.launch
    key_file = Path(launch.run_dir) / KEY
    if world is None:
        place, allocation = place_among(machine, args.nproc or 1, ranks, key_file), None
    elif world.launcher != "srun":
        return _train_under_launcher(loaded, find_world(os.environ, port=launch.port) or world, args.fresh)
    else:
        world = seat(find_world(os.environ, port=launch.port) or world, ranks)
        place = find_place(os.environ, world, launch.port, key_file) if world else None
        allocation = find_allocation(os.environ)
    return EXIT_DONE if place is None else train_ranks(place, loaded, run_rank, allocation, fresh=args.fresh)


def run_rank(world: World, payload: tuple[Any, bool]) -> int:
    """One rank of a run. `payload`: the loaded run, and whether to ignore checkpoints, but for its own."""
    from launch.train import run_rank as train_rank

    loaded, fresh = payload
    return train_rank(loaded, world, fresh=fresh and world.generation == 0)


def _train_under_launcher(loaded: Any, world: World, fresh: bool) -> int:
    """One rank, which its launcher watches."""
    from launch.ranks.run_lock import hold_run

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
