"""`gptdist data build`: who works on it (processes here, MPI ranks, parts of a Slurm array), and what is shown.

Reads the command line and the launcher's environment; `data_tools/build.py` does the work.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from data_tools.building.team import ExecutorTeam, LocalTeam, Team
from data_tools.reporting.progress import NoProgress, Progress
from gptdist.errors import EXIT_DONE, ConfigError
from launch.outer import find_world

_OPTIONS = (
    *("end_of_text", "validation_fraction", "seed", "max_bytes", "suffixes", "exclude", "on_bad_text", "chunk_tokens"),
    *("shard_bytes", "normalize", "min_document_bytes", "max_document_bytes", "dedup", "near_threshold"),
)
_PRELOAD = (
    "data_tools.building.tasks",
    "data_tools.building.duplicate_tasks",
    "data_tools.building.gram_tasks",
    "gigatoken",
    "awkward",
    "orjson",
)


def main(args: argparse.Namespace) -> int:
    """Make a corpus; what the command line leaves out takes the data tools' own default."""
    from data_tools.build import Share, build_corpus
    from data_tools.building.finish import REPORT_PAGE
    from launch.corpora.build_summary import BuildOutcome, render_summary

    given: dict[str, Any] = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    if args.text_field:
        given["text_fields"] = tuple(args.text_field)
    part, parts = find_part(os.environ, args.part)
    if parts > 1 and args.part is None:
        print(
            f"part {part} of {parts} of {args.out}, as the Slurm array has it; --part 0/1 builds alone",
            file=sys.stderr,
        )
    started = time.monotonic()
    with _team(args.workers, parts) as (team, first_part, more_parts):
        if team is None:
            return EXIT_DONE  # this rank has worked for the first one, which says what came of it
        share = Share(part * more_parts + first_part, parts * more_parts)
        with _progress(share.part == 0) as progress:
            built = build_corpus(
                args.sources,
                args.out,
                args.tokenizer,
                validation_sources=args.validation or (),
                decontaminate=args.decontaminate or (),
                team=team,
                share=share,
                fast=not args.no_fast,
                piece_bytes=args.piece_bytes,
                progress=progress,
                **given,
            )
        workers = team.workers
    if built is None:
        print(f"part {share.part} of {share.parts} is done; the first part finishes {args.out}")
    elif built.statistics is None:
        print(f"{args.out} is there already, built from these sources with these options")
    else:
        outcome = BuildOutcome(
            corpus=str(args.out),
            tokenizer=f"{args.tokenizer}, {built.manifest.tokenizer.vocab_size:,} ids, {built.tokenizer_said}",
            statistics=built.statistics,
            seconds=time.monotonic() - started,
            fresh_text_bytes=built.fresh_text_bytes,
            fresh_tokens=built.fresh_tokens,
            report=str(args.out / REPORT_PAGE),
            workers=workers,
        )
        print(render_summary(outcome).rstrip())
    return EXIT_DONE


def find_part(env: Mapping[str, str], given: tuple[int, int] | None) -> tuple[int, int]:
    """(part, parts) of this process in a build that several processes share: --part, or a Slurm array's variables."""
    if given is not None:
        return given
    if "SLURM_ARRAY_TASK_ID" not in env:
        return 0, 1
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
    try:
        task, first, last, count = (int(env[name]) for name in names)
    except (KeyError, ValueError):
        raise ConfigError(f"A Slurm array sets {', '.join(names)}; here one is missing or no number.") from None
    if last - first + 1 != count:
        raise ConfigError(
            f"The Slurm array has {count} tasks from {first} to {last}: its parts cannot be counted. Use consecutive "
            "numbers (--array=0-15), or name the part with --part."
        )
    return task - first, count


@contextmanager
def _team(workers: int | None, parts: int) -> Iterator[tuple[Team | None, int, int]]:
    """(who works for this process, which part it is, of how many) among the ranks of a launcher; alone: (.., 0, 1)."""
    world = find_world(os.environ)
    cores = len(os.sched_getaffinity(0))
    if world is None or world.world_size == 1:
        local = LocalTeam(workers or cores, _PRELOAD)
        local.prepare()
        try:
            yield local, 0, 1
        finally:
            local.close()
        return
    if world.launcher.startswith("srun") and not os.environ.get("PMI_RANK"):
        # Tasks of srun without an MPI library between them share the work as parts do.
        local = LocalTeam(workers or cores, _PRELOAD)
        try:
            yield local, world.global_rank, world.world_size
        finally:
            local.close()
        return
    from launch.rendezvous import mpi_executor

    with mpi_executor(world) as executor:
        yield None if executor is None else ExecutorTeam(executor, world.world_size - 1), 0, 1


def _progress(shown: bool) -> Progress:
    from launch.corpora.build_progress import BuildProgress

    return BuildProgress() if shown else NoProgress()
