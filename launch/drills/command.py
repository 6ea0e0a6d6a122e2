"""`gptdist drill`: faults on purpose, to a run and to its checkpoints, and a certificate of what came of them."""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from gptdist.durable import write_durably
from gptdist.errors import EXIT_DONE, EXIT_FAILED, ConfigError, LaunchError, StorageError
from launch.drills.certificate import Finding, all_passed, certificate_record, render_certificate
from launch.drills.checkpoint_damage import damage
from launch.drills.checkpoint_saves import PRELOAD, disk_faults, kill_at_random, kill_in_each_phase, slow_rank
from launch.drills.saving_ranks import SavePlan, save_steps
from launch.ranks.local import run_local

PLAIN_WIDTH = 160
"""Of the table where there is no terminal to ask."""


def run(args: argparse.Namespace) -> int:
    """Train a small model while faults strike; exit 1 where one did not end as the untouched run does."""
    from launch.drills.lab_faults import LAB_FAULTS, drill_lab
    from launch.drills.lab_stage import RANKS as LAB_RANKS
    from launch.drills.lab_stage import lab_problem
    from launch.drills.run_faults import FAULTS, build_reference, drill_faults
    from launch.drills.soak import SOAK_STEPS, soak

    known = LAB_FAULTS if args.lab else FAULTS
    unknown = sorted(set(args.faults or ()) - known.keys())
    if unknown:
        raise ConfigError(f"there is no fault {', '.join(unknown)}. Faults: {', '.join(known)}.")
    problem = lab_problem() if args.lab else None
    if problem:
        raise LaunchError(f"there can be no lab here: {problem}.")

    def findings(work_dir: Path) -> Iterator[Finding]:
        names = list(args.faults or known)
        if args.soak:
            yield soak(args.soak, build_reference(work_dir, args.ranks, SOAK_STEPS, {}), args.seed, work_dir)
        elif args.lab:
            yield from drill_lab(names, build_reference(work_dir, LAB_RANKS), args.seed, work_dir)
        else:
            yield from drill_faults(names, build_reference(work_dir, args.ranks), args.seed, work_dir)

    return _certify(findings, args)


def checkpoint(args: argparse.Namespace) -> int:
    """Kill, starve and damage saves and checkpoints; exit 1 where one did not go as it must."""
    return _certify(lambda work_dir: _drill_checkpoints(work_dir, args), args)


def _certify(drill: Callable[[Path], Iterator[Finding]], args: argparse.Namespace) -> int:
    """Print a line a fault as it is drilled, then the table; exit 1 where one did not go as it must."""
    console = Console() if sys.stdout.isatty() else Console(width=PLAIN_WIDTH)
    findings = []
    try:
        args.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot use {args.work}: {error.strerror}. Name another --work.") from error
    with tempfile.TemporaryDirectory(prefix="gptdist-drill-", dir=args.work) as folder:
        for found in drill(Path(folder)):
            finding = replace(found, noticed=found.noticed.replace(f"{folder}/", ""))
            findings.append(finding)
            console.print(f"{finding.fault} ({finding.times}): {finding.verdict}", markup=False, highlight=False)
    console.print()
    console.print(render_certificate(findings))
    passed = all_passed(findings)
    tried = sum(finding.times for finding in findings if finding.skipped is None)
    console.print(f"\n{tried} faults: {'all passed' if passed else 'NOT passed'}")
    if args.out is not None:
        write_durably(args.out, json.dumps(certificate_record(findings), indent=2).encode() + b"\n")
    return EXIT_DONE if passed else EXIT_FAILED


def _drill_checkpoints(work_dir: Path, args: argparse.Namespace) -> Iterator[Finding]:
    yield from kill_in_each_phase(args.ranks, work_dir)
    yield kill_at_random(args.ranks, args.kills, args.seed, work_dir)
    yield slow_rank(args.ranks, work_dir)
    yield from disk_faults(args.ranks, work_dir)
    folder = work_dir / "damage"
    (folder / "report").mkdir(parents=True)
    plan = SavePlan(folder / "checkpoints", folder / "report", (1, 2))
    run_local(args.ranks, save_steps, plan, preload=PRELOAD)
    yield from damage(plan.checkpoints_dir, args.flips, args.truncations, args.seed)
