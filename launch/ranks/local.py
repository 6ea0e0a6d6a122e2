"""Ranks on this machine for one purpose, started once: no restarts, no record, an end after a limit.

What a rank runs is given. `gptdist train` starts its ranks by `supervise.py`.
"""

import sys
from collections.abc import Sequence
from typing import Any

from launch.ranks.forked_rank import Target
from launch.ranks.place import Place
from launch.ranks.supervise import run_agent
from launch.ranks.verdict import Verdict


def launch_local(
    nproc: int,
    target: str | Target,
    payload: Any = None,
    *,
    preload: Sequence[str] = (),
    port: int = 0,
    timeout_seconds: float | None = None,
) -> int:
    """Run `target(world, payload)` on `nproc` forked ranks; returns the exit code of the run, its error shown once.

    The arguments are those of `run_local`.
    """
    verdict = run_local(nproc, target, payload, preload=preload, port=port, timeout_seconds=timeout_seconds)
    show_verdict(verdict)
    return verdict.exit_code


def show_verdict(verdict: Verdict) -> None:
    """On stderr, where there is something to say."""
    for text in (verdict.traceback.rstrip(), f"error: {verdict.message}" if verdict.message else ""):
        if text:
            print(text, file=sys.stderr, flush=True)


def run_local(
    nproc: int,
    target: str | Target,
    payload: Any = None,
    *,
    preload: Sequence[str] = (),
    port: int = 0,
    timeout_seconds: float | None = None,
) -> Verdict:
    """Run `target(world, payload)` on `nproc` forked ranks; how the run ended, which is not shown.

    `target`: a function, or `module:function`, imported in the ranks. `payload` needs no serialising. `preload`:
    modules to import before the fork (those that fail are left to the ranks, which then say why). `port`: where the
    ranks meet, 0 for a free one. `timeout_seconds`: end the ranks after this long. Call it from the main thread. Raises
    LaunchError.
    """
    return run_agent(Place.alone(nproc), target, payload, preload=preload, port=port, limit_seconds=timeout_seconds)
