"""Faults while a checkpoint is saved: ranks killed, slow, or with a disk that takes no more.

After each fault every finished checkpoint of the folder must hold just what was saved, the newest of them must be the
one before the fault or the one being saved, and the next world of ranks must go on in the same folder.
"""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from gptdist.checkpoint.folder import step_folders
from gptdist.checkpoint.read import Checkpoint, find_latest
from gptdist.errors import GptdistError
from launch.drills.certificate import Finding
from launch.drills.saving_ranks import SavePlan, content_problem, read_records, save_steps
from launch.drills.small_disk import SmallDisk, small_disk_problem
from launch.ranks.local import run_local

PHASES = (
    "prepare",
    "folder",
    "file",
    "sync",
    "copy-out",
    "gather",
    "manifest",
    "rename",
    "latest",
    "read-back",
    "prune",
)
PRELOAD = ("gptdist.checkpoint.saver", "launch.rendezvous")
SMALL_DISK_BYTES = 8 << 20
SLOW_SECONDS = 2.5
_LONGEST_KILL_SECONDS = 0.4
_WORLD_SECONDS = 120.0


def kill_in_each_phase(ranks: int, work_dir: Path) -> Iterator[Finding]:
    """kill -9 on rank 0 and on the last rank, in every phase of the second save."""
    for rank in sorted({0, ranks - 1}):
        for phase in PHASES:
            if phase == "rename" and rank:
                continue  # rank 0 alone renames
            with _fresh(work_dir) as folder:
                yield _finding(
                    f"kill -9 of rank {rank} in phase {phase}", partial(_kill_once, folder, ranks, rank, phase)
                )


def kill_at_random(ranks: int, kills: int, seed: int, work_dir: Path) -> Finding:
    """kill -9 of any rank at any moment, `kills` times in one folder; each world goes on where the last one was."""
    draw = random.Random(seed)
    with _fresh(work_dir) as folder:

        def run() -> str:
            newest = died = 0
            for number in range(kills):
                steps = tuple(range(newest + 1, newest + 40))
                plan = SavePlan(
                    folder / "checkpoints",
                    _report(folder, number),
                    steps,
                    rank=draw.randrange(ranks),
                    kill_after_seconds=draw.uniform(0.0, _LONGEST_KILL_SECONDS),
                )
                died += (
                    run_local(ranks, save_steps, plan, preload=PRELOAD, timeout_seconds=_WORLD_SECONDS).exit_code != 0
                )
                newest = _check(plan.checkpoints_dir, at_least=newest)
            _go_on(folder, ranks, newest)
            if died < kills:
                raise _Unexpected(f"only {died} of {kills} worlds were killed in time")
            return f"{newest} saves finished between the kills"

        return _finding(f"kill -9 of a random rank at a random moment (seed {seed})", run, kills)


def slow_rank(ranks: int, work_dir: Path) -> Finding:
    """A rank that takes long to write: the save waits for it, and says which one it was."""
    with _fresh(work_dir) as folder:

        def run() -> str:
            slow = ranks - 1
            plan = SavePlan(
                folder / "checkpoints",
                _report(folder, 0),
                (1, 2),
                rank=slow,
                phase="file",
                sleep_seconds=SLOW_SECONDS,
            )
            _expect_code(
                run_local(ranks, save_steps, plan, preload=PRELOAD, timeout_seconds=_WORLD_SECONDS).exit_code, 0
            )
            if _check(plan.checkpoints_dir, at_least=2) != 2:
                raise _Unexpected("the slow save did not finish")
            said = (plan.report_dir / "rank-0.log").read_text()
            return _line_with(said, f"rank {slow}", "took")

        return _finding("a rank that writes slowly", run)


def disk_faults(ranks: int, work_dir: Path) -> Iterator[Finding]:
    """A disk with no room for the save, one that fills up during it, one that becomes read-only."""
    faults: dict[str, Callable[[SmallDisk, int], str]] = {
        "a disk without room for the save": _no_room,
        "a disk that fills up while ranks write": _fills_up,
        "a folder that became read-only": _read_only,
    }
    impossible = small_disk_problem()
    for fault, run in faults.items():
        if impossible:
            yield Finding(fault, skipped=impossible)
            continue
        with _fresh(work_dir) as folder, SmallDisk(folder / "disk", SMALL_DISK_BYTES) as disk:
            yield _finding(fault, partial(run, disk, ranks))


class _Unexpected(Exception):
    """What came of a fault is not what must come of it."""


def _finding(fault: str, run: Callable[[], str], times: int = 1) -> Finding:
    started = time.perf_counter()
    noticed, problem = "", None
    try:
        noticed = run()
    except (_Unexpected, GptdistError) as error:
        problem = str(error)
    return Finding(fault, times, noticed, problem, seconds=time.perf_counter() - started)


