"""`gptdist drill checkpoint`: faults on purpose while checkpoints are saved, and to those that are; a certificate."""

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from gptdist.durable import write_durably
from gptdist.errors import EXIT_DONE, EXIT_FAILED, StorageError
from launch.drills.certificate import Finding, all_passed, certificate_record, render_certificate
from launch.drills.checkpoint_damage import damage
from launch.drills.checkpoint_saves import PRELOAD, disk_faults, kill_at_random, kill_in_each_phase, slow_rank
from launch.drills.saving_ranks import SavePlan, save_steps
from launch.local import run_local


def checkpoint(args: argparse.Namespace) -> int:
    """Print a line a fault as it is drilled, then the table; exit 1 where one did not go as it must."""
    console = Console()
    findings = []
    try:
        args.work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot use {args.work}: {error.strerror}. Name another --work.") from error
    with tempfile.TemporaryDirectory(prefix="gptdist-drill-", dir=args.work) as folder:
        for found in _drill(Path(folder), args):
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


def _drill(work_dir: Path, args: argparse.Namespace) -> Iterator[Finding]:
    yield from kill_in_each_phase(args.ranks, work_dir)
    yield kill_at_random(args.ranks, args.kills, args.seed, work_dir)
    yield slow_rank(args.ranks, work_dir)
    yield from disk_faults(args.ranks, work_dir)
    folder = work_dir / "damage"
    (folder / "report").mkdir(parents=True)
    plan = SavePlan(folder / "checkpoints", folder / "report", (1, 2))
    run_local(args.ranks, save_steps, plan, preload=PRELOAD)
    yield from damage(plan.checkpoints_dir, args.flips, args.truncations, args.seed)