def _kill_once(folder: Path, ranks: int, rank: int, phase: str) -> str:
    staging_dir = folder / "staging" if phase == "copy-out" else None
    plan = SavePlan(
        folder / "checkpoints",
        _report(folder, 0),
        (1, 2),
        rank=rank,
        phase=phase,
        kill=True,
        staging_dir=staging_dir,
    )
    verdict = run_local(ranks, save_steps, plan, preload=PRELOAD, timeout_seconds=_WORLD_SECONDS)
    if verdict.exit_code == 0:
        raise _Unexpected("nobody noticed that a rank was killed")
    if verdict.global_rank != rank:
        raise _Unexpected(f"rank {verdict.global_rank} was blamed: {verdict.message}")
    newest = _check(plan.checkpoints_dir, at_least=1)
    _go_on(folder, ranks, newest, staging_dir)
    if staging_dir is not None and any(staging_dir.iterdir()):
        raise _Unexpected(f"left behind in {staging_dir.name}: {sorted(path.name for path in staging_dir.iterdir())}")
    return f"{verdict.message.rstrip('.')}; step {newest} loads"


def _no_room(disk: SmallDisk, ranks: int) -> str:
    _save(disk.path, ranks, 1)
    disk.leave_free(64 << 10)
    said = _failed_save(disk.path, ranks, 2)
    disk.empty_again()
    _go_on(disk.path, ranks, _check(disk.path / "checkpoints", at_least=1))
    return said


def _fills_up(disk: SmallDisk, ranks: int) -> str:
    plan = SavePlan(
        disk.path / "checkpoints",
        _report(disk.path.parent, 0),
        (1, 2),
        rank=ranks - 1,
        phase="file",
        fill=disk.filler,
    )
    _expect_code(run_local(ranks, save_steps, plan, preload=PRELOAD, timeout_seconds=_WORLD_SECONDS).exit_code, 0)
    said = _error_of(plan, ranks, 2)
    _expect_no_rubbish(plan.checkpoints_dir)
    disk.empty_again()
    _go_on(disk.path, ranks, _check(plan.checkpoints_dir, at_least=1))
    return said


def _read_only(disk: SmallDisk, ranks: int) -> str:
    _save(disk.path, ranks, 1)
    disk.make_read_only()
    said = _failed_save(disk.path, ranks, 2)
    disk.make_writable()
    _go_on(disk.path, ranks, _check(disk.path / "checkpoints", at_least=1))
    return said


def _save(folder: Path, ranks: int, step: int, staging_dir: Path | None = None) -> SavePlan:
    plan = SavePlan(folder / "checkpoints", _report(folder.parent, step), (step,), staging_dir=staging_dir)
    _expect_code(run_local(ranks, save_steps, plan, preload=PRELOAD, timeout_seconds=_WORLD_SECONDS).exit_code, 0)
    return plan


def _failed_save(folder: Path, ranks: int, step: int) -> str:
    return _error_of(_save(folder, ranks, step), ranks, step)


def _error_of(plan: SavePlan, ranks: int, step: int) -> str:
    """The error of the save of `step`: on all ranks, a StorageError, and with the path in it."""
    errors = [
        record["error"]
        for rank in range(ranks)
        for record in read_records(plan.report_dir, rank)
        if record["step"] == step
    ]
    if len(errors) != ranks or not all(errors):
        raise _Unexpected(f"not all ranks know that the save failed: {errors}")
    error = str(errors[0])
    if not error.startswith("StorageError") or str(plan.checkpoints_dir) not in error:
        raise _Unexpected(f"the error does not say what is wrong with the disk: {error}")
    return error.removeprefix("StorageError: ")


def _go_on(folder: Path, ranks: int, newest: int, staging_dir: Path | None = None) -> None:
    """A new world of ranks saves the next step in the same folder, and leaves no rubbish of the one before."""
    plan = _save(folder, ranks, newest + 1, staging_dir)
    error = read_records(plan.report_dir, 0)[-1]["error"]
    if error is not None:
        raise _Unexpected(f"the next save failed: {error}")
    if _check(plan.checkpoints_dir, at_least=newest + 1) != newest + 1:
        raise _Unexpected("the next save is not the newest")
    _expect_no_rubbish(plan.checkpoints_dir)


def _check(checkpoints_dir: Path, at_least: int) -> int:
    """The newest step, every finished checkpoint being loadable and what was saved. 0: there is none."""
    folders = step_folders(checkpoints_dir) if checkpoints_dir.is_dir() else []
    for path in folders:
        with Checkpoint.open(path, verify=True) as checkpoint:
            problem = content_problem(checkpoint)
            if problem:
                raise _Unexpected(problem)
    found = find_latest(checkpoints_dir) if folders else None
    newest = 0
    if found is not None:
        newest = found.checkpoint.step
        found.checkpoint.close()
    if newest < at_least:
        raise _Unexpected(f"step {at_least} was saved before, but the newest that loads is {newest}")
    return newest


def _expect_no_rubbish(checkpoints_dir: Path) -> None:
    left = [path.name for path in checkpoints_dir.iterdir() if path.name.startswith(".")]
    if left:
        raise _Unexpected(f"left behind: {', '.join(left)}")


def _expect_code(found: int, wanted: int) -> None:
    if found != wanted:
        raise _Unexpected(f"the ranks ended with {found}, not {wanted}")


def _line_with(text: str, *words: str) -> str:
    for line in text.splitlines():
        if all(word in line for word in words):
            return line
    raise _Unexpected(f"nothing said which rank it was: {text[-500:]!r}")


@contextmanager
def _fresh(work_dir: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=work_dir, prefix="drill-") as folder:
        yield Path(folder)


def _report(folder: Path, number: int) -> Path:
    path = folder / f"report-{number}-{time.monotonic_ns()}"
    path.mkdir()
    return path
